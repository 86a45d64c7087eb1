// What the dispatcher (core.cpp) and the kernels (kernel.cpp, once per instruction set) share.
//
// Only plain types here: an inline function compiled for a wide instruction set could be the copy
// that the linker keeps for all.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace deformnd {

using i64 = int64_t;
using i32 = int32_t;

enum Dtype : i64 { kFloat16, kBFloat16, kFloat32, kFloat64 };

// A tensor of a call; no data stands for an absent one. Images, points, offsets and masks lie
// channels first or last, all others are contiguous.
struct Array {
  char* data;
  i64 dtype;
  bool last;
};

// One call. See Note [one bilinear form] in kernels/geometry.py for image and points. No weight, as
// of deform_aggregate, stands for one of ones where each channel is a group.
struct Call {
  bool gather;     // points from the image; otherwise the given ones of the four gradients
  i64 threads;     // at most
  bool exactly;    // that many threads even for little work
  bool alone;      // the work is cut for them, but the calling thread does it all
  bool tiles;      // the machine has AMX, see Note [pairs] in pairs.h
  bool depthwise;  // each channel is a group, see Note [depthwise] in kernel.cpp
  bool backwards;  // in offsets and masks, axes and kernel points are in the order of the axes from
                   // the last to the first, see Note [backwards] in kernels/cpu.py
  i64 rank, batch, image_channels, point_channels, groups, offset_groups, mask_groups;
  i64 image_size[3], point_size[3], kernel[3], stride[3], padding[3], dilation[3];
  Array image, points, weight, offset, mask, bias;
  Array grad_image, grad_weight, grad_offset, grad_mask;
};

// A call of deform_attention, or of its backward with the gradients that have data. All arrays are
// contiguous; the value is of the computing type, float32 or float64, and channels are a multiple
// of 4.
struct Attention {
  bool reverse;  // the output is the given gradient
  i64 threads;   // this and the two below as in Call
  bool exactly;
  bool alone;
  i64 rank, batch, queries, heads, channels, levels, points;
  i64 pixels;        // of all levels
  const i64* sizes;  // [level][axis]
  Array value, locations, weights, output, grad_value, grad_locations, grad_weights;
};

// kOdd is done, too, with a mask, or a gradient by offset or mask, that is not finite: see
// Note [infinity] in kernels/cpu.py.
enum Status : i64 { kDone, kNoMemory, kOdd };

// Run a call by the instructions of a level, or -1 the best; the caller has filled in all but
// `alone`, `tiles` and `depthwise`.
Status dispatch(Call&, i64 level);
Status dispatch(Attention&, i64 level);

// Memory for one call: 64-byte aligned, or null. Kept between calls for the calling thread, more of
// it where many threads run the call, since fresh pages cost more than the arithmetic of a small
// one.
char* workspace_take(size_t bytes);
void workspace_give(i64 threads);

// Results of at least kLarge bytes are likely fresh memory, see Note [pages].
constexpr i64 kHugePage = 2 << 20, kLarge = 4 * kHugePage;

// For calls whose products are of bfloat16 alone, see in_pairs in core.cpp.
namespace bfloat16 {
Status run(const Call&);
}
namespace avx512 {
Status run(const Call&);
Status run(const Attention&);
}  // namespace avx512
namespace avx2 {
Status run(const Call&);
Status run(const Attention&);
}  // namespace avx2
namespace baseline {
Status run(const Call&);
Status run(const Attention&);
}  // namespace baseline

}  // namespace deformnd

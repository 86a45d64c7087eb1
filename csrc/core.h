// What the dispatcher (core.cpp) and the kernels (kernel.cpp, once per instruction set) share.
//
// There are only plain types here. Of an inline function the linker would keep one copy for all,
// and that could be one with instructions that this machine lacks.

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

// One call. Note [one bilinear form] in kernels/geometry.py says what image and points are. A
// weight without data, as deform_aggregate has it, stands for one of ones where each channel is a
// group.
struct Call {
  bool gather;     // make points of the image; if false, make those gradients that have data
  i64 threads;     // at most
  bool exactly;    // use that many threads even for little work
  bool alone;      // the work is cut for that many, but the calling thread does it all
  bool tiles;      // the machine has AMX, see Note [pairs] in pairs.h
  bool depthwise;  // each channel is a group, see Note [depthwise] in kernel.cpp
  bool backwards;  // offsets and masks have axes and kernel points in the order of the axes from
                   // the last to the first, see Note [backwards] in kernels/cpu.py
  i64 rank, batch, image_channels, point_channels, groups, offset_groups, mask_groups;
  i64 image_size[3], point_size[3], kernel[3], stride[3], padding[3], dilation[3];
  Array image, points, weight, offset, mask, bias;
  Array grad_image, grad_weight, grad_offset, grad_mask;
};

// A call of deform_attention, or of its backward, which makes those gradients that have data. All
// arrays are contiguous. The value is of the computing type, float32 or float64, and the channels
// of a head are a multiple of 4.
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

// kOdd means done as well, but a mask, or a gradient by offset or mask, is not finite: see
// Note [infinity] in kernels/cpu.py.
enum Status : i64 { kDone, kNoMemory, kOdd };

// Run a call by the instructions of a level, or the best if it is -1. The caller fills in all of
// the call but `alone`, `tiles` and `depthwise`.
Status dispatch(Call&, i64 level);
Status dispatch(Attention&, i64 level);

// Memory for one call, aligned to 64 bytes, or null. It is kept for the calling thread's next call,
// since fresh pages cost more time than the arithmetic of a small call; how much of it is kept
// depends on how many threads ran the call.
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

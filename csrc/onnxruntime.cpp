// The operators for ONNX Runtime: RegisterCustomOps, which deformnd/onnx/session.py explains.
//
// Of the domain "deformnd" there are DeformConv, DeformConvTranspose, DeformAggregate and
// DeformAttention, each for 1 to 3 axes; of ONNX's own, unless the session says otherwise, the
// standard DeformConv. What kernels/geometry.py checks is checked here, too, with its words.
//
// There is no reference here. So where a mask is infinite, sums may be NaN that are infinite by the
// definition: see Note [infinity] in kernels/cpu.py.

#include "onnxruntime.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>

#include "core.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace deformnd {
namespace {

constexpr i64 kLargest = INT_MAX;  // of stride, padding, dilation and groups, as in geometry.py
constexpr int kInputs = 5, kDims = 6;

enum Family { kConv, kTranspose, kAggregate, kAttention, kStandard };

// A kind of operator. `letters` has one for each input, in their order: t for the operator's own
// type, c for any floating type, i for int64, and a capital where the input must be there.
struct Kind {
  Family family;
  const char* name;
  const char* function;
  const char* letters;
  const char* inputs[kInputs];
};

constexpr Kind kKinds[] = {
    {kConv, "DeformConv", "deform_conv", "TTcct", {"input", "weight", "offset", "mask", "bias"}},
    {kTranspose,
     "DeformConvTranspose",
     "deform_conv_transpose",
     "TTcct",
     {"input", "weight", "offset", "mask", "bias"}},
    {kAggregate, "DeformAggregate", "deform_aggregate", "Tcc", {"input", "offset", "mask"}},
    {kAttention,
     "DeformAttention",
     "deform_attention",
     "TICC",
     {"value", "shapes", "locations", "weights"}},
    // ONNX's own operator has the bias before the mask.
    {kStandard, "DeformConv", "deform_conv", "TTCtc", {"input", "weight", "offset", "bias", "mask"}},
};
// In the order of enum Dtype.
constexpr ort::Element kElements[] = {ort::kHalf, ort::kBrainFloat, ort::kFloat, ort::kDouble};
// A file may have local functions that stand in for the operators in other engines. They are told
// apart by name alone, and their bodies hold sizes. So each operator of ours has this many names:
// DeformConv, DeformConv_2, DeformConv_3 ... The number is the same in onnx/session.py.
constexpr int kNames = 32;
constexpr int kCount = (4 * kNames + 1) * 4;  // in all types

// One operator of one type, in one or more sessions with a number of threads.
struct Operator : ort::CustomOp {
  const Kind* kind;
  char called[24];
  ort::Element element;
  i64 threads;
};

const Operator& operator_of(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

struct Ints {
  i64 count = -1;  // not given
  i64 values[2 * 3] = {};
};

// A node of a model.
struct Node {
  const Operator* op;
  const ort::Api* api;
  Ints stride, padding, dilation, output_padding, kernel;
  i64 groups = 1, offset_group = 1;
};

struct Text {
  char s[200];
};

Text format(const char* pattern, ...) {
  Text text;
  va_list values;
  va_start(values, pattern);
  vsnprintf(text.s, sizeof(text.s), pattern, values);
  va_end(values);
  return text;
}

// Values as Python shows a list or, with `tuple`, a tuple.
Text shown(const i64* values, i64 count, bool tuple = false) {
  Text text;
  size_t used = size_t(snprintf(text.s, sizeof(text.s), "%c", tuple ? '(' : '['));
  for (i64 i = 0; i < count; i++)
    used += size_t(snprintf(text.s + used, sizeof(text.s) - used, "%s%lld", i ? ", " : "",
                            static_cast<long long>(values[i])));
  const char* end = tuple ? (count == 1 ? ",)" : ")") : "]";
  snprintf(text.s + used, sizeof(text.s) - used, "%s", end);
  return text;
}

struct Tensor {
  const char* name = nullptr;
  char* data = nullptr;
  i64 dims = -1;  // absent
  i64 dtype = kFloat32;
  i64 size[kDims] = {};
  explicit operator bool() const { return dims >= 0; }
  i64 elements() const {
    i64 product = 1;
    for (i64 a = 0; a < dims; a++) product *= size[a];
    return product;
  }
  Array array() const { return {*this ? data : nullptr, dtype, false}; }
};

long long ll(i64 value) { return value; }
const char* plural(i64 count, const char* ending) { return count > 1 ? ending : ""; }
i64 bytes_of(i64 dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// The memory that a call borrows.
struct Buffer {
  char* data = nullptr;
  ~Buffer() { free(data); }
  bool take(i64 bytes) { return (data = static_cast<char*>(malloc(size_t(bytes)))) != nullptr; }
};

float half(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13, sign = uint32_t(bits & 0x8000) << 16;
  float value, scale;
  const uint32_t scale_bits = 0x77800000;  // 2^112, the exponents' difference
  memcpy(&value, &magnitude, 4), memcpy(&scale, &scale_bits, 4);
  value *= scale;
  uint32_t result;
  memcpy(&result, &value, 4);
  if (magnitude >= 0x0f800000) result = 0x7f800000 | (magnitude & 0x007fffff);
  result |= sign;
  memcpy(&value, &result, 4);
  return value;
}

float brain_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// One call of a node. Each step returns an error, or null if the next one may follow.
class Run {
 public:
  Run(const Node& node, ort::KernelContext* context)
      : node_(node), api_(*node.api), kind_(*node.op->kind), context_(context) {}

  ort::Status* run() {
    if (ort::Status* bad = read()) return bad;
    return kind_.family == kAttention ? attend() : convolve();
  }

 private:
  const Node& node_;
  const ort::Api& api_;
  const Kind& kind_;
  ort::KernelContext* context_;
  Tensor tensors_[kInputs];
  i64 n_ = 0;  // axes; 0: not known

  Tensor& input(const char* name) {
    static Tensor none;
    for (int i = 0; i < kInputs; i++)
      if (kind_.inputs[i] && !strcmp(kind_.inputs[i], name)) return tensors_[i];
    return none;
  }

  ort::Status* fail(const Text& what, ort::Code code = ort::kInvalidArgument) const {
    char text[1024];
    const Text axes = n_ ? format("%lld", ll(n_)) : format("N");
    size_t used = size_t(snprintf(text, sizeof(text), "%s%s%s: %s", kind_.function,
                                  kind_.family == kAttention ? "" : axes.s,
                                  kind_.family == kAttention ? "" : "d", what.s));
    const char* separator = "; ";
    for (const Tensor& t : tensors_) {
      if (!t || used >= sizeof(text)) continue;
      used += size_t(snprintf(text + used, sizeof(text) - used, "%s%s %s", separator, t.name,
                              shown(t.size, t.dims).s));
      separator = ", ";
    }
    return api_.create_status(code, text);
  }

  ort::Status* read() {
    size_t count = 0;
    if (ort::Status* bad = api_.get_input_count(context_, &count)) return bad;
    const int expected = int(strlen(kind_.letters));
    for (int i = 0; i < expected; i++) {
      Tensor& t = tensors_[i];
      t.name = kind_.inputs[i];
      const ort::Value* value = nullptr;
      if (size_t(i) < count)
        if (ort::Status* bad = api_.get_input(context_, size_t(i), &value)) return bad;
      if (!value) {
        if (kind_.letters[i] < 'a') return fail(format("%s is missing", t.name));
        continue;
      }
      if (ort::Status* bad = read(t, value, kind_.letters[i])) return bad;
    }
    return nullptr;
  }

  ort::Status* read(Tensor& t, const ort::Value* value, char letter) {
    ort::TypeAndShape* shape = nullptr;
    if (ort::Status* bad = api_.get_tensor_type_and_shape(value, &shape)) return bad;
    int element = 0;
    size_t dims = 0;
    ort::Status* bad = api_.get_tensor_element_type(shape, &element);
    if (!bad) bad = api_.get_dimensions_count(shape, &dims);
    if (!bad && dims <= kDims) bad = api_.get_dimensions(shape, t.size, dims);
    api_.release_type_and_shape(shape);
    if (bad) return bad;
    if (dims > kDims) return fail(format("%s has %lld dimensions", t.name, ll(i64(dims))));
    t.dims = i64(dims);
    if (letter != 'I') {
      t.dtype = -1;
      for (i64 code = 0; code < 4; code++)
        if (kElements[code] == element) t.dtype = code;
      if (t.dtype < 0)
        return fail(format("%s has an element type of number %d, expected one of float16, "
                           "bfloat16, float32, float64",
                           t.name, element));
    } else if (element != ort::kInt64) {
      return fail(format("%s has an element type of number %d, expected int64", t.name, element));
    }
    // The function serves results as well, and so it takes no const.
    void* data = nullptr;
    bad = api_.get_tensor_mutable_data(const_cast<ort::Value*>(value), &data);
    t.data = static_cast<char*>(data);
    return bad;
  }

  ort::Status* output(Tensor& t, const i64* size, i64 dims) {
    ort::Value* value = nullptr;
    if (ort::Status* bad = api_.get_output(context_, 0, size, size_t(dims), &value)) return bad;
    void* data = nullptr;
    ort::Status* bad = api_.get_tensor_mutable_data(value, &data);
    t.data = static_cast<char*>(data), t.dims = dims, t.dtype = tensors_[0].dtype;
    memcpy(t.size, size, size_t(dims) * sizeof(i64));
    return bad;
  }

  ort::Status* finish(Status status) const {
    return status == kNoMemory ? fail(format("no memory for the workspace"), ort::kFail) : nullptr;
  }

  // An attribute that has a value for each axis, or two as ONNX's pads have.
  ort::Status* list(const char* name, const Ints& given, i64 least, i64 otherwise, i64* to,
                    i64 count) const {
    for (i64 v = 0; v < count; v++) to[v] = given.count < 0 ? otherwise : given.values[v];
    if (given.count >= 0 && given.count != count)
      return fail(format("%s is %s, expected %lld value%s", name,
                         shown(given.values, given.count, true).s, ll(count), plural(count, "s")));
    for (i64 v = 0; v < count; v++) {
      if (to[v] < least)
        return fail(format("%s is %s, expected at least %lld on every axis", name,
                           shown(to, count, true).s, ll(least)));
      if (to[v] > kLargest)
        return fail(format("%s is %s, expected at most %lld on every axis", name,
                           shown(to, count, true).s, ll(kLargest)));
    }
    return nullptr;
  }

  // The number of groups of an offset or mask, which has `unit` channels for each.
  ort::Status* groups_of(const Tensor& t, i64 unit, i64 points, const Call& c, i64 channels,
                         const char* owner, i64& groups) const {
    groups = 0;
    if (!t) return nullptr;
    if (t.dims != n_ + 2)
      return fail(format("%s has %lld dimensions, expected %lld as input", t.name, ll(t.dims),
                         ll(n_ + 2)));
    if (t.size[0] != c.batch)
      return fail(format("%s has batch size %lld, expected %lld as input", t.name, ll(t.size[0]),
                         ll(c.batch)));
    if (t.size[1] % unit || t.size[1] == 0) {
      const Text axes = format("%lld ax%s x ", ll(n_), n_ > 1 ? "es" : "is");
      return fail(format("%s has %lld channels, expected a multiple of %lld (%s%lld kernel points)",
                         t.name, ll(t.size[1]), ll(unit), unit > points ? axes.s : "", ll(points)));
    }
    for (i64 v = 0; v < n_; v++)
      if (t.size[2 + v] != c.point_size[v])
        return fail(format("%s has spatial size %s, expected the %s %s", t.name,
                           shown(t.size + 2, n_, true).s,
                           kind_.family == kTranspose ? "input's" : "output's",
                           shown(c.point_size, n_, true).s));
    groups = t.size[1] / unit;
    if (channels % groups)
      return fail(format("%s has %lld groups (%lld channels / %lld), which do not divide the %lld "
                         "%s channels",
                         t.name, ll(groups), ll(t.size[1]), ll(unit), ll(channels), owner));
    if (kind_.family == kStandard && groups != node_.offset_group)
      return fail(format("%s has %lld channels, expected %lld (%lld for each of offset_group %lld)",
                         t.name, ll(t.size[1]), ll(unit * node_.offset_group), ll(unit),
                         ll(node_.offset_group)));
    return nullptr;
  }

  ort::Status* convolve() {
    const bool transposed = kind_.family == kTranspose, weighted = kind_.family != kAggregate;
    const Tensor &in = input("input"), &weight = input("weight"), &offset = input("offset");
    const Tensor &mask = input("mask"), &bias = input("bias");
    if (in.dims < 3 || in.dims > 5)
      return fail(format("input has %lld dimensions, expected 3 to 5 (batch, channels, 1 to 3 "
                         "axes)",
                         ll(in.dims)));
    n_ = in.dims - 2;
    for (const Tensor* t : {&in, &weight}) {
      if (!*t) continue;
      if (t->dims != in.dims)
        return fail(format("weight has %lld dimensions, expected %lld as input", ll(t->dims),
                           ll(in.dims)));
      for (i64 v = 0; v < n_; v++)
        if (t->size[2 + v] < 1)
          return fail(format("%s has %s size %s, expected at least 1 on every axis", t->name,
                             t == &in ? "spatial" : "kernel", shown(t->size + 2, n_, true).s));
    }
    Call c = {};
    c.gather = !transposed, c.threads = node_.op->threads, c.rank = n_;
    c.batch = in.size[0];
    i64 extra[3] = {}, pads[6] = {};
    ort::Status* bad = list("stride", node_.stride, 1, 1, c.stride, n_);
    if (!bad)
      bad = kind_.family == kStandard ? list("pads", node_.padding, 0, 0, pads, 2 * n_)
                                      : list("padding", node_.padding, 0, 0, c.padding, n_);
    if (!bad) bad = list("dilation", node_.dilation, 1, 1, c.dilation, n_);
    if (!bad && transposed) bad = list("output_padding", node_.output_padding, 0, 0, extra, n_);
    if (!bad && !weighted) {
      if (node_.kernel.count < 0) return fail(format("kernel_size is missing"));
      bad = list("kernel_size", node_.kernel, 1, 1, c.kernel, n_);
    }
    if (bad) return bad;
    for (i64 v = 0; v < n_; v++) {  // the padding at the beginning of each axis, and at its end
      if (kind_.family == kStandard)
        c.padding[v] = pads[v];
      else
        pads[v] = pads[n_ + v] = c.padding[v];
    }
    if (node_.groups < 1 || node_.groups > kLargest)
      return fail(format("groups is %lld, expected at least 1", ll(node_.groups)));
    if (weighted) memcpy(c.kernel, weight.size + 2, size_t(n_) * sizeof(i64));
    if (kind_.family == kStandard && node_.kernel.count >= 0 &&
        (node_.kernel.count != n_ || memcmp(node_.kernel.values, c.kernel, size_t(n_) * 8)))
      return fail(format("kernel_shape is %s, expected weight's %s",
                         shown(node_.kernel.values, node_.kernel.count, true).s,
                         shown(c.kernel, n_, true).s));
    c.groups = weighted ? node_.groups : in.size[1];
    const i64 channels = in.size[1];
    if (transposed) {
      c.point_channels = channels, c.image_channels = weight.size[1] * c.groups;
      if (channels != weight.size[0])
        return fail(format("input has %lld channels, expected %lld (weight.shape[0])", ll(channels),
                           ll(weight.size[0])));
      if (channels % c.groups)
        return fail(format("weight has %lld input channels, expected a multiple of groups %lld",
                           ll(channels), ll(c.groups)));
    } else {
      c.image_channels = channels, c.point_channels = weighted ? weight.size[0] : channels;
      if (weighted && channels != weight.size[1] * c.groups)
        return fail(format("input has %lld channels, expected %lld (weight.shape[1] %lld x groups "
                           "%lld)",
                           ll(channels), ll(weight.size[1] * c.groups), ll(weight.size[1]),
                           ll(c.groups)));
      if (weighted && c.point_channels % c.groups)
        return fail(format("weight has %lld output channels, expected a multiple of groups %lld",
                           ll(c.point_channels), ll(c.groups)));
    }
    if ((bad = sizes(c, in, pads, extra))) return bad;
    i64 points = 1;
    for (i64 v = 0; v < n_; v++) points *= c.kernel[v];
    const char* owner = transposed ? "output" : "input";
    bad = groups_of(offset, n_ * points, points, c, c.image_channels, owner, c.offset_groups);
    if (!bad) bad = groups_of(mask, points, points, c, c.image_channels, owner, c.mask_groups);
    if (bad) return bad;
    const i64 made = transposed ? c.image_channels : c.point_channels;
    if (bias && (bias.dims != 1 || bias.size[0] != made))
      return fail(format("bias has shape %s, expected [%lld]", shown(bias.size, bias.dims).s,
                         ll(made)));
    i64 size[5] = {c.batch, made};
    memcpy(size + 2, transposed ? c.image_size : c.point_size, size_t(n_) * sizeof(i64));
    Tensor out;
    if ((bad = output(out, size, n_ + 2))) return bad;
    if (out.elements() == 0) return nullptr;
    if (c.image_channels == 0 || c.point_channels == 0)
      return fail(format("input has no channels, expected at least 1"));
    c.image = transposed ? Array{} : in.array();
    c.points = transposed ? in.array() : out.array();
    c.grad_image = transposed ? out.array() : Array{};
    c.weight = weight.array(), c.offset = offset.array(), c.mask = mask.array();
    c.bias = bias.array();
    return finish(dispatch(c, -1));
  }

  // The sizes of image and points, and that all positions fit 32 bits, as in kernels/cpu.py.
  ort::Status* sizes(Call& c, const Tensor& in, const i64* pads, const i64* extra) const {
    double values = double(c.batch) * double(c.point_channels + c.image_channels), pixels = 1;
    bool small = true;
    for (i64 v = 0; v < n_; v++) {
      const i64 s = in.size[2 + v], t = c.stride[v], d = c.dilation[v], reach = d * (c.kernel[v] - 1);
      i64 made;
      if (kind_.family == kTranspose) {
        if (extra[v] >= (t > d ? t : d))
          return fail(format("output_padding is %s, expected each value below the larger of stride "
                             "%s and dilation %s on its axis",
                             shown(extra, n_, true).s, shown(c.stride, n_, true).s,
                             shown(c.dilation, n_, true).s));
        made = (s - 1) * t - 2 * c.padding[v] + reach + extra[v] + 1;
        c.image_size[v] = made, c.point_size[v] = s;
      } else {
        const i64 room = s + pads[v] + pads[n_ + v] - reach - 1;
        made = room < 0 ? 0 : room / t + 1;
        c.image_size[v] = s, c.point_size[v] = made;
      }
      values *= double(made < 1 ? 1 : made), pixels *= double(c.image_size[v] + 3);
      small &= c.point_size[v] * t + c.kernel[v] * d + c.padding[v] < 1 << 30;
    }
    const i64* made = kind_.family == kTranspose ? c.image_size : c.point_size;
    for (i64 v = 0; v < n_; v++)
      if (made[v] < 1)
        return fail(format("the output would have size %s, expected at least 1 on every axis",
                           shown(made, n_, true).s));
    if (values > 0x1p60)
      return fail(format("the output would have size %s, which is too large",
                         shown(made, n_, true).s));
    if (!small || pixels >= 0x1p31)
      return fail(format("sizes are too large for positions of 32 bits: image %s, points %s",
                         shown(c.image_size, n_, true).s, shown(c.point_size, n_, true).s));
    return nullptr;
  }

  ort::Status* attend() {
    const Tensor &value = input("value"), &shapes = input("shapes");
    const Tensor &locations = input("locations"), &weights = input("weights");
    if (value.dims != 4)
      return fail(format("value has %lld dimensions, expected 4 (batch, pixels, heads, channels)",
                         ll(value.dims)));
    if (locations.dims != 6)
      return fail(format("locations has %lld dimensions, expected 6 (batch, queries, heads, "
                         "levels, points, axes)",
                         ll(locations.dims)));
    if (weights.dims != 5)
      return fail(format("weights has %lld dimensions, expected 5 (batch, queries, heads, levels, "
                         "points)",
                         ll(weights.dims)));
    const i64 n = locations.size[5];
    if (n < 1 || n > 3)
      return fail(format("locations have %lld coordinates, expected 1 to 3, in the last dimension",
                         ll(n)));
    if (shapes.dims != 2 || shapes.size[1] != n || shapes.size[0] < 1)
      return fail(format("shapes has shape %s, expected [levels, %lld]",
                         shown(shapes.size, shapes.dims).s, ll(n)));
    Attention c = {};
    c.threads = node_.op->threads, c.rank = n, c.batch = value.size[0], c.pixels = value.size[1];
    c.heads = value.size[2], c.queries = locations.size[1], c.points = locations.size[4];
    c.levels = shapes.size[0], c.sizes = reinterpret_cast<const i64*>(shapes.data);
    const i64 channels = value.size[3];
    double total = 0;
    for (i64 level = 0; level < c.levels; level++) {
      double pixels = 1;
      for (i64 v = 0; v < n; v++) {
        const i64 size = c.sizes[level * n + v];
        if (size < 1) return fail(format("shapes are expected to be at least 1 on every axis"));
        pixels *= double(size);
      }
      total += pixels;
    }
    if (double(c.pixels) != total)
      return fail(format("value has %lld pixels, expected %.0f, the sum of all levels'",
                         ll(c.pixels), total));
    const i64 samples[6] = {c.batch, c.queries, c.heads, c.levels, c.points, n};
    for (const Tensor* t : {&locations, &weights})
      if (memcmp(t->size, samples, size_t(t->dims) * sizeof(i64)))
        return fail(format("%s has shape %s, expected %s", t->name, shown(t->size, t->dims).s,
                           shown(samples, t->dims).s));
    c.channels = (channels + 3) / 4 * 4;
    if (c.pixels >= 1 << 30 || c.heads * c.channels > kLargest)
      return fail(format("sizes are too large for positions of 32 bits"));
    const i64 size[3] = {c.batch, c.queries, c.heads * channels};
    Tensor out;
    if (ort::Status* bad = output(out, size, 3)) return bad;
    if (out.elements() == 0) return nullptr;
    const i64 bytes = bytes_of(out.dtype);
    if (c.points == 0) {
      memset(out.data, 0, size_t(out.elements() * bytes));
      return nullptr;
    }
    // The core takes the value in the type that it computes in, and channels by four.
    const bool wide = value.dtype == kFloat64 || locations.dtype == kFloat64 ||
                      weights.dtype == kFloat64;
    const i64 dtype = wide ? kFloat64 : kFloat32, rows = c.batch * c.pixels * c.heads;
    Buffer image, result;
    c.value = value.array(), c.output = out.array();
    if (dtype != value.dtype || c.channels != channels) {
      if (!image.take(rows * c.channels * bytes_of(dtype))) return finish(kNoMemory);
      if (wide)
        copy(value, rows, channels, c.channels, reinterpret_cast<double*>(image.data));
      else
        copy(value, rows, channels, c.channels, reinterpret_cast<float*>(image.data));
      c.value = {image.data, dtype, false};
    }
    const i64 results = c.batch * c.queries * c.heads;
    if (c.channels != channels) {
      if (!result.take(results * c.channels * bytes)) return finish(kNoMemory);
      c.output.data = result.data;
    }
    c.locations = locations.array(), c.weights = weights.array();
    const Status status = dispatch(c, -1);
    if (result.data && status != kNoMemory)
      for (i64 row = 0; row < results; row++)
        memcpy(out.data + row * channels * bytes, result.data + row * c.channels * bytes,
               size_t(channels * bytes));
    return finish(status);
  }

  template <class T>
  static void copy(const Tensor& from, i64 rows, i64 channels, i64 room, T* to) {
    const char* next = from.data;
    for (i64 row = 0; row < rows; row++)
      for (i64 c = 0; c < room; c++, to++) {
        *to = 0;
        if (c >= channels) continue;
        uint16_t bits;
        float single;
        double wide;
        switch (from.dtype) {
          case kFloat64:
            memcpy(&wide, next, 8), *to = T(wide);
            break;
          case kFloat32:
            memcpy(&single, next, 4), *to = T(single);
            break;
          default:
            memcpy(&bits, next, 2);
            *to = T(from.dtype == kFloat16 ? half(bits) : brain_float(bits));
        }
        next += bytes_of(from.dtype);
      }
  }
};

// Whether an attribute is missing, which ONNX Runtime reports as an error.
bool missing(const ort::Api& api, ort::Status* status) {
  if (status) api.release_status(status);
  return status != nullptr;
}

ort::Status* read_ints(const Node& node, const ort::KernelInfo* info, const char* name, Ints& to) {
  const ort::Api& api = *node.api;
  size_t count = 0;
  if (missing(api, api.get_attribute_int64s(info, name, nullptr, &count))) return nullptr;
  if (count > 6)
    return api.create_status(ort::kInvalidArgument,
                             format("%sNd: %s has %lld values, expected one for each axis",
                                    node.op->kind->function, name, ll(i64(count)))
                                 .s);
  to.count = i64(count);
  return count ? api.get_attribute_int64s(info, name, to.values, &count) : nullptr;
}

ort::Status* ORT_CALL create(const ort::CustomOp* op, const ort::Api* api,
                             const ort::KernelInfo* info, void** kernel) {
  Node* node = static_cast<Node*>(malloc(sizeof(Node)));
  if (!node) return api->create_status(ort::kFail, "deformnd: no memory");
  *node = Node{&operator_of(op), api, {}, {}, {}, {}, {}};
  const bool standard = node->op->kind->family == kStandard;
  ort::Status* bad = read_ints(*node, info, standard ? "strides" : "stride", node->stride);
  if (!bad) bad = read_ints(*node, info, standard ? "pads" : "padding", node->padding);
  if (!bad) bad = read_ints(*node, info, standard ? "dilations" : "dilation", node->dilation);
  if (!bad) bad = read_ints(*node, info, "output_padding", node->output_padding);
  if (!bad) bad = read_ints(*node, info, standard ? "kernel_shape" : "kernel_size", node->kernel);
  if (bad) {
    free(node);
    return bad;
  }
  if (missing(*api, api->get_attribute_int64(info, standard ? "group" : "groups", &node->groups)))
    node->groups = 1;
  if (missing(*api, api->get_attribute_int64(info, "offset_group", &node->offset_group)))
    node->offset_group = 1;
  *kernel = node;
  return nullptr;
}

ort::Status* ORT_CALL compute(void* kernel, ort::KernelContext* context) {
  return Run(*static_cast<const Node*>(kernel), context).run();
}

void ORT_CALL destroy(void* kernel) { free(kernel); }

ort::CustomOp table() {
  ort::CustomOp t = {};
  t.version = ort::kVersion;
  t.name = [](const ort::CustomOp* op) { return operator_of(op).called; };
  t.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  t.input_type = [](const ort::CustomOp* op, size_t index) {
    const char letter = operator_of(op).kind->letters[index];
    return letter == 'T' || letter == 't' ? operator_of(op).element
           : letter == 'I'                ? ort::kInt64
                                          : ort::kAny;
  };
  t.input_count = [](const ort::CustomOp* op) { return strlen(operator_of(op).kind->letters); };
  t.output_type = [](const ort::CustomOp* op, size_t) { return operator_of(op).element; };
  t.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  t.destroy = destroy;
  t.input_presence = [](const ort::CustomOp* op, size_t index) {
    return operator_of(op).kind->letters[index] < 'a' ? ort::kRequired : ort::kOptional;
  };
  t.output_presence = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  t.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  for (auto& zero : t.zeros) zero = [](const ort::CustomOp*) { return 0; };
  t.create_kernel = create;
  t.compute = compute;
  t.first_version = [](const ort::CustomOp*) { return 1; };
  t.last_version = [](const ort::CustomOp*) { return INT_MAX; };
  return t;
}

// The operators for sessions with this number of threads. Sessions keep pointers to them, and
// nobody says when the last session ends. So there is one Registration for each number of threads,
// and it stays as long as the process.
struct Registration {
  const ort::Api* api;
  i64 threads;
  Operator operators[kCount];
  ort::Domain *ours, *onnx;
  Registration* next;
};
std::atomic<Registration*> registrations{nullptr};

ort::Status* registration_of(const ort::Api* api, i64 threads, Registration*& found) {
  for (found = registrations; found; found = found->next)
    if (found->api == api && found->threads == threads) return nullptr;
  found = static_cast<Registration*>(calloc(1, sizeof(Registration)));
  if (!found) return api->create_status(ort::kFail, "deformnd: no memory");
  found->api = api, found->threads = threads;
  ort::Status* bad = api->create_custom_op_domain("deformnd", &found->ours);
  if (!bad) bad = api->create_custom_op_domain("", &found->onnx);
  Operator* op = found->operators;
  for (const Kind& kind : kKinds)
    for (int number = 1; number <= (kind.family == kStandard ? 1 : kNames); number++)
      for (ort::Element element : kElements) {
        static_cast<ort::CustomOp&>(*op) = table();
        op->kind = &kind, op->element = element, op->threads = threads;
        const char* pattern = number == 1 ? "%s" : "%s_%d";
        snprintf(op->called, sizeof(op->called), pattern, kind.name, number);
        ort::Domain* domain = kind.family == kStandard ? found->onnx : found->ours;
        if (!bad) bad = api->custom_op_domain_add(domain, op);
        op++;
      }
  if (bad) return bad;
  found->next = registrations;
  while (!registrations.compare_exchange_weak(found->next, found)) {
  }
  return nullptr;
}

// A number from the session's configuration.
i64 entry(const ort::Api& api, const ort::SessionOptions* options, const char* key,
          i64 otherwise) {
  int there = 0;
  char text[24] = "";
  size_t size = sizeof(text);
  if (missing(api, api.has_config_entry(options, key, &there)) || !there) return otherwise;
  if (missing(api, api.get_config_entry(options, key, text, &size))) return otherwise;
  return strtol(text, nullptr, 10);
}

i64 all_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace
}  // namespace deformnd

// ONNX Runtime calls this when it is given the library. It reads two entries of the session's
// configuration: deformnd.threads is how many threads one node may use, and deformnd.override is 0
// to leave the standard DeformConv to ONNX Runtime's own kernel.
EXPORT ort::Status* ORT_CALL RegisterCustomOps(ort::SessionOptions* options,
                                               const ort::ApiBase* base) {
  using namespace deformnd;
  const ort::Api* api = base->get_api(ort::kVersion);
  if (!api)
    return base->get_api(1)->create_status(
        ort::kFail,
        format("deformnd: ONNX Runtime %s is too old, expected 1.19 or newer", base->get_version())
            .s);
  const i64 threads = entry(*api, options, "deformnd.threads", 0);
  Registration* found;
  ort::Status* bad = registration_of(api, threads > 0 ? threads : all_threads(), found);
  if (!bad) bad = api->add_custom_op_domain(options, found->ours);
  if (!bad && entry(*api, options, "deformnd.override", 1))
    bad = api->add_custom_op_domain(options, found->onnx);
  return bad;
}

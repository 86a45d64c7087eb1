// The kernels, compiled once per instruction set with DEFORMND_ISA naming its namespace and
// DEFORMND_BYTES its vector width. No inline function of the standard library is used here: the
// linker keeps one copy of each, perhaps one with instructions that this machine lacks.
//
// Note [layout]
// The image is packed to [image][block][pixel][channel of the block] in the computing type, with
// a border of zeros: one pixel before, one after, and one more after the slowest axis. So a
// sample is one 32-bit pixel index and 2^n weights, without clamping; positions outside point at
// a border cell with weight 0. A block holds channels of one sample group (one offset group and
// one mask group) and one weight group, filled up with zeros to full vectors.
//
// Note [depthwise]
// Where each weight group is one channel in, one channel out, the products would use one lane. So
// a block counts as a weight group, and scale() and the like take the place of the products.
//
// Note [order]
// Columns, the products' inner dimension, are ordered by unit = (block, kernel point), then by
// the channel in the block. Every sum runs in an order that depends on the sizes alone, not on
// the number of threads; the one exception stands at `bands` in Reverse.

#include <string.h>

#include "core.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if DEFORMND_BYTES == 64 && (defined(__clang__) || defined(__GNUC__))
#define DEFORMND_PAIRS  // see Note [pairs]
#include <immintrin.h>
#endif
#ifdef DEFORMND_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

// Note [pairs]
// Where image and weight are bfloat16 and the machine multiplies those, Gather rounds its columns
// to bfloat16. A pair of columns, and a pair of rows of the weight, then lie in one 32-bit word
// each, in place of the first of them, so the steps between rows stay what they were. Those
// instructions take subnormal numbers for zero.

namespace deformnd {
namespace DEFORMND_ISA {

#include "lanes.h"

template <class T>
struct Machine {
  static constexpr int natural = DEFORMND_BYTES / int(sizeof(T));
  static constexpr int lanes = natural < 4 ? 4 : natural;
#if DEFORMND_BYTES == 64
  static constexpr int rows = 14;  // of a micro-kernel: 14 x 2 vectors of sums in 32 registers
#elif defined(__aarch64__)
  static constexpr int rows = natural < 4 ? 5 : 10;
#else
  static constexpr int rows = natural < 4 ? 3 : 6;  // 6 x 2 in 16 registers
#endif
};

constexpr i64 kTilePixels = 112;  // 8 micro-kernels of 14 rows: about 256 KB of columns
constexpr i64 kTileWidth = 32;
constexpr i64 kWideTile = 320;  // where coordinates dominate, long rows of offsets
constexpr i64 kColumns = 576;   // of one product
constexpr i64 kPiece = 512;     // most pixels that a layout change or conversion handles at once
constexpr i64 kFlightBytes = 32 << 20;  // of packed images at a time, where one is smaller

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
inline i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return divide_up(a, b) * b; }
inline i64 gcd(i64 a, i64 b) { return b ? gcd(b, a % b) : a; }
inline i64 lcm(i64 a, i64 b) { return a / gcd(a, b) * b; }

// Run body(task, thread) for all tasks.
template <class Body>
void parallel([[maybe_unused]] i64 threads, i64 tasks, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
#pragma omp parallel num_threads(int(least(threads, tasks)))
    {
      const i64 thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (i64 task = 0; task < tasks; task++) body(task, thread);
    }
    return;
  }
#endif
  for (i64 task = 0; task < tasks; task++) body(task, i64(0));
}

// Deals out parts of the workspace; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class U>
  U* take(i64 count) {
    U* part = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(U) + 63) / 64 * 64;
#ifdef DEFORMND_SANITIZE
    if (base) __asan_poison_memory_region(base + used, 64);  // until workspace_give
    used += 64;
#endif
    return part;
  }
};

inline float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// Branch-free, so that the compiler makes vectors of them.
inline float from_half(uint16_t h) {
  const uint32_t exponent_mantissa = uint32_t(h & 0x7fff) << 13;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  const float scaled = from_bits(exponent_mantissa) * from_bits(0x77800000u);  // 2^112
  return from_bits((to_bits(scaled) | special) | uint32_t(h & 0x8000) << 16);
}

inline uint16_t to_half(float f) {
  const uint32_t bits = to_bits(f), sign = bits & 0x80000000u, a = bits ^ sign;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t tiny = to_bits(from_bits(a) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1)) >> 13;
  const uint32_t value = a >= 0x47800000u ? special : a < 0x38800000u ? tiny : normal;
  return uint16_t(value | sign >> 16);
}

inline float from_bfloat(uint16_t b) { return from_bits(uint32_t(b) << 16); }

inline uint16_t to_bfloat(float f) {
  const uint32_t bits = to_bits(f);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000u ? (bits >> 16 | 64) : rounded);
}

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr i64 value = kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr i64 value = kFloat64;
};

inline i64 bytes_of(i64 dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

template <class T>
NOINLINE void read(const Array& a, i64 at, i64 n, T* RESTRICT to) {
  const char* from = a.data + at * bytes_of(a.dtype);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  if (a.dtype == DtypeOf<T>::value)
    memcpy(to, from, size_t(n) * sizeof(T));
  else if (a.dtype == kFloat16)
    for (i64 i = 0; i < n; i++) to[i] = T(from_half(halves[i]));
  else if (a.dtype == kBFloat16)
    for (i64 i = 0; i < n; i++) to[i] = T(from_bfloat(halves[i]));
  else if (a.dtype == kFloat32)
    for (i64 i = 0; i < n; i++) to[i] = T(reinterpret_cast<const float*>(from)[i]);
  else
    for (i64 i = 0; i < n; i++) to[i] = T(reinterpret_cast<const double*>(from)[i]);
}

template <class T>
NOINLINE void write(const Array& a, i64 at, i64 n, const T* RESTRICT from) {
  char* to = a.data + at * bytes_of(a.dtype);
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  if (a.dtype == DtypeOf<T>::value)
    memcpy(to, from, size_t(n) * sizeof(T));
  else if (a.dtype == kFloat16)
    for (i64 i = 0; i < n; i++) halves[i] = to_half(float(from[i]));
  else if (a.dtype == kBFloat16)
    for (i64 i = 0; i < n; i++) halves[i] = to_bfloat(float(from[i]));
  else if (a.dtype == kFloat32)
    for (i64 i = 0; i < n; i++) reinterpret_cast<float*>(to)[i] = float(from[i]);
  else
    for (i64 i = 0; i < n; i++) reinterpret_cast<double*>(to)[i] = double(from[i]);
}

// Elements [at, at + n): in place where the type fits, else converted into scratch.
template <class T>
inline const T* view(const Array& a, i64 at, i64 n, T* scratch) {
  if (a.dtype == DtypeOf<T>::value) return reinterpret_cast<const T*>(a.data) + at;
  read(a, at, n, scratch);
  return scratch;
}

// to[r * to_step + c] = from[c * from_step + r] for r < rows, c < columns
template <class T, int N>
inline void transpose_by(const T* from, i64 from_step, T* to, i64 to_step, i64 rows, i64 columns) {
  using L = Lanes<T, N>;
  i64 r = 0;
  for (; r + N <= rows; r += N) {
    i64 c = 0;
    for (; c + N <= columns; c += N) {
      typename L::V a[N];
      UNROLL
      for (int i = 0; i < N; i++) a[i] = L::load(from + (c + i) * from_step + r);
      L::template transpose<N>(a);
      UNROLL
      for (int i = 0; i < N; i++) L::store(to + (r + i) * to_step + c, a[i]);
    }
    if (c == columns) continue;
    if constexpr (N > 4)
      transpose_by<T, 4>(from + c * from_step + r, from_step, to + r * to_step + c, to_step, N,
                         columns - c);
    else
      for (; c < columns; c++)
        for (i64 i = 0; i < N; i++) to[(r + i) * to_step + c] = from[c * from_step + r + i];
  }
  if (r == rows) return;
  if constexpr (N > 4)
    transpose_by<T, 4>(from + r, from_step, to + r * to_step, to_step, rows - r, columns);
  else
    for (; r < rows; r++)
      for (i64 c = 0; c < columns; c++) to[r * to_step + c] = from[c * from_step + r];
}

template <class T>
NOINLINE void transpose(const T* from, i64 from_step, T* to, i64 to_step, i64 rows, i64 columns) {
  transpose_by<T, Machine<T>::lanes>(from, from_step, to, to_step, rows, columns);
}

// A tensor [image][channels][pixels], channels first or last.
template <class T>
struct Field {
  Array array;
  i64 channels, pixels;

  static constexpr i64 scratch_size = 64 * kPiece;

  i64 at(i64 image, i64 channel, i64 pixel) const {
    return array.last ? (image * pixels + pixel) * channels + channel
                      : (image * channels + channel) * pixels + pixel;
  }

  // to[p * step + c]; n <= kPiece pixels
  void load(i64 image, i64 channel, i64 count, i64 pixel, i64 n, T* to, i64 step,
            T* scratch) const {
    if (array.last) {
      for (i64 p = 0; p < n; p++) read(array, at(image, channel, pixel + p), count, to + p * step);
      return;
    }
    if (array.dtype == DtypeOf<T>::value) {
      const T* from = reinterpret_cast<const T*>(array.data) + at(image, channel, pixel);
      transpose(from, pixels, to, step, n, count);
      return;
    }
    for (i64 c0 = 0; c0 < count; c0 += 64) {
      const i64 some = least(64, count - c0);
      for (i64 c = 0; c < some; c++)
        read(array, at(image, channel + c0 + c, pixel), n, scratch + c * n);
      transpose(scratch, n, to + c0, step, n, some);
    }
  }

  // from[p * step + c]; n <= kPiece pixels
  void store(i64 image, i64 channel, i64 count, i64 pixel, i64 n, const T* from, i64 step,
             T* scratch) const {
    if (array.last) {
      for (i64 p = 0; p < n; p++)
        write(array, at(image, channel, pixel + p), count, from + p * step);
      return;
    }
    if (array.dtype == DtypeOf<T>::value) {
      T* to = reinterpret_cast<T*>(array.data) + at(image, channel, pixel);
      transpose(from, step, to, pixels, count, n);
      return;
    }
    for (i64 c0 = 0; c0 < count; c0 += 64) {
      const i64 some = least(64, count - c0);
      transpose(from + c0, step, scratch, n, some, n);
      for (i64 c = 0; c < some; c++)
        write(array, at(image, channel + c0 + c, pixel), n, scratch + c * n);
    }
  }
};

// C[R, NV vectors] += A[R, inner] B[inner, NV vectors]; the rows of B follow one another.
// A(i, k) lies at i * a_step + k, or at k * a_step + i where it is Transposed.
template <class T, int R, int NV, bool Transposed>
NOINLINE void micro_kernel(i64 inner, const T* RESTRICT a, i64 a_step, const T* RESTRICT b,
                           T* RESTRICT c, i64 c_step, bool accumulate) {
  using L = Lanes<T, Machine<T>::lanes>;
  typename L::V sums[R][NV];
  UNROLL
  for (int i = 0; i < R; i++) {
    UNROLL
    for (int j = 0; j < NV; j++)
      sums[i][j] = accumulate ? L::load(c + i * c_step + j * L::size) : L::zero();
  }
  for (i64 k = 0; k < inner; k++) {
    typename L::V row[NV];
    UNROLL
    for (int j = 0; j < NV; j++) row[j] = L::load(b + (k * NV + j) * L::size);
    UNROLL
    for (int i = 0; i < R; i++) {
      const typename L::V s = L::splat(Transposed ? a[k * a_step + i] : a[i * a_step + k]);
      UNROLL
      for (int j = 0; j < NV; j++) sums[i][j] = sums[i][j] + s * row[j];
    }
  }
  UNROLL
  for (int i = 0; i < R; i++) {
    UNROLL
    for (int j = 0; j < NV; j++) L::store(c + i * c_step + j * L::size, sums[i][j]);
  }
}

#ifdef DEFORMND_PAIRS
// The same for pairs of bfloat16 in words, which float stands for; `inner` counts pairs.
template <int R, int NV>
__attribute__((target("avx512bf16"))) NOINLINE void pair_kernel(i64 inner, const float* RESTRICT a,
                                                                i64 a_step,
                                                                const float* RESTRICT b,
                                                                float* RESTRICT c, i64 c_step,
                                                                bool accumulate) {
  __m512 sums[R][NV];
  UNROLL
  for (int i = 0; i < R; i++) {
    UNROLL
    for (int j = 0; j < NV; j++)
      sums[i][j] = accumulate ? _mm512_loadu_ps(c + i * c_step + j * 16) : _mm512_setzero_ps();
  }
  for (i64 k = 0; k < inner; k++) {
    __m512bh row[NV];
    UNROLL
    for (int j = 0; j < NV; j++) row[j] = (__m512bh)_mm512_loadu_ps(b + (k * NV + j) * 16);
    UNROLL
    for (int i = 0; i < R; i++) {
      const __m512bh s = (__m512bh)_mm512_set1_ps(a[i * a_step + k]);
      UNROLL
      for (int j = 0; j < NV; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], s, row[j]);
    }
  }
  UNROLL
  for (int i = 0; i < R; i++) {
    UNROLL
    for (int j = 0; j < NV; j++) _mm512_storeu_ps(c + i * c_step + j * 16, sums[i][j]);
  }
}

// rows[r * step + k] = the pair of what were the columns 2 k and 2 k + 1 there
__attribute__((target("avx512bf16"))) void pair_columns(i64 rows, i64 columns, float* a, i64 step) {
  for (i64 r = 0; r < rows; r++) {
    float* row = a + r * step;
    i64 c = 0;
    for (; c + 32 <= columns; c += 32) {
      const __m512bh pairs =
          _mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + c + 16), _mm512_loadu_ps(row + c));
      _mm512_storeu_ps(row + c / 2, (__m512)pairs);
    }
    for (; c < columns; c += 4) {
      const __m128bh pairs = _mm_cvtneps_pbh(_mm_loadu_ps(row + c));
      memcpy(row + c / 2, &pairs, 8);
    }
  }
}

// b[k * width + i] = the pair of what was b[2 k * width + i] and b[(2 k + 1) * width + i], of
// values that bfloat16 holds
void pair_rows(i64 rows, i64 width, float* b) {
  for (i64 k = 0; k < rows / 2; k++)
    for (i64 i = 0; i < width; i++)
      b[k * width + i] = from_bits(to_bits(b[2 * k * width + i]) >> 16 |
                                   to_bits(b[(2 * k + 1) * width + i]));
}
#else
void pair_columns(i64, i64, void*, i64) {}
void pair_rows(i64, i64, void*) {}
#endif

// How A lies in a product: in rows, in columns, or in rows of pairs.
enum Form { kInRows, kInColumns, kInPairs };

template <class T>
using MicroKernel = void (*)(i64, const T*, i64, const T*, T*, i64, bool);

template <class T, int R, int NV, Form A>
constexpr MicroKernel<T> micro_kernel_of() {
#ifdef DEFORMND_PAIRS
  if constexpr (A == kInPairs && sizeof(T) == 4) return pair_kernel<R, NV>;
#endif
  return micro_kernel<T, R, NV, A == kInColumns>;
}

template <class T, int NV, Form A, int... R>
MicroKernel<T> micro_kernel_of(i64 rows, Seq<R...>) {
  static constexpr MicroKernel<T> table[] = {micro_kernel_of<T, R + 1, NV, A>()...};
  return table[rows - 1];
}

// C[rows, panels] (+)= A B, with B in panels of NV vectors. RowsOutside: the loop over rows is
// the outer one, for few panels that stay in the cache.
template <class T, int NV, Form A, bool RowsOutside>
void multiply_by(i64 rows, i64 panels, i64 inner, const T* a, i64 a_step, const T* b, i64 b_panel,
                 T* c, i64 c_step, bool accumulate) {
  constexpr int height = Machine<T>::rows;
  constexpr i64 width = NV * Machine<T>::lanes;
  using All = typename MakeSeq<height>::type;
  const i64 strips = divide_up(rows, height);
  const auto one = [&](i64 strip, i64 panel) {
    const i64 row = strip * height;
    const MicroKernel<T> kernel =
        micro_kernel_of<T, NV, A>(least(height, rows - row), All{});
    kernel(inner, a + (A == kInColumns ? row : row * a_step), a_step, b + panel * b_panel,
           c + row * c_step + panel * width, c_step, accumulate);
  };
  if (RowsOutside)
    for (i64 i = 0; i < strips; i++)
      for (i64 j = 0; j < panels; j++) one(i, j);
  else
    for (i64 j = 0; j < panels; j++)
      for (i64 i = 0; i < strips; i++) one(i, j);
}

template <class T, Form A, bool RowsOutside>
void multiply(int vectors, i64 rows, i64 panels, i64 inner, const T* a, i64 a_step, const T* b,
              i64 b_panel, T* c, i64 c_step, bool accumulate) {
  if (vectors == 1)
    multiply_by<T, 1, A, RowsOutside>(rows, panels, inner, a, a_step, b, b_panel, c,
                                               c_step, accumulate);
  else
    multiply_by<T, 2, A, RowsOutside>(rows, panels, inner, a, a_step, b, b_panel, c,
                                               c_step, accumulate);
}

// For Note [depthwise], with `width` channels:
// c[row][channel] += sum over k of a[row][k * width + channel] b[k][channel]
template <class T>
NOINLINE void add_scaled(i64 rows, i64 width, i64 inner, const T* RESTRICT a, i64 a_step,
                         const T* RESTRICT b, T* RESTRICT c) {
  for (i64 m = 0; m < rows; m++)
    for (i64 k = 0; k < inner; k++)
      for (i64 i = 0; i < width; i++)
        c[m * width + i] += a[m * a_step + k * width + i] * b[k * width + i];
}

// a[row][k * width + channel] = c[row][channel] b[k][channel]
template <class T>
NOINLINE void scale(i64 rows, i64 width, i64 inner, T* RESTRICT a, i64 a_step, const T* RESTRICT b,
                    const T* RESTRICT c) {
  for (i64 m = 0; m < rows; m++)
    for (i64 k = 0; k < inner; k++)
      for (i64 i = 0; i < width; i++)
        a[m * a_step + k * width + i] = c[m * width + i] * b[k * width + i];
}

// b[k][channel] += sum over rows of a[row][k * width + channel] c[row][channel]
template <class T>
NOINLINE void add_products(i64 rows, i64 width, i64 inner, const T* RESTRICT a, i64 a_step,
                           T* RESTRICT b, const T* RESTRICT c) {
  for (i64 m = 0; m < rows; m++)
    for (i64 k = 0; k < inner; k++)
      for (i64 i = 0; i < width; i++)
        b[k * width + i] += a[m * a_step + k * width + i] * c[m * width + i];
}

enum Work { kColumnsWork = 1, kDotsWork = 2, kSpreadWork = 4 };

// The samples of one unit: all pixels of a tile at one kernel point, in one block.
template <class T>
struct Samples {
  i64 count;
  const T* image;    // the packed block
  T* grad_image;     // likewise
  const i64* steps;  // from the first corner of a cell to each, in elements
  const i32* index;  // [count] first corner
  const T* weight;   // [count][corner] interpolation weight times mask
  const T* grad_column;  // [count][column_step]
  T* column;             // likewise
  i64 column_step;
  T* dots;  // [count][corner, at least 4] sums of grad_column times corner
};

template <class T>
using Sampler = void (*)(const Samples<T>&);

// kColumnsWork interpolates, kSpreadWork is its adjoint into grad_image, kDotsWork sums what the
// derivatives by position and mask are made of. One pass, since all touch the same corners. A
// block has NC vectors of N lanes. (Two corners in one vector, where they fit, halve the
// instructions but not the time, and a store that overlaps the next load doubles it.)
template <class T, int ND, int N, int NC, int Mode>
NOINLINE void sample(const Samples<T>& s) {
  using L = Lanes<T, N>;
  using V = typename L::V;
  constexpr int Q = 1 << ND, Dots = Q < 4 ? 4 : Q;
  // In registers: a store could change what s refers to.
  const i64 count = s.count, column_step = s.column_step;
  const T *RESTRICT image = s.image, *RESTRICT weights = s.weight;
  const T* RESTRICT grad_column = s.grad_column;
  const i32* RESTRICT index = s.index;
  T *RESTRICT grad_image = s.grad_image, *RESTRICT column = s.column, *RESTRICT sums = s.dots;
  i64 steps[Q];
  UNROLL
  for (int c = 0; c < Q; c++) steps[c] = s.steps[c];
  for (i64 m = 0; m < count; m++) {
    const i64 at = i64(index[m]) * (N * NC);
    V weight[Q], dots[Dots];
    UNROLL
    for (int c = 0; c < Q; c++) weight[c] = L::splat(weights[m * Q + c]);
    if (Mode & kDotsWork) {
      UNROLL
      for (int c = 0; c < Dots; c++) dots[c] = L::zero();
    }
    UNROLL
    for (int v = 0; v < NC; v++) {
      const i64 first = at + v * N;
      V value = L::zero(), grad = L::zero();
      if (Mode & (kDotsWork | kSpreadWork)) grad = L::load(grad_column + v * N);
      UNROLL
      for (int c = 0; c < Q; c++) {
        if (Mode & (kColumnsWork | kDotsWork)) {
          const V x = L::load(image + first + steps[c]);
          if (Mode & kColumnsWork) value = c == 0 ? weight[c] * x : value + weight[c] * x;
          if (Mode & kDotsWork) dots[c] = dots[c] + grad * x;
        }
        if (Mode & kSpreadWork) {
          T* to = grad_image + first + steps[c];
          L::store(to, L::load(to) + weight[c] * grad);
        }
      }
      if (Mode & kColumnsWork) L::store(column + v * N, value);
    }
    if (Mode & kColumnsWork) column += column_step;
    if (Mode & (kDotsWork | kSpreadWork)) grad_column += column_step;
    if (Mode & kDotsWork) {
      UNROLL
      for (int c = 0; c < Dots; c += 4, sums += 4) {
        using F = Lanes<T, 4>;
        F::store(sums, F::load(sums) + L::sum4(dots[c], dots[c + 1], dots[c + 2], dots[c + 3]));
      }
    }
  }
}

template <class T, int ND, int Mode>
Sampler<T> sampler_of(int lanes, int vectors) {
  constexpr int N = Machine<T>::lanes;
  if (lanes == N)
    return vectors == 4   ? sample<T, ND, N, 4, Mode>
           : vectors == 2 ? sample<T, ND, N, 2, Mode>
                          : sample<T, ND, N, 1, Mode>;
  if constexpr (N > 8)
    if (lanes == 8) return sample<T, ND, 8, 1, Mode>;
  return sample<T, ND, 4, 1, Mode>;
}

template <class T, int ND>
Sampler<T> sampler_of(int mode, int lanes, int vectors) {
  switch (mode) {
    case 1: return sampler_of<T, ND, 1>(lanes, vectors);
    case 2: return sampler_of<T, ND, 2>(lanes, vectors);
    case 3: return sampler_of<T, ND, 3>(lanes, vectors);
    case 4: return sampler_of<T, ND, 4>(lanes, vectors);
    case 5: return sampler_of<T, ND, 5>(lanes, vectors);
    case 6: return sampler_of<T, ND, 6>(lanes, vectors);
    default: return sampler_of<T, ND, 7>(lanes, vectors);
  }
}

// Units [unit, unit + count) of one weight group, for one product.
struct Chunk {
  i64 unit, count, group;
  i64 panels;   // of its columns, where they are the product's columns (Reverse)
  i64 weights;  // where its packed weights begin (Reverse)
};

// A tile of output pixels: `segments` runs of `length` consecutive pixels, or one run of whole
// rows.
struct Tile {
  i64 image, first;  // pixel
  i64 row, column, rows, columns;
  i64 segments, length, step;  // step: pixels between the starts of two segments
  i64 count;
};

template <class T, int ND>
struct Plan {
  static constexpr int Q = 1 << ND, Dots = Q < 4 ? 4 : Q;
  static constexpr int N = Machine<T>::lanes;

  const Call& call;
  i64 batch, image_channels, point_channels, groups, offset_groups, mask_groups;
  i64 image_size[ND], point_size[ND], kernel[ND], stride[ND], padding[ND], dilation[ND];
  i64 threads;
  bool depthwise;
  i64 K, P, pixels;       // kernel points, point positions, image pixels
  i64 padded[ND], plane;  // sizes and pixels of a packed plane
  i64 sample_groups;      // one offset group and one mask group each
  i64 runs, run;          // runs of channels of one sample group and one weight group
  int lanes, vectors;     // of a block
  i64 block, blocks_per_run, blocks;
  i64 group_points, group_channels;  // channels of a weight group
  int panel_vectors;
  i64 panel, panels, group_width;  // the points of a weight group in panels
  i64 tile_rows, tile_columns, row_tiles, column_tiles, tiles, tile_pixels, table;
  i64 steps[Q];

  Plan(const Call& c, int widest, i64 parts) : call(c) {
    batch = c.batch, image_channels = c.image_channels, point_channels = c.point_channels;
    groups = c.groups, offset_groups = c.offset_groups, mask_groups = c.mask_groups;
    K = P = pixels = plane = 1;
    for (int v = 0; v < ND; v++) {
      image_size[v] = c.image_size[v], point_size[v] = c.point_size[v], kernel[v] = c.kernel[v];
      stride[v] = c.stride[v], padding[v] = c.padding[v], dilation[v] = c.dilation[v];
      padded[v] = image_size[v] + (v == 0 ? 3 : 2);
      K *= kernel[v], P *= point_size[v], pixels *= image_size[v], plane *= padded[v];
    }
    sample_groups = lcm(most(offset_groups, 1), most(mask_groups, 1));
    depthwise = groups > 1 && groups == image_channels && groups == point_channels;
    if (depthwise) groups = 1;
    runs = lcm(sample_groups, groups), run = image_channels / runs;
    lanes = run > 8 || N <= 4 ? N : run <= 4 ? 4 : least(8, N);
    const i64 run_vectors = divide_up(run, lanes);
    vectors = 1;
    if (lanes == N)
      for (int f = widest; f > 1; f /= 2)
        if (run_vectors % f == 0 && runs * run_vectors / f >= parts) {
          vectors = f;
          break;
        }
    block = lanes * vectors, blocks_per_run = run_vectors / vectors;
    blocks = runs * blocks_per_run;
    if (depthwise) groups = blocks;
    group_points = depthwise ? block : point_channels / groups;
    group_channels = depthwise ? 1 : image_channels / groups;
    panel_vectors = group_points <= N ? 1 : 2;
    panel = depthwise ? block : panel_vectors * N;
    panels = divide_up(group_points, panel);
    group_width = panels * panel;

    const i64 width = point_size[ND - 1], rows = P / width;
    const i64 wanted = block <= 8 ? kWideTile : most(kTileWidth, kTilePixels / rows);
    tile_columns = divide_up(width, divide_up(width, least(wanted, width)));
    tile_rows = most(1, least(rows, (kTilePixels + tile_columns / 2) / tile_columns));
    row_tiles = divide_up(rows, tile_rows), column_tiles = divide_up(width, tile_columns);
    tiles = row_tiles * column_tiles, tile_pixels = tile_rows * tile_columns;
    table = round_up(tile_pixels, N) + N;

    for (int q = 0; q < Q; q++) {
      steps[q] = 0;
      for (int v = 0; v < ND; v++)
        if (q >> (ND - 1 - v) & 1) steps[q] += axis_step(v) * block;
    }
    // A thread wants about 20 microseconds of work, ten times what waking it costs.
    const double work = double(batch) * P * K * image_channels * (group_points + 16);
    const double worth = c.exactly ? double(c.threads) : work / 2e6;
    threads = worth < double(c.threads) ? most(1, i64(worth)) : c.threads;
  }

  i64 axis_step(int axis) const {
    i64 step = 1;
    for (int v = axis + 1; v < ND; v++) step *= padded[v];
    return step;
  }
  i64 outside() const { return (image_size[0] + 1) * axis_step(0); }
  i64 image_bytes() const { return blocks * plane * block * i64(sizeof(T)); }
  i64 units() const { return blocks * K; }
  i64 blocks_per_sample_group() const { return blocks / sample_groups; }
  i64 sample_group(i64 b) const { return b / blocks_per_sample_group(); }
  i64 offset_group(i64 s) const { return s * offset_groups / sample_groups; }
  i64 mask_group(i64 s) const { return s * mask_groups / sample_groups; }
  i64 channel(i64 b) const { return b / blocks_per_run * run + b % blocks_per_run * block; }
  i64 block_channels(i64 b) const { return least(block, run - b % blocks_per_run * block); }

  i64 group_point(i64 group) const { return depthwise ? channel(group) : group * group_points; }
  i64 points_in(i64 group) const { return depthwise ? block_channels(group) : group_points; }

  i64 units_per_chunk(i64 units_together, i64 alignment) const {
    const i64 align = most(1, alignment / block);
    const i64 count = most(1, (units_together * block + kColumns / 2) / kColumns);
    return round_up(divide_up(units_together, count), align);
  }

  Tile tile(i64 image, i64 t) const {
    const i64 width = point_size[ND - 1];
    Tile x;
    x.image = image;
    x.row = t / column_tiles * tile_rows, x.column = t % column_tiles * tile_columns;
    x.rows = least(tile_rows, P / width - x.row);
    x.columns = least(tile_columns, width - x.column);
    x.first = x.row * width + x.column;
    x.count = x.rows * x.columns;
    const bool whole = x.columns == width && x.count <= kPiece;
    x.segments = whole ? 1 : x.rows, x.length = whole ? x.count : x.columns, x.step = width;
    return x;
  }
};

// The blocks [from, to) cut into chunks; returns how many, and adds up what they need.
template <class T, int ND>
i64 cut(const Plan<T, ND>& p, i64 from, i64 to, Chunk* chunks, i64* weights, i64* widest) {
  const i64 group_blocks = p.blocks / p.groups;
  i64 n = 0;
  for (i64 b = from; b < to;) {
    const i64 group = b / group_blocks, end = least(to, (group + 1) * group_blocks);
    const i64 size = p.units_per_chunk((end - b) * p.K, 2 * p.N);
    for (i64 u = b * p.K; u < end * p.K; u += size) {
      const i64 count = least(size, end * p.K - u);
      const i64 panels = divide_up(count * p.block, 2 * p.N);
      if (chunks) chunks[n] = {u, count, group, panels, p.depthwise ? u * p.block : *weights};
      *weights += panels * 2 * p.N * p.group_points;
      *widest = most(*widest, panels * 2 * p.N);
      n++;
    }
    b = end;
  }
  return n;
}

template <class T, int ND>
void pack_image(const Plan<T, ND>& p, i64 first, i64 images, T* packed, T* scratch,
                i64 scratch_size) {
  const Field<T> image{p.call.image, p.image_channels, p.pixels};
  const i64 width = p.image_size[ND - 1], padded = p.padded[ND - 1], rows = p.plane / padded;
  parallel(p.threads, images * p.blocks * rows, [&](i64 task, i64 thread) {
    const i64 n = task / rows / p.blocks, b = task / rows % p.blocks;
    T* to = packed + task * padded * p.block;
    i64 rest = task % rows, row = 0, step = 1;
    bool inside = true;
    for (int v = ND - 2; v >= 0; v--) {
      const i64 at = rest % p.padded[v] - 1;
      rest /= p.padded[v];
      inside = inside && at >= 0 && at < p.image_size[v];
      row += at * step, step *= p.image_size[v];
    }
    const i64 count = p.block_channels(b);
    if (!inside || count < p.block) memset(to, 0, size_t(padded * p.block) * sizeof(T));
    if (!inside) return;
    memset(to, 0, size_t(p.block) * sizeof(T));
    memset(to + (width + 1) * p.block, 0, size_t((padded - width - 1) * p.block) * sizeof(T));
    for (i64 x = 0; x < width; x += kPiece)
      image.load(first + n, p.channel(b), count, row * width + x, least(kPiece, width - x),
                 to + (x + 1) * p.block, p.block, scratch + thread * scratch_size);
  });
}

// Weights of one point channel and one block as [kernel point][channel], zeros in the padding.
template <class T, int ND>
void load_weight(const Plan<T, ND>& p, i64 point, i64 b, T* to, T* scratch) {
  const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
  const i64 at = (point * p.group_channels + channel) * p.K;
  if (count < p.block) memset(to, 0, size_t(p.K * p.block) * sizeof(T));
  transpose(view(p.call.weight, at, count * p.K, scratch), p.K, to, p.block, p.K, count);
}

// For Note [depthwise]: [unit][channel of the block]
template <class T, int ND>
void pack_weight_by_channel(const Plan<T, ND>& p, T* packed, T* scratch, i64 scratch_size) {
  parallel(p.threads, p.blocks, [&](i64 b, i64 thread) {
    const i64 count = p.block_channels(b);
    T* to = packed + b * p.K * p.block;
    if (count < p.block) memset(to, 0, size_t(p.K * p.block) * sizeof(T));
    const T* from =
        view(p.call.weight, p.channel(b) * p.K, count * p.K, scratch + thread * scratch_size);
    transpose(from, p.K, to, p.block, p.K, count);
  });
}

// For Gather: [group][panel of points][column of the group][point of the panel]
template <class T, int ND>
void pack_weight_by_point(const Plan<T, ND>& p, T* packed, T* scratch, i64 scratch_size) {
  const i64 size = p.K * p.block, group_blocks = p.blocks / p.groups;
  parallel(p.threads, p.groups * p.panels * group_blocks, [&](i64 task, i64 thread) {
    const i64 b = task % group_blocks, j = task / group_blocks % p.panels;
    const i64 group = task / group_blocks / p.panels;
    T* rows = scratch + thread * scratch_size;
    T* spare = rows + p.panel * size;
    for (i64 i = 0; i < p.panel; i++) {
      const i64 point = j * p.panel + i;
      if (point < p.group_points)
        load_weight(p, group * p.group_points + point, group * group_blocks + b, rows + i * size,
                    spare);
      else
        memset(rows + i * size, 0, size_t(size) * sizeof(T));
    }
    transpose(rows, size, packed + task * size * p.panel, p.panel, size, p.panel);
  });
}

// For Reverse: [chunk][panel of columns][point of the group][column of the panel]
template <class T, int ND>
void pack_weight_by_column(const Plan<T, ND>& p, const Chunk* chunks, i64 count, T* packed,
                           T* scratch, i64 scratch_size) {
  const i64 width = 2 * p.N, group_blocks = p.blocks / p.groups;
  parallel(p.threads, p.blocks * p.group_points, [&](i64 task, i64 thread) {
    const i64 b = task / p.group_points, o = task % p.group_points;
    T* columns = scratch + thread * scratch_size;
    load_weight(p, b / group_blocks * p.group_points + o, b, columns, columns + p.K * p.block);
    i64 low = 0, high = count;  // the chunk of the block's first unit
    while (high - low > 1) {
      const i64 middle = (low + high) / 2;
      (chunks[middle].unit <= b * p.K ? low : high) = middle;
    }
    for (i64 unit = b * p.K, end = unit + p.K; unit < end; low++) {
      const Chunk& chunk = chunks[low];
      const i64 stop = least(end, chunk.unit + chunk.count);
      i64 column = (unit - chunk.unit) * p.block;
      const i64 column_end = (stop - chunk.unit) * p.block;
      const bool last = stop == chunk.unit + chunk.count;
      const T* from = columns + (unit - b * p.K) * p.block;
      while (column < column_end) {
        const i64 j = column / width, some = least(column_end, (j + 1) * width) - column;
        T* to = packed + chunk.weights + (j * p.group_points + o) * width + column % width;
        memcpy(to, from, size_t(some) * sizeof(T));
        column += some, from += some, to += some;
        if (last && column == column_end)
          memset(to, 0, size_t((j + 1) * width - column) * sizeof(T));
      }
      unit = stop;
    }
  });
}

// Where the samples of a tile lie, for `slots` kernel points of one sample group.
template <class T, int ND>
struct Cells {
  T* base;      // [axis][table] position without kernel point and offset
  i32* index;   // [slot][table]
  T* weight;    // [slot][table][corner] interpolation weight times mask
  T* fraction;  // [slot][axis][table], for Reverse only
  T* mask;      // [slot][table], likewise
  T* spare;     // [axis + 1][kPiece + lanes]

  Cells(Carver& carver, const Plan<T, ND>& p, i64 slots, bool reverse) {
    base = carver.take<T>(ND * p.table);
    index = carver.take<i32>(slots * p.table);
    weight = carver.take<T>(slots * p.Q * p.table);
    fraction = carver.take<T>(reverse ? slots * ND * p.table : 0);
    mask = carver.take<T>(reverse ? slots * p.table : 0);
    spare = carver.take<T>((ND + 1) * (kPiece + p.N));
  }

  void place(const Plan<T, ND>& p, const Tile& tile) {
    for (i64 r = 0; r < tile.rows; r++) {
      i64 rest = tile.row + r;
      for (int v = ND - 2; v >= 0; v--) {
        const T at = T(rest % p.point_size[v] * p.stride[v] - p.padding[v]);
        rest /= p.point_size[v];
        for (i64 c = 0; c < tile.columns; c++) base[v * p.table + r * tile.columns + c] = at;
      }
      for (i64 c = 0; c < tile.columns; c++)
        base[(ND - 1) * p.table + r * tile.columns + c] =
            T((tile.column + c) * p.stride[ND - 1] - p.padding[ND - 1]);
    }
    for (int v = 0; v < ND; v++)
      for (i64 m = tile.count; m < least(p.table, tile.count + p.N); m++) base[v * p.table + m] = 0;
  }

  template <bool Reverse>
  void find(const Plan<T, ND>& p, const Tile& tile, i64 sample_group, i64 k, i64 slot) {
    using L = Lanes<T, Plan<T, ND>::N>;
    using V = typename L::V;
    using I = typename L::I;
    using M = typename L::M;
    constexpr int N = L::size, Q = 1 << ND;
    T shift[ND];
    i64 rest = k;
    for (int v = ND - 1; v >= 0; v--) {
      shift[v] = T(rest % p.kernel[v] * p.dilation[v]);
      rest /= p.kernel[v];
    }
    const i32 outside = i32(p.outside());
    const i64 offset_plane =
        ((tile.image * p.offset_groups + p.offset_group(sample_group)) * p.K + k) * ND;
    const i64 mask_plane = (tile.image * p.mask_groups + p.mask_group(sample_group)) * p.K + k;
    for (i64 s = 0; s < tile.segments; s++) {
      const i64 pixel = tile.first + s * tile.step;
      const T* given[ND + 1];  // offsets and mask
      for (int v = 0; v <= ND; v++) {
        const Array& array = v < ND ? p.call.offset : p.call.mask;
        T* scratch = spare + v * (kPiece + N);
        given[v] = nullptr;
        if (!array.data) continue;
        const i64 at = (v < ND ? offset_plane + v : mask_plane) * p.P + pixel;
        if (tile.length >= N) {
          given[v] = view(array, at, tile.length, scratch);
        } else {
          read(array, at, tile.length, scratch);
          for (i64 i = tile.length; i < N; i++) scratch[i] = 0;
          given[v] = scratch;
        }
      }
      // The last vector overlaps the one before; one longer than the segment is overwritten by
      // the next segment.
      for (i64 c0 = 0; c0 < tile.length; c0 += N) {
        const i64 c = tile.length >= N ? least(c0, tile.length - N) : 0;
        const i64 m = s * tile.length + c;
        V position[ND];
        UNROLL
        for (int v = 0; v < ND; v++) {
          position[v] = L::load(base + v * p.table + m) + L::splat(shift[v]);
          if (given[v]) position[v] = position[v] + L::load(given[v] + c);
        }
        M inside = (position[0] >= L::splat(-1)) & (position[0] < L::splat(T(p.image_size[0])));
        UNROLL
        for (int v = 1; v < ND; v++)
          inside =
              inside & (position[v] >= L::splat(-1)) & (position[v] < L::splat(T(p.image_size[v])));
        const V mask_value = given[ND] ? L::load(given[ND] + c) : L::splat(1);
        I index_value = L::splat_index(0);
        V corner[Q];
        corner[0] = L::select(inside, mask_value, L::zero());
        UNROLL
        for (int v = 0; v < ND; v++) {
          // Only now is the conversion to an integer defined.
          const V safe = L::select(inside, position[v], L::zero());
          const V floor = L::floor(safe), part = safe - floor;
          index_value = index_value * L::splat_index(i32(p.padded[v])) + L::to_index(floor) +
                        L::splat_index(1);
          if (Reverse) L::store(fraction + (slot * ND + v) * p.table + m, part);
          UNROLL
          for (int q = (1 << v) - 1; q >= 0; q--) {
            const V high = corner[q] * part;
            corner[2 * q + 1] = high;
            corner[2 * q] = corner[q] - high;
          }
        }
        L::store_index(index + slot * p.table + m,
                       L::select_index(inside, index_value, L::splat_index(outside)));
        L::template transpose<Q>(corner);
        UNROLL
        for (int q = 0; q < Q; q++) L::store(weight + (slot * p.table + m) * Q + q * N, corner[q]);
        if (Reverse) L::store(mask + slot * p.table + m, mask_value);
      }
    }
  }
};

template <class T, int ND>
Status gather(const Call& call) {
  using P = Plan<T, ND>;
  const P p(call, 2, 1);
  const Sampler<T> sampler = sampler_of<T, ND>(kColumnsWork, p.lanes, p.vectors);
  const i64 group_units = p.units() / p.groups, group_columns = group_units * p.block;
  const i64 chunk_units = p.units_per_chunk(group_units, 1);
  const i64 slots = p.blocks_per_sample_group() == 1 ? 1 : p.K;
  const bool pairs = call.pairs && sizeof(T) == 4 && !p.depthwise &&
                     call.image.dtype == kBFloat16 && call.weight.dtype == kBFloat16;
  const i64 per_word = pairs ? 2 : 1;
  const auto product = pairs ? multiply<T, kInPairs, false> : multiply<T, kInRows, false>;
  const i64 all_panels = p.groups * p.panels;

  // Images at a time, and parts of the points where the tiles are too few for the threads.
  const i64 flight =
      least(p.batch, most(kFlightBytes / p.image_bytes(), divide_up(p.threads, p.tiles)));
  const i64 splits = least(all_panels, divide_up(p.threads, flight * p.tiles));

  struct Scratch {
    Cells<T, ND> cells;
    T *columns, *points;
    Scratch(Carver& c, const P& p, i64 slots, i64 chunk_units)
        : cells(c, p, slots, false),
          columns(c.take<T>(p.tile_pixels * chunk_units * p.block)),
          points(c.take<T>(p.tile_pixels * p.group_width)) {}
  };
  Carver measure{nullptr};
  Scratch(measure, p, slots, chunk_units);
  const i64 scratch_bytes = i64(measure.used);
  const i64 edge_size = most(Field<T>::scratch_size, (p.panel + 1) * p.K * p.block);

  T *packed, *weights, *edge;
  char* scratch;
  const auto layout = [&](Carver c) {
    packed = c.take<T>(flight * p.blocks * p.plane * p.block);
    weights = c.take<T>(all_panels * group_columns * p.panel);
    edge = c.take<T>(p.threads * edge_size);
    scratch = c.take<char>(p.threads * scratch_bytes);
    return c.used;
  };
  char* memory = workspace_take(layout(Carver{nullptr}));
  if (!memory) return kNoMemory;
  layout(Carver{memory});

  const Field<T> points{call.points, p.point_channels, p.P};
  if (p.depthwise)
    pack_weight_by_channel(p, weights, edge, edge_size);
  else
    pack_weight_by_point(p, weights, edge, edge_size);
  if (pairs)
    parallel(p.threads, all_panels, [&](i64 j, i64) {
      float* panel = reinterpret_cast<float*>(weights + j * group_columns * p.panel);
      pair_rows(group_columns, p.panel, panel);
    });
  for (i64 first = 0; first < p.batch; first += flight) {
    const i64 images = least(flight, p.batch - first);
    pack_image(p, first, images, packed, edge, edge_size);
    parallel(p.threads, images * p.tiles * splits, [&](i64 task, i64 thread) {
      Carver carver{scratch + thread * scratch_bytes};
      Scratch s(carver, p, slots, chunk_units);
      const i64 split = task % splits, image = task / splits / p.tiles;
      const Tile tile = p.tile(first + image, task / splits % p.tiles);
      s.cells.place(p, tile);
      i64 current = -1;  // sample group whose cells are found
      const i64 panel_end = all_panels * (split + 1) / splits;
      for (i64 j = all_panels * split / splits; j < panel_end;) {
        const i64 group = j / p.panels, some = least(panel_end, (group + 1) * p.panels) - j;
        const i64 skipped = j % p.panels * p.panel, point = p.group_point(group) + skipped;
        const i64 count = least(some * p.panel, p.points_in(group) - skipped);
        const i64 width = some * p.panel;
        if (call.bias.data) {
          for (i64 m = 0; m < tile.count; m++) {
            if (m == 0)
              read(call.bias, point, count, s.points);
            else
              memcpy(s.points + m * width, s.points, size_t(count) * sizeof(T));
            for (i64 i = count; i < width; i++) s.points[m * width + i] = 0;
          }
        } else if (p.depthwise) {
          memset(s.points, 0, size_t(tile.count * width) * sizeof(T));
        }
        for (i64 u0 = 0; u0 < group_units; u0 += chunk_units) {
          const i64 units = least(chunk_units, group_units - u0), step = chunk_units * p.block;
          for (i64 u = u0; u < u0 + units; u++) {
            const i64 b = (group * group_units + u) / p.K, k = u % p.K;
            const i64 sample_group = p.sample_group(b), slot = slots == 1 ? 0 : k;
            if (slots == 1) {
              s.cells.template find<false>(p, tile, sample_group, k, 0);
            } else if (sample_group != current) {
              current = sample_group;
              for (i64 q = 0; q < p.K; q++)
                s.cells.template find<false>(p, tile, sample_group, q, q);
            }
            sampler({tile.count, packed + (image * p.blocks + b) * p.plane * p.block, nullptr,
                     p.steps, s.cells.index + slot * p.table, s.cells.weight + slot * p.Q * p.table,
                     nullptr, s.columns + (u - u0) * p.block, step, nullptr});
          }
          if (pairs)
            pair_columns(tile.count, units * p.block, reinterpret_cast<float*>(s.columns), step);
          if (p.depthwise)
            add_scaled(tile.count, p.block, units, s.columns, step,
                       weights + j * group_columns + u0 * p.block, s.points);
          else
            product(p.panel_vectors, tile.count, some, units * p.block / per_word, s.columns, step,
                    weights + (j * group_columns + u0 * p.block / per_word) * p.panel,
                    group_columns * p.panel, s.points, width, call.bias.data || u0 > 0);
        }
        for (i64 i = 0; i < tile.segments; i++)
          points.store(tile.image, point, count, tile.first + i * tile.step, tile.length,
                       s.points + i * tile.length * width, width, edge + thread * edge_size);
        j += some;
      }
    });
  }
  workspace_give();
  return kDone;
}

// The channels are cut into parts. A thread takes one part of one image (or of some images, where
// they share a gradient of the weight) through all tiles, so gradients of image and weight need
// no atomics and no sample is visited twice.
template <class T, int ND>
struct Reverse {
  using P = Plan<T, ND>;
  static constexpr int N = P::N, Q = P::Q, Dots = P::Dots;

  const P p;
  const Call& call;
  int mode;
  Sampler<T> sampler;
  i64 part_blocks, parts;
  i64 flight;                  // images at a time
  i64 weight_slots;            // image n adds to gradient n % weight_slots of the weight
  i64 bands;                   // parts of the tiles, each with its own gradients
  i64 offset_sets, mask_sets;  // partial sums, where several parts share a group
  i64 chunk_count, chunk_columns, weights_size;  // chunks, most columns of one, packed weights
  i64 weight_size, image_size, offset_size, mask_size;
  i64 scratch_bytes, edge_size;
  T *packed, *weights, *grad_packed, *grad_weights, *edge;
  T *offset_buffer, *mask_buffer;
  Chunk* chunks;
  i64* part_chunks;  // first chunk of each part
  char* scratch;

  struct Scratch {
    Cells<T, ND> cells;
    T *grad_columns, *columns, *dots;
    T* by_point;  // [point of the group][pixel]
    T* by_panel;  // [panel][pixel][point of the panel]
    i64 loaded = -1;
    Scratch(Carver& c, const Reverse& r)
        : cells(c, r.p, r.p.K, true),
          grad_columns(c.take<T>(r.p.tile_pixels * r.chunk_columns)),
          columns(c.take<T>(r.p.tile_pixels * r.chunk_columns)),
          dots(c.take<T>(r.mode & kDotsWork ? r.p.K * r.p.table * Dots : 0)),
          by_point(c.take<T>(r.p.group_points * r.p.tile_pixels)),
          by_panel(c.take<T>(r.p.group_width * r.p.tile_pixels)) {}
  };

  // A gradient of the position sums over the channels of its group in as many parts as the sizes
  // say, whatever the number of threads.
  static i64 fixed_parts(const Call& c) { return most(2, least(8, c.image_channels / 64)); }

  explicit Reverse(const Call& c) : p(c, 4, fixed_parts(c)), call(c) {
    mode = (c.grad_weight.data ? kColumnsWork : 0) |
           (c.grad_offset.data || c.grad_mask.data ? kDotsWork : 0) |
           (c.grad_image.data ? kSpreadWork : 0);
    sampler = sampler_of<T, ND>(mode, p.lanes, p.vectors);
    weight_size = p.units() * p.block * (p.depthwise ? 1 : p.group_width);
    image_size = p.blocks * p.plane * p.block;
    offset_size = p.offset_groups * p.K * ND * p.P;
    mask_size = p.mask_groups * p.K * p.P;

    const i64 fitting = most(1, kFlightBytes / p.image_bytes());
    weight_slots = 1;
    if (mode & kColumnsWork)
      weight_slots = most(1, least(least(p.batch, 8), (16 << 20) / i64(weight_size * sizeof(T))));
    flight = least(p.batch, most(fitting, divide_up(p.threads, fixed_parts(c))));
    const i64 lines = mode & kColumnsWork ? least(weight_slots, flight) : flight;
    i64 wanted = fixed_parts(c);
    if (!(mode & kDotsWork))
      for (wanted = 1; wanted < p.blocks; wanted++)
        if (lines * wanted % p.threads == 0 || lines * wanted >= 4 * p.threads) break;
    part_blocks = divide_up(p.blocks, least(wanted, p.blocks));
    parts = divide_up(p.blocks, part_blocks);
    // Only where one image must occupy more threads than there are parts: here the sums of the
    // gradients of image and weight do depend on the number of threads.
    bands = least(p.tiles, divide_up(p.threads, lines * parts));
    offset_sets = sets(p.offset_groups), mask_sets = sets(p.mask_groups);

    cut_parts(nullptr, nullptr);
    edge_size = most(Field<T>::scratch_size, 2 * N * p.K * p.block);
    Carver measure{nullptr};
    Scratch(measure, *this);
    scratch_bytes = i64(measure.used);
  }

  i64 part_of(i64 b) const { return b / part_blocks; }
  i64 first_part(i64 group, i64 groups) const { return part_of(p.blocks / groups * group); }
  i64 last_part(i64 group, i64 groups) const {
    return part_of(p.blocks / groups * (group + 1) - 1);
  }
  i64 sets(i64 groups) const {
    i64 n = 0;
    for (i64 g = 0; g < groups; g++) n = most(n, last_part(g, groups) - first_part(g, groups) + 1);
    return n;
  }
  // Set 0 is the result itself where that has the computing type.
  bool direct(const Array& a) const { return a.dtype == DtypeOf<T>::value; }
  T* set_at(const Array& result, T* buffer, i64 size, i64 set, i64 first, i64 image) const {
    if (set == 0 && direct(result))
      return reinterpret_cast<T*>(result.data) + (first + image) * size;
    return buffer + ((set - direct(result)) * flight + image) * size;
  }

  void cut_parts(Chunk* to, i64* firsts) {
    chunk_count = chunk_columns = weights_size = 0;
    for (i64 part = 0; part < parts; part++) {
      if (firsts) firsts[part] = chunk_count;
      chunk_count += cut(p, part * part_blocks, least(p.blocks, (part + 1) * part_blocks),
                         to ? to + chunk_count : nullptr, &weights_size, &chunk_columns);
    }
    if (firsts) firsts[parts] = chunk_count;
  }

  Status run() {
    const i64 offset_buffers = call.grad_offset.data ? offset_sets - direct(call.grad_offset) : 0;
    const i64 mask_buffers = call.grad_mask.data ? mask_sets - direct(call.grad_mask) : 0;
    const bool reads_image = mode & (kColumnsWork | kDotsWork), spreads = mode & kSpreadWork;
    const bool expands = mode & (kDotsWork | kSpreadWork);
    const auto layout = [&](Carver c) {
      chunks = c.take<Chunk>(chunk_count);
      part_chunks = c.take<i64>(parts + 1);
      packed = c.take<T>(reads_image ? flight * image_size : 0);
      grad_packed = c.take<T>(spreads ? bands * flight * image_size : 0);
      weights = c.take<T>(expands ? weights_size : 0);
      grad_weights = c.take<T>(call.grad_weight.data ? weight_slots * bands * weight_size : 0);
      offset_buffer = c.take<T>(offset_buffers * flight * offset_size);
      mask_buffer = c.take<T>(mask_buffers * flight * mask_size);
      edge = c.take<T>(p.threads * edge_size);
      scratch = c.take<char>(p.threads * scratch_bytes);
      return c.used;
    };
    char* memory = workspace_take(layout(Carver{nullptr}));
    if (!memory) return kNoMemory;
    layout(Carver{memory});
    cut_parts(chunks, part_chunks);

    if (expands && p.depthwise)
      pack_weight_by_channel(p, weights, edge, edge_size);
    else if (expands)
      pack_weight_by_column(p, chunks, chunk_count, weights, edge, edge_size);
    if (call.grad_weight.data)
      parallel(p.threads, weight_slots * bands * p.blocks, [&](i64 task, i64) {
        const i64 size = weight_size / p.blocks;
        memset(grad_weights + task * size, 0, size_t(size) * sizeof(T));
      });
    for (i64 first = 0; first < p.batch; first += flight) {
      const i64 images = least(flight, p.batch - first);
      if (reads_image) pack_image(p, first, images, packed, edge, edge_size);
      const i64 lines = mode & kColumnsWork ? least(weight_slots, images) : images;
      parallel(p.threads, lines * parts * bands, [&](i64 task, i64 thread) {
        const i64 band = task % bands, part = task / bands % parts;
        for (i64 image = task / bands / parts; image < images; image += lines)
          one_part(first, image, part, band, thread);
      });
      if (spreads) unpack_image(first, images);
      if (call.grad_offset.data)
        add_sets(call.grad_offset, offset_buffer, offset_size, p.offset_groups, offset_sets, first,
                 images);
      if (call.grad_mask.data)
        add_sets(call.grad_mask, mask_buffer, mask_size, p.mask_groups, mask_sets, first, images);
    }
    if (call.grad_weight.data) unpack_weight();
    workspace_give();
    return kDone;
  }

  void one_part(i64 first, i64 image, i64 part, i64 band, i64 thread) {
    Carver carver{scratch + thread * scratch_bytes};
    Scratch s(carver, *this);
    const i64 block_begin = part * part_blocks;
    const i64 block_end = least(p.blocks, block_begin + part_blocks), size = p.plane * p.block;
    T* grad_image = grad_packed + (band * flight + image) * image_size;
    T* grad_weight = grad_weights + ((first + image) % weight_slots * bands + band) * weight_size;
    if (mode & kSpreadWork)
      memset(grad_image + block_begin * size, 0,
             size_t((block_end - block_begin) * size) * sizeof(T));
    const i64 tile_end = p.tiles * (band + 1) / bands;
    for (i64 t = p.tiles * band / bands; t < tile_end; t++) {
      const Tile tile = p.tile(first + image, t);
      s.cells.place(p, tile);
      s.loaded = -1;
      i64 current = -1;
      for (i64 i = part_chunks[part]; i < part_chunks[part + 1]; i++) {
        const Chunk& chunk = chunks[i];
        const i64 columns = chunk.count * p.block;
        load_points(s, tile, chunk.group, thread);
        if (mode & (kDotsWork | kSpreadWork)) {
          if (p.depthwise)
            scale(tile.count, p.block, chunk.count, s.grad_columns, chunk_columns,
                  weights + chunk.weights, s.by_panel);
          else
            multiply<T, kInColumns, false>(2, tile.count, chunk.panels, p.group_points, s.by_point,
                                     p.tile_pixels, weights + chunk.weights, p.group_points * 2 * N,
                                     s.grad_columns, chunk_columns, false);
        }
        for (i64 u = chunk.unit; u < chunk.unit + chunk.count; u++) {
          const i64 b = u / p.K, k = u % p.K, sample_group = p.sample_group(b);
          if (sample_group != current) {
            if (current >= 0) store_dots(s, tile, first, image, part, current);
            current = sample_group;
            for (i64 q = 0; q < p.K; q++) s.cells.template find<true>(p, tile, sample_group, q, q);
            if (mode & kDotsWork) memset(s.dots, 0, size_t(p.K * p.table * Dots) * sizeof(T));
          }
          const i64 column = (u - chunk.unit) * p.block;
          sampler({tile.count, packed + (image * p.blocks + b) * size, grad_image + b * size,
                   p.steps, s.cells.index + k * p.table, s.cells.weight + k * Q * p.table,
                   s.grad_columns + column, s.columns + column, chunk_columns,
                   s.dots + k * p.table * Dots});
        }
        if (mode & kColumnsWork) {
          if (p.depthwise)
            add_products(tile.count, p.block, chunk.count, s.columns, chunk_columns,
                         grad_weight + chunk.unit * p.block, s.by_panel);
          else
            multiply<T, kInColumns, true>(p.panel_vectors, columns, p.panels, tile.count, s.columns,
                                    chunk_columns, s.by_panel, p.tile_pixels * p.panel,
                                    grad_weight + chunk.unit * p.block * p.group_width,
                                    p.group_width, true);
        }
      }
      store_dots(s, tile, first, image, part, current);
    }
  }

  void load_points(Scratch& s, const Tile& tile, i64 group, i64 thread) const {
    if (s.loaded == group) return;
    s.loaded = group;
    const Field<T> points{call.points, p.point_channels, p.P};
    const i64 point = p.group_point(group), count = p.points_in(group), step = p.tile_pixels;
    for (i64 i = 0; i < tile.segments; i++) {
      const i64 pixel = tile.first + i * tile.step;
      T* to = s.by_point + i * tile.length;
      if (call.points.last) {
        T* rows = edge + thread * edge_size;
        for (i64 o = 0; o < count; o += 64) {
          const i64 some = least(64, count - o);
          points.load(tile.image, point + o, some, pixel, tile.length, rows, some, nullptr);
          transpose(rows, some, to + o * step, step, some, tile.length);
        }
      } else {
        for (i64 o = 0; o < count; o++)
          read(call.points, points.at(tile.image, point + o, pixel), tile.length, to + o * step);
      }
    }
    if (!(mode & kColumnsWork || p.depthwise)) return;
    for (i64 j = 0; j < p.panels; j++) {
      const i64 some = least(p.panel, count - j * p.panel);
      T* to = s.by_panel + j * step * p.panel;
      if (some < p.panel) memset(to, 0, size_t(tile.count * p.panel) * sizeof(T));
      transpose(s.by_point + j * p.panel * step, step, to, p.panel, tile.count, some);
    }
  }

  // Derivatives by position and mask of one sample group, from its sums of grad_column times
  // corner.
  void store_dots(const Scratch& s, const Tile& tile, i64 first, i64 image, i64 part,
                  i64 sample_group) const {
    if (!(mode & kDotsWork)) return;
    using L = Lanes<T, N>;
    using V = typename L::V;
    const i64 first_group = p.sample_group(part * part_blocks);  // of this part
    // Where the planes of this group's gradient lie, and whether this part has been there.
    const auto planes = [&](const Array& result, T* buffer, i64 size, i64 groups, i64 group,
                            bool* fresh) -> T* {
      if (!result.data) return nullptr;
      *fresh = sample_group == most(first_group, p.sample_groups / groups * group);
      const i64 set = part - first_part(group, groups);
      return set_at(result, buffer, size, set, first, image) + group * (size / groups);
    };
    bool fresh_offset = false, fresh_mask = false;
    T* offsets = planes(call.grad_offset, offset_buffer, offset_size, p.offset_groups,
                        p.offset_group(sample_group), &fresh_offset);
    T* masks = planes(call.grad_mask, mask_buffer, mask_size, p.mask_groups,
                      p.mask_group(sample_group), &fresh_mask);
    const typename L::I outside = L::splat_index(i32(p.outside()));
    for (i64 k = 0; k < p.K; k++)
      for (i64 i = 0; i < tile.segments; i++)
        for (i64 c0 = 0; c0 < tile.length; c0 += N) {
          const i64 c = tile.length >= N ? least(c0, tile.length - N) : 0;
          const i64 m = k * p.table + i * tile.length + c;
          const i64 pixel = tile.first + i * tile.step + c;
          T rows[Dots * N];
          transpose_by<T, 4>(s.dots + m * Dots, Dots, rows, N, Dots, N);
          V value[Q], slope[ND][Q];
          UNROLL
          for (int q = 0; q < Q; q++) value[q] = L::load(rows + q * N);
          // Interpolate axis by axis; the slope of an axis is interpolated along the later ones.
          UNROLL
          for (int v = 0; v < ND; v++) {
            const int half = Q >> (v + 1);
            const i64 at = (k * ND + v) * p.table + i * tile.length + c;
            const V part_v = L::load(s.cells.fraction + at);
            UNROLL
            for (int q = 0; q < half; q++) {
              UNROLL
              for (int w = 0; w < v; w++)
                slope[w][q] = slope[w][q] + part_v * (slope[w][q + half] - slope[w][q]);
              slope[v][q] = value[q + half] - value[q];
              value[q] = value[q] + part_v * slope[v][q];
            }
          }
          const auto valid = L::mask(L::load_index(s.cells.index + m) != outside);
          const auto store = [&](T* to, V result, bool fresh) {
            result = L::select(valid, result, L::zero());
            if (c == c0 && tile.length >= N) {
              L::store(to, fresh ? result : L::load(to) + result);
            } else {
              T lane[N];
              L::store(lane, result);
              for (i64 l = c0 - c; l < least(N, tile.length - c); l++)
                to[l] = fresh ? lane[l] : to[l] + lane[l];
            }
          };
          if (offsets) {
            const V mask = L::load(s.cells.mask + m);
            UNROLL
            for (int v = 0; v < ND; v++)
              store(offsets + (k * ND + v) * p.P + pixel, slope[v][0] * mask, fresh_offset);
          }
          if (masks) store(masks + k * p.P + pixel, value[0], fresh_mask);
        }
  }

  void add_sets(const Array& result, T* buffer, i64 size, i64 groups, i64 sets, i64 first,
                i64 images) const {
    if (sets == 1 && direct(result)) return;
    const i64 planes = size / p.P;
    parallel(p.threads, images * planes, [&](i64 task, i64) {
      const i64 image = task / planes, plane = task % planes, group = plane / (planes / groups);
      const i64 count = last_part(group, groups) - first_part(group, groups) + 1;
      for (i64 x = 0; x < p.P; x += kPiece) {
        const i64 n = least(kPiece, p.P - x), at = plane * p.P + x;
        T sum[kPiece];
        memcpy(sum, set_at(result, buffer, size, 0, first, image) + at, size_t(n) * sizeof(T));
        for (i64 set = 1; set < count; set++) {
          const T* more = set_at(result, buffer, size, set, first, image) + at;
          for (i64 i = 0; i < n; i++) sum[i] += more[i];
        }
        write(result, (first + image) * size + at, n, sum);
      }
    });
  }

  void unpack_image(i64 first, i64 images) const {
    const Field<T> image{call.grad_image, p.image_channels, p.pixels};
    const i64 width = p.image_size[ND - 1], rows = p.pixels / width;
    parallel(p.threads, images * p.blocks * rows, [&](i64 task, i64 thread) {
      const i64 n = task / rows / p.blocks, b = task / rows % p.blocks;
      i64 rest = task % rows, pixel = 1;
      for (int v = ND - 2; v >= 0; v--) {
        pixel += (rest % p.image_size[v] + 1) * p.axis_step(v);
        rest /= p.image_size[v];
      }
      T* from = grad_packed + n * image_size + (b * p.plane + pixel) * p.block;
      for (i64 band = 1; band < bands; band++) {
        const T* more = from + band * flight * image_size;
        for (i64 i = 0; i < width * p.block; i++) from[i] += more[i];
      }
      const i64 count = p.block_channels(b);
      if (call.bias.data) {
        T bias[4 * N];
        read(call.bias, p.channel(b), count, bias);
        for (i64 x = 0; x < width; x++)
          for (i64 c = 0; c < count; c++) from[x * p.block + c] += bias[c];
      }
      for (i64 x = 0; x < width; x += kPiece)
        image.store(first + n, p.channel(b), count, task % rows * width + x,
                    least(kPiece, width - x), from + x * p.block, p.block,
                    edge + thread * edge_size);
    });
  }

  void unpack_weight() const {
    const i64 copies = weight_slots * bands, group_blocks = p.blocks / p.groups;
    if (p.depthwise) {
      parallel(p.threads, p.blocks, [&](i64 b, i64 thread) {
        const i64 size = p.K * p.block, count = p.block_channels(b);
        T* sums = grad_weights + b * size;
        T* rows = edge + thread * edge_size;
        for (i64 copy = 1; copy < copies; copy++)
          for (i64 i = 0; i < size; i++) sums[i] += sums[copy * weight_size + i];
        transpose(sums, p.block, rows, p.K, count, p.K);
        write(call.grad_weight, p.channel(b) * p.K, count * p.K, rows);
      });
      return;
    }
    const i64 size = p.K * p.block, strips = divide_up(p.group_points, N);
    parallel(p.threads, p.blocks * strips, [&](i64 task, i64 thread) {
      const i64 b = task / strips, o = task % strips * N, some = least(N, p.group_points - o);
      const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
      T* sums = edge + thread * edge_size;  // [point][kernel point][channel]
      T* more = sums + N * size;
      for (i64 copy = 0; copy < copies; copy++) {
        const T* from = grad_weights + copy * weight_size + b * size * p.group_width + o;
        transpose(from, p.group_width, copy ? more : sums, size, some, size);
        if (copy)
          for (i64 i = 0; i < some * size; i++) sums[i] += more[i];
      }
      for (i64 i = 0; i < some; i++) {
        transpose(sums + i * size, p.block, more, p.K, count, p.K);
        write(call.grad_weight,
              ((b / group_blocks * p.group_points + o + i) * p.group_channels + channel) * p.K,
              count * p.K, more);
      }
    });
  }
};

template <class T, int ND>
Status run(const Call& call) {
  return call.gather ? gather<T, ND>(call) : Reverse<T, ND>(call).run();
}

template <class T>
Status run(const Call& call) {
  return call.rank == 1 ? run<T, 1>(call) : call.rank == 2 ? run<T, 2>(call) : run<T, 3>(call);
}

// In double where any tensor that sets coordinates or values is double.
Status run(const Call& c) {
  const auto wide = [](const Array& a) { return a.data && a.dtype == kFloat64; };
  return wide(c.image) || wide(c.points) || wide(c.weight) || wide(c.offset) || wide(c.mask)
             ? run<double>(c)
             : run<float>(c);
}

}  // namespace DEFORMND_ISA
}  // namespace deformnd

// The matrix products. Included by kernel.cpp inside the namespace of one instruction set.

// Note [pairs]
// Where image and weight are bfloat16 and the machine multiplies those, Gather rounds its columns
// to bfloat16. A pair of columns, and a pair of rows of the weight, then lie in one 32-bit word
// each, in place of the first of them, so the steps between rows stay what they were. Those
// instructions take subnormal numbers for zero.

// C[R, NV vectors] += A[R, inner] B[inner, NV vectors]; the rows of B follow one another.
// A(i, k) lies at i * a_step + k, or at k * a_step + i where it is Transposed.
// A long sum in one float32 loses digits with the square root of its length: so kTerms at a time
// are summed on their own, and C is the sum of those sums.
template <class T, int R, int NV, bool Transposed>
NOINLINE void micro_kernel(i64 inner, const T* RESTRICT a, i64 a_step, const T* RESTRICT b,
                           T* RESTRICT c, i64 c_step, bool accumulate) {
  using L = Lanes<T, Machine<T>::lanes>;
  for (i64 first = 0; first < inner; first += kTerms, accumulate = true) {
    typename L::V sums[R][NV];
    UNROLL
    for (int i = 0; i < R; i++) {
      UNROLL
      for (int j = 0; j < NV; j++) sums[i][j] = L::zero();
    }
    const i64 end = least(inner, first + kTerms);
    for (i64 k = first; k < end; k++) {
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
      for (int j = 0; j < NV; j++) {
        T* to = c + i * c_step + j * L::size;
        L::store(to, accumulate ? L::load(to) + sums[i][j] : sums[i][j]);
      }
    }
  }
}

#ifdef DEFORMND_PAIRS
// The same for pairs of bfloat16 in words, which float stands for; `inner` counts pairs.
template <int R, int NV>
__attribute__((target("avx512bf16"))) NOINLINE void pair_kernel(i64 inner, const float* RESTRICT a,
                                                                i64 a_step, const float* RESTRICT b,
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
      b[k * width + i] =
          from_bits(to_bits(b[2 * k * width + i]) >> 16 | to_bits(b[(2 * k + 1) * width + i]));
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
    const MicroKernel<T> kernel = micro_kernel_of<T, NV, A>(least(height, rows - row), All{});
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
    multiply_by<T, 1, A, RowsOutside>(rows, panels, inner, a, a_step, b, b_panel, c, c_step,
                                      accumulate);
  else
    multiply_by<T, 2, A, RowsOutside>(rows, panels, inner, a, a_step, b, b_panel, c, c_step,
                                      accumulate);
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
  for (i64 k = 0; k < inner; k++) {
    T sums[4 * Machine<T>::lanes] = {};  // on their own, as in micro_kernel
    for (i64 m = 0; m < rows; m++)
      for (i64 i = 0; i < width; i++) sums[i] += a[m * a_step + k * width + i] * c[m * width + i];
    for (i64 i = 0; i < width; i++) b[k * width + i] += sums[i];
  }
}

// The matrix products. Included by kernel.cpp inside the namespace of one instruction set.

// C[R, NV vectors] += A[R, inner] B[inner, NV vectors].
// A(i, k) lies at i * a_step + k, or at k * a_step + i where it is Transposed.
// A long sum in one float32 loses digits with the square root of its length. So kTerms terms at a
// time are summed on their own, and C is the sum of those sums.
template <class T, int R, int NV, bool Transposed>
NOINLINE void micro_kernel(i64 inner, const T* RESTRICT a, i64 a_step, const T* RESTRICT b,
                           i64 b_step, T* RESTRICT c, i64 c_step, bool accumulate) {
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
      for (int j = 0; j < NV; j++) row[j] = L::load(b + k * b_step + j * L::size);
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

template <class T>
using MicroKernel = void (*)(i64, const T*, i64, const T*, i64, T*, i64, bool);

template <class T, int NV, bool Transposed, int... R>
MicroKernel<T> micro_kernel_of(i64 rows, Seq<R...>) {
  static constexpr MicroKernel<T> table[] = {micro_kernel<T, R + 1, NV, Transposed>...};
  return table[rows - 1];
}

// C[rows, panels] (+)= A B, with B in panels of NV vectors. With RowsOutside the loop over rows is
// the outer one, which is better for few panels, since they stay in the cache.
template <class T, int NV, bool Transposed, bool RowsOutside>
void multiply_by(i64 rows, i64 panels, i64 inner, const T* a, i64 a_step, const T* b, i64 b_step,
                 i64 b_panel, T* c, i64 c_step, bool accumulate) {
  constexpr int height = Machine<T>::rows;
  constexpr i64 width = NV * Machine<T>::lanes;
  using All = typename MakeSeq<height>::type;
  const i64 strips = divide_up(rows, height);
  const auto one = [&](i64 strip, i64 panel) {
    const i64 row = strip * height;
    const MicroKernel<T> kernel =
        micro_kernel_of<T, NV, Transposed>(least(height, rows - row), All{});
    kernel(inner, a + (Transposed ? row : row * a_step), a_step, b + panel * b_panel, b_step,
           c + row * c_step + panel * width, c_step, accumulate);
  };
  if (RowsOutside)
    for (i64 i = 0; i < strips; i++)
      for (i64 j = 0; j < panels; j++) one(i, j);
  else
    for (i64 j = 0; j < panels; j++)
      for (i64 i = 0; i < strips; i++) one(i, j);
}

template <class T, bool Transposed, bool RowsOutside>
void multiply(int vectors, i64 rows, i64 panels, i64 inner, const T* a, i64 a_step, const T* b,
              i64 b_step, i64 b_panel, T* c, i64 c_step, bool accumulate) {
  if (vectors == 1)
    multiply_by<T, 1, Transposed, RowsOutside>(rows, panels, inner, a, a_step, b, b_step, b_panel,
                                               c, c_step, accumulate);
  else
    multiply_by<T, 2, Transposed, RowsOutside>(rows, panels, inner, a, a_step, b, b_step, b_panel,
                                               c, c_step, accumulate);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// For Note [depthwise], with `width` channels, 4 or 8 or full vectors: run part(lanes, channel)
// for each vector of them.
template <class T, class Part>
INLINE void each_vector(i64 width, const Part& part) {
  constexpr int N = Machine<T>::lanes;
  if (width % N == 0)
    for (i64 i = 0; i < width; i += N) part(Lanes<T, N>{}, i);
  else
    for (i64 i = 0; i < width; i += 4) part(Lanes<T, 4>{}, i);
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

// b[k][channel] += sum over rows of a[row][k * width + channel] c[row][channel]. As in micro_kernel
// kTerms terms at a time are summed on their own; as in scale, for several k at a time.
template <class T>
NOINLINE void add_products(i64 rows, i64 width, i64 inner, const T* RESTRICT a, i64 a_step,
                           T* RESTRICT b, const T* RESTRICT c) {
  each_vector<T>(width, [&](auto lanes, i64 i) {
    using L = decltype(lanes);
    const auto add = [&](auto count, i64 k) {
      constexpr int R = decltype(count)::value;
      typename L::V sums[R];
      UNROLL
      for (int r = 0; r < R; r++) sums[r] = L::zero();
      for (i64 m = 0; m < rows; m++) {
        const typename L::V factor = L::load(c + m * width + i);
        UNROLL
        for (int r = 0; r < R; r++)
          sums[r] = sums[r] + L::load(a + m * a_step + (k + r) * width + i) * factor;
      }
      UNROLL
      for (int r = 0; r < R; r++) {
        T* to = b + (k + r) * width + i;
        L::store(to, L::load(to) + sums[r]);
      }
    };
    i64 k = 0;
    for (; k + 8 <= inner; k += 8) add(Constant<8>{}, k);
    for (; k < inner; k++) add(Constant<1>{}, k);
  });
}

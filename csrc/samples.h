// One pass over the corners of samples: columns, their adjoint, their derivatives.
// Included by kernel.cpp inside the namespace of one instruction set.

enum Work { kColumnsWork = 1, kDotsWork = 2, kSpreadWork = 4 };

// The samples of one unit: all pixels of a tile at one kernel point, in one block.
template <class T>
struct Samples {
  i64 count;
  const T* image;        // the packed block
  T* grad_image;         // likewise
  const i64* steps;      // from the first corner of a cell to each, in elements
  const i32* index;      // [count] first corner
  const T* weight;       // [count][corner] interpolation weight times mask
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

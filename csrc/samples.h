// One pass over the corners of samples makes columns, their adjoint, and what derivatives need.
// Included by kernel.cpp inside the namespace of one instruction set.

enum Work { kColumnsWork = 1, kDotsWork = 2, kSpreadWork = 4 };

// The samples of one unit: all pixels of a tile at one kernel point, in one block.
template <class T>
struct Samples {
  i64 count;
  const T* image;        // the packed block, in words of kPerWord channels
  T* grad_image;         // the block of its gradient, in elements
  const i64* steps;      // from a cell's first corner to each of its corners, in elements
  const i32* index;      // [count] first corner of the cell
  const T* weight;       // [count][corner] interpolation weight times mask
  const T* grad_column;  // [count][column_step]
  T* column;             // the same, in words of kPerWord channels, or of pixels if Across
  i64 column_step;
  T* dots;  // [count][corner, at least 4] sums of grad_column times corner
  // For Note [planar]: how many channels, the table's size, and whether to set dots or to add to
  // them.
  i64 channels, table;
  bool fresh;
};

template <class T>
using Sampler = void (*)(const Samples<T>&);

// kColumnsWork interpolates, kSpreadWork adds its adjoint to grad_image, and kDotsWork sums up what
// derivatives by position and mask are made of. All are done in one pass, since they touch the same
// corners. A block has NC vectors of N lanes. (Two corners in one vector, where they fit, would
// halve the instructions but not the time, and a store that overlaps the next load would double
// it.)
// With Across, words of columns are pairs of pixels. A last pixel without another is paired with 0.
template <class T, int ND, int N, int NC, int Mode, bool Across>
NOINLINE void sample(const Samples<T>& s) {
  using L = Lanes<T, N>;
  using V = typename L::V;
  constexpr int Q = 1 << ND, Dots = Q < 4 ? 4 : Q;
  constexpr int G = kPairs && NC > 1 ? 2 : 1;  // vectors at a time
  // Copies, which stay in registers: a store could change what s refers to.
  const i64 count = s.count, column_step = s.column_step;
  const T *RESTRICT image = s.image, *RESTRICT weights = s.weight;
  const T* RESTRICT grad_column = s.grad_column;
  const i32* RESTRICT index = s.index;
  T *RESTRICT grad_image = s.grad_image, *RESTRICT column = s.column, *RESTRICT sums = s.dots;
  i64 steps[Q];
  UNROLL
  for (int c = 0; c < Q; c++) steps[c] = s.steps[c];
  V before[NC] = {};  // the columns of the previous pixel
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
    for (int v = 0; v < NC; v += G) {
      const i64 first = at + v * N;
      V value[G], grad[G];
      UNROLL
      for (int g = 0; g < G; g++) {
        value[g] = grad[g] = L::zero();
        if (Mode & (kDotsWork | kSpreadWork)) grad[g] = L::load(grad_column + (v + g) * N);
      }
      UNROLL
      for (int c = 0; c < Q; c++) {
        V x[G];
        if (Mode & (kColumnsWork | kDotsWork)) {
          const char* from =
              reinterpret_cast<const char*>(image) + (first + steps[c]) * i64(sizeof(T) / kPerWord);
          if constexpr (G == 2)
            split<N>(from, x);
          else if constexpr (kPairs)
            x[0] = widen4(from);
          else
            memcpy(x, from, sizeof x);
        }
        UNROLL
        for (int g = 0; g < G; g++) {
          if (Mode & kColumnsWork)
            value[g] = c == 0 ? weight[c] * x[g] : value[g] + weight[c] * x[g];
          if (Mode & kDotsWork) dots[c] = dots[c] + grad[g] * x[g];
          if (Mode & kSpreadWork) {
            T* to = grad_image + first + g * N + steps[c];
            L::store(to, L::load(to) + weight[c] * grad[g]);
          }
        }
      }
      if constexpr (!(Mode & kColumnsWork)) {
      } else if constexpr (!kPairs) {
        L::store(column + v * N, value[0]);
      } else if constexpr (!Across && G == 1) {
        narrow4(value[0], column);
      } else if constexpr (!Across) {
        L::store(column + v / 2 * N, narrow<N>(value[0], value[G - 1]));
      } else {
        UNROLL
        for (int g = 0; g < G; g++) {
          if (m & 1) L::store(column + (v + g) * N, pair<N>(before[v + g], value[g]));
          before[v + g] = value[g];
        }
      }
    }
    if ((Mode & kColumnsWork) && (!Across || m & 1)) column += column_step;
    if (Mode & (kDotsWork | kSpreadWork)) grad_column += column_step;
    if (Mode & kDotsWork) {
      UNROLL
      for (int c = 0; c < Dots; c += 4, sums += 4) {
        using F = Lanes<T, 4>;
        F::store(sums, F::load(sums) + L::sum4(dots[c], dots[c + 1], dots[c + 2], dots[c + 3]));
      }
    }
  }
  if constexpr (kPairs && Across && Mode & kColumnsWork)
    if (count & 1) {
      UNROLL
      for (int v = 0; v < NC; v++) L::store(column + v * N, pair<N>(before[v], L::zero()));
    }
}

// Note [planar]
// Where samples have at most four channels, the channels of one sample would leave most of a vector
// empty, and so would a product with few points. There a vector holds one channel of many samples.
// The four channels of a corner lie side by side in the packed image and are transposed on their
// way into the vectors. (Gather instructions, one for each channel, take several times as long.)
// Weights and dots are then [corner][table], columns and points [channel][pixel of the tile]: the
// products have pixels in their lanes, and columns need no padding. Vectors have 32 bytes, since it
// takes too many instructions to put wider ones together.
template <class T, int ND, int Mode>
NOINLINE void sample_planes(const Samples<T>& s) {
  constexpr int Most = 32 / sizeof(T), Q = 1 << ND;
  constexpr int N = Machine<T>::lanes < Most ? Machine<T>::lanes : Most;
  constexpr int G = Q < 4 ? Q : 4;  // corners at a time, as many as fit into registers
  using L = Lanes<T, N>;
  using V = typename L::V;
  using F = Lanes<T, 4>;
  const i64 count = s.count, channels = s.channels, table = s.table, step = s.column_step;
  const T *RESTRICT image = s.image, *RESTRICT weights = s.weight;
  const T* RESTRICT grad_column = s.grad_column;
  const i32* RESTRICT index = s.index;
  T *RESTRICT column = s.column, *RESTRICT sums = s.dots;
  T* corners[Q];  // grad_image, from each of a cell's corners on
  const bool fresh = s.fresh;
  i64 steps[Q];
  UNROLL
  for (int q = 0; q < Q; q++) steps[q] = s.steps[q], corners[q] = s.grad_image + s.steps[q];
  for (i64 m = 0; m < count; m += N) {
    V grad[4], value[4];
    UNROLL
    for (int c = 0; c < 4; c++) {
      grad[c] = value[c] = L::zero();
      if (Mode & (kDotsWork | kSpreadWork) && c < channels)
        grad[c] = L::load(grad_column + c * step + m);
    }
    if (Mode & (kColumnsWork | kDotsWork)) {
      // This loop must not be unrolled: the compiler would keep all corners until the end.
      for (int first = 0; first < Q; first += G) {
        V x[G][4];
        UNROLL
        for (int i = 0; i < 4; i++) {
          const T* from[N / 4];
          UNROLL
          for (int l = 0; l < N / 4; l++) from[l] = image + i64(index[m + 4 * l + i]) * 4;
          UNROLL
          for (int q = 0; q < G; q++) {
            const T* corner[N / 4];
            UNROLL
            for (int l = 0; l < N / 4; l++) corner[l] = from[l] + steps[first + q];
            x[q][i] = L::load4(corner);
          }
        }
        UNROLL
        for (int q = 0; q < G; q++) {
          L::transpose4(x[q]);
          const i64 at = (first + q) * table + m;
          const V weight = L::load(weights + at);
          V dot = L::zero();
          UNROLL
          for (int c = 0; c < 4; c++) {
            if (Mode & kColumnsWork) value[c] = value[c] + weight * x[q][c];
            if (Mode & kDotsWork) dot = dot + grad[c] * x[q][c];
          }
          if (Mode & kDotsWork) L::store(sums + at, fresh ? dot : L::load(sums + at) + dot);
        }
      }
      if (Mode & kColumnsWork) {
        UNROLL
        for (int c = 0; c < 4; c++)
          if (c < channels) L::store(column + c * step + m, value[c]);
      }
    }
    if (Mode & kSpreadWork) {
      L::transpose4(grad);
      T rows[4][N];
      UNROLL
      for (int i = 0; i < 4; i++) L::store(rows[i], grad[i]);
      UNROLL
      for (int i = 0; i < N; i++) {
        const i64 at = i64(index[m + i]) * 4;
        const typename F::V row = F::load(rows[i % 4] + i / 4 * 4);
        UNROLL
        for (int q = 0; q < Q; q++) {
          T* to = corners[q] + at;
          F::store(to, F::load(to) + F::splat(weights[q * table + m + i]) * row);
        }
      }
    }
  }
}

template <class T, int ND, int Mode, bool Across>
Sampler<T> sampler_of(int lanes, int vectors, bool planar) {
  constexpr int N = Machine<T>::lanes;
  if constexpr (!kPairs)
    if (planar) return sample_planes<T, ND, Mode>;
  if (lanes == N && vectors == 4) return sample<T, ND, N, 4, Mode, Across>;
  if (lanes == N && vectors == 2) return sample<T, ND, N, 2, Mode, Across>;
  if constexpr (kPairs) {  // The words of a vector make two vectors of half the lanes.
    if (lanes == N) return sample<T, ND, N / 2, 2, Mode, Across>;
    if (lanes == 8) return sample<T, ND, 4, 2, Mode, Across>;
    return sample<T, ND, 4, 1, Mode, Across>;
  } else {
    if (lanes == N) return sample<T, ND, N, 1, Mode, Across>;
    if constexpr (N > 8)
      if (lanes == 8) return sample<T, ND, 8, 1, Mode, Across>;
    return sample<T, ND, 4, 1, Mode, Across>;
  }
}

// The same for a mode that is known only at run time, as in Reverse.
template <class T, int ND>
Sampler<T> sampler_of(int mode, int lanes, int vectors, bool planar) {
  switch (mode) {
    case 1: return sampler_of<T, ND, 1, kPairs>(lanes, vectors, planar);
    case 2: return sampler_of<T, ND, 2, kPairs>(lanes, vectors, planar);
    case 3: return sampler_of<T, ND, 3, kPairs>(lanes, vectors, planar);
    case 4: return sampler_of<T, ND, 4, kPairs>(lanes, vectors, planar);
    case 5: return sampler_of<T, ND, 5, kPairs>(lanes, vectors, planar);
    case 6: return sampler_of<T, ND, 6, kPairs>(lanes, vectors, planar);
    default: return sampler_of<T, ND, 7, kPairs>(lanes, vectors, planar);
  }
}

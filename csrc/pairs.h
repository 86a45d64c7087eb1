// Products of bfloat16, by AMX or AVX512-BF16.
// Included by kernel.cpp inside the namespace of one instruction set.
//
// Note [pairs]
// The kernels of the namespace bfloat16 take calls whose image, points and weight are bfloat16.
// There a 32-bit word holds a pair of numbers, and the type float stands for words as well. A
// packed image takes half the bytes: word i of two vectors of n channels is the pair of channels i
// and n + i, so that a shift gives one vector and a mask the other. (A block of 4 channels is two
// words of neighbours.) Columns are interpolated in float32, and rounded once, to bfloat16.
//
// The instructions multiply rows of pairs by columns of pairs and add up in float32. In Gather's
// product a pair is two neighbouring columns. In Reverse's product for the gradients of the columns
// it is points i and 16 + i of each 32; in the one for the gradient of the weight, two neighbouring
// pixels.
// AMX takes 16 rows and 16 words at a time. An inner dimension is filled up with zeros to a
// multiple of that; rows and panels that are too many hold anything, since nobody reads what comes
// of them. All of these instructions take subnormal numbers for zero.

// The inner dimension of a product is a multiple of these.
constexpr i64 kTileWords = 16, kTileNumbers = 32;

// Rows of a matrix in panels.
struct Panels {
  float* at;
  i64 step, panel;  // between two rows of a panel, and between two panels
};

#ifdef DEFORMND_PAIRS

// to[i] = the pair of low[i] and high[i]; values that bfloat16 holds. `to` may be `low`.
inline void pair_up(const float* low, const float* high, i64 n, float* to) {
  for (i64 i = 0; i < n; i++)
    to[i] = from_bits(to_bits(low[i]) >> 16 | (to_bits(high[i]) & 0xffff0000));
}

// Field::load of a field of bfloat16, as `words` words. Of every 2 `lanes` channels, i and lanes +
// i are a pair. Channels from `count` on are zero.
NOINLINE void load_pairs(const Field<float>& field, i64 image, i64 channel, i64 count, i64 pixel,
                         i64 n, i64 lanes, i64 words, float* to, i64 step, float* scratch) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(field.array.data);
  if (field.array.last) {
    for (i64 p = 0; p < n; p++) {
      uint16_t row[4 * kTileWords] = {};
      memcpy(row, from + field.at(image, channel, pixel + p), size_t(count) * 2);
      for (i64 w = 0; w < words; w += lanes)
        for (i64 i = 0; i < lanes; i++)
          to[p * step + w + i] = from_bits(row[2 * w + i] | uint32_t(row[2 * w + lanes + i]) << 16);
    }
    return;
  }
  for (i64 w = 0; w < words; w++) {
    const i64 c = w + w / lanes * lanes;
    const uint16_t* low = from + field.at(image, channel + c, pixel);
    const uint16_t* high = low + lanes * field.pixels;
    float* row = scratch + w * n;
    if (c >= count)
      memset(row, 0, size_t(n) * sizeof(float));
    else if (c + lanes >= count)
      for (i64 p = 0; p < n; p++) row[p] = from_bits(low[p]);
    else
      for (i64 p = 0; p < n; p++) row[p] = from_bits(low[p] | uint32_t(high[p]) << 16);
  }
  transpose(scratch, n, to, step, n, words);
}

// The two vectors that N words hold.
template <int N>
INLINE void split(const void* words, typename Lanes<float, N>::V* to) {
  typename Lanes<float, N>::I both;
  memcpy(&both, words, sizeof both);
  to[0] = (typename Lanes<float, N>::V)(both << 16);
  to[1] = (typename Lanes<float, N>::V)(both & i32(0xffff0000));
}

// The numbers of two vectors, rounded to bfloat16: first those of `low`, then those of `high`.
template <int N>
INLINE typename Lanes<float, N>::V narrow(typename Lanes<float, N>::V low,
                                          typename Lanes<float, N>::V high) {
  using V = typename Lanes<float, N>::V;
  if constexpr (N == 16)
    return (V)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  else if constexpr (N == 8)
    return (V)_mm256_cvtne2ps_pbh((__m256)high, (__m256)low);
  else
    return (V)_mm_cvtne2ps_pbh((__m128)high, (__m128)low);
}

// The words of two vectors, whose numbers are rounded to bfloat16.
template <int N>
INLINE typename Lanes<float, N>::V pair(typename Lanes<float, N>::V low,
                                        typename Lanes<float, N>::V high) {
  using V = typename Lanes<float, N>::V;
  const V both = narrow<N>(low, high);
  if constexpr (N == 16) {
    typedef short Numbers __attribute__((vector_size(64)));
    const Numbers order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (V)_mm512_permutexvar_epi16((__m512i)order, (__m512i)both);
  } else if constexpr (N == 8) {
    typedef short Numbers __attribute__((vector_size(32)));
    const Numbers order = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
    return (V)_mm256_permutexvar_epi16((__m256i)order, (__m256i)both);
  } else {
    return (V)_mm_unpacklo_epi16((__m128i)both, _mm_srli_si128((__m128i)both, 8));
  }
}

// Field::store of a field of bfloat16. Pairs of pixels are transposed, 32 pixels of 16 channels at
// a time, so `from` has memory for a multiple of 16 channels.
NOINLINE void store_pairs(const Field<float>& field, i64 image, i64 channel, i64 count, i64 pixel,
                          i64 n, const float* from, i64 step, float* scratch) {
  if (field.array.last) return field.store(image, channel, count, pixel, n, from, step, scratch);
  using L = Lanes<float, 16>;
  uint16_t* to = reinterpret_cast<uint16_t*>(field.array.data) + field.at(image, channel, pixel);
  for (i64 p = 0; p < n; p += 32)
    for (i64 c = 0; c < count; c += 16) {
      const __mmask32 inside = n - p < 32 ? (1u << (n - p)) - 1 : ~0u;
      L::V words[16];
      UNROLL
      for (int i = 0; i < 16; i++) {
        const float* row = from + least(p + 2 * i, n - 1) * step + c;
        const float* next = from + least(p + 2 * i + 1, n - 1) * step + c;
        words[i] = pair<16>(L::load(row), L::load(next));
      }
      L::transpose<16>(words);
      UNROLL
      for (int i = 0; i < 16; i++)
        if (c + i < count)
          _mm512_mask_storeu_epi16(to + (c + i) * field.pixels + p, inside, (__m512i)words[i]);
    }
}

// Conversion between four neighbouring numbers and a vector.
INLINE Lanes<float, 4>::V widen4(const void* numbers) {
  return (Lanes<float, 4>::V)_mm_slli_epi32(
      _mm_cvtepu16_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(numbers))), 16);
}
INLINE void narrow4(Lanes<float, 4>::V vector, void* numbers) {
  _mm_storel_epi64(static_cast<__m128i*>(numbers), (__m128i)_mm_cvtneps_pbh((__m128)vector));
}

// C[R, NV vectors] (+)= A[R, inner] B[inner, NV vectors], by AVX512-BF16.
template <int R, int NV>
NOINLINE void pair_kernel(i64 inner, const float* RESTRICT a, i64 a_step, const float* RESTRICT b,
                          i64 b_step, float* RESTRICT c, i64 c_step, bool accumulate) {
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
    for (int j = 0; j < NV; j++) row[j] = (__m512bh)_mm512_loadu_ps(b + k * b_step + j * 16);
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

// The same for 16 R rows, by AMX; `inner` is a multiple of kTileWords. Registers 0 to 3 hold C, 4
// and 5 two tiles of A below each other, 6 and 7 two tiles of B side by side.
template <int R, int NV>
NOINLINE void tile_kernel(i64 inner, const float* a, i64 a_step, const float* b, i64 b_step,
                          float* c, i64 c_step, bool accumulate) {
  const float* low_a = a + 16 * a_step;
  float* low_c = c + 16 * c_step;
  const i64 a_bytes = a_step * 4, b_bytes = b_step * 4, c_bytes = c_step * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if (NV == 2) _tile_loadd(1, c + 16, c_bytes);
    if (R == 2) _tile_loadd(2, low_c, c_bytes);
    if (R == 2 && NV == 2) _tile_loadd(3, low_c + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (i64 k = 0; k < inner; k += kTileWords) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * b_step, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (NV == 2) {
      _tile_loadd(7, b + k * b_step + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, low_a + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (NV == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (NV == 2) _tile_stored(1, c + 16, c_bytes);
  if (R == 2) _tile_stored(2, low_c, c_bytes);
  if (R == 2 && NV == 2) _tile_stored(3, low_c + 16, c_bytes);
}

#ifdef DEFORMND_SANITIZE
// Read what a tile is loaded from, since the sanitizer does not see the instruction that loads it.
NOINLINE void see(const float* at, i64 step, i64 rows, i64 count) {
  volatile float read;
  for (i64 r = 0; r < rows; r++)
    for (i64 i = 0; i < count; i++) read = at[r * step + i];
  (void)read;
}
#else
inline void see(const float*, i64, i64, i64) {}
#endif

// What the instruction LDTILECFG reads: all eight registers have 16 rows of 64 bytes.
struct TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
alignas(64) const TileShapes kTileShapes = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

using PairKernel = void (*)(i64, const float*, i64, const float*, i64, float*, i64, bool);

template <int NV, int... R>
PairKernel pair_kernel_of(bool tiles, i64 rows, Seq<R...>) {
  static constexpr PairKernel table[] = {pair_kernel<R + 1, NV>...};
  return !tiles ? table[rows - 1] : rows > 16 ? tile_kernel<2, NV> : tile_kernel<1, NV>;
}

// C[rows, panels] (+)= A B, in panels of `vectors` vectors; `inner` counts words and is a multiple
// of kTileWords. With `tiles`, A and C have memory for a multiple of 16 rows.
// The shapes of the tiles are a state of this thread, and other libraries use shapes of their own.
// So they are set here and released at the end, which takes as long as some ten of hundreds of
// products.
void multiply_pairs(bool tiles, int vectors, i64 rows, i64 panels, i64 inner, const float* a,
                    i64 a_step, Panels b, Panels c, bool accumulate) {
  constexpr int most_rows = Machine<float>::rows;
  using All = typename MakeSeq<most_rows>::type;
  if (tiles) _tile_loadconfig(&kTileShapes);
  const i64 height = tiles ? 32 : most_rows;
  for (i64 j = 0; j < panels; j++)
    for (i64 i = 0; i < rows; i += height) {
      const i64 some = least(height, rows - i);
      const PairKernel kernel = vectors == 1 ? pair_kernel_of<1>(tiles, some, All{})
                                             : pair_kernel_of<2>(tiles, some, All{});
      const float *from_a = a + i * a_step, *from_b = b.at + j * b.panel;
      float* to = c.at + j * c.panel + i * c.step;
      if (tiles) {
        see(from_a, a_step, round_up(some, 16), inner);
        see(from_b, b.step, inner, 16 * vectors);
        see(to, c.step, round_up(some, 16), 16 * vectors);
      }
      kernel(inner, from_a, a_step, from_b, b.step, to, c.step, accumulate);
    }
  if (tiles) _tile_release();
}

#else

// Without bfloat16 these are never called, but templates name them.
void pair_up(const float*, const float*, i64, float*);
template <class Field>
void load_pairs(const Field&, i64, i64, i64, i64, i64, i64, i64, float*, i64, float*);
template <class Field>
void store_pairs(const Field&, i64, i64, i64, i64, i64, const float*, i64, float*);
template <int N>
void split(const void*, typename Lanes<float, N>::V*);
template <int N>
typename Lanes<float, N>::V narrow(typename Lanes<float, N>::V, typename Lanes<float, N>::V);
template <int N>
typename Lanes<float, N>::V pair(typename Lanes<float, N>::V, typename Lanes<float, N>::V);
Lanes<float, 4>::V widen4(const void*);
void narrow4(Lanes<float, 4>::V, void*);
void multiply_pairs(bool, int, i64, i64, i64, const float*, i64, Panels, Panels, bool);

#endif

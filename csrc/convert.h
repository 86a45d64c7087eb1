// Conversion between tensors of any type and layout and rows of the computing type.
// Included by kernel.cpp inside the namespace of one instruction set.

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

// The conversions have no branches, so that the compiler can make vectors of them.
inline float from_half(uint16_t h) {
  const uint32_t exponent_mantissa = uint32_t(h & 0x7fff) << 13;
  const uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  // The factor is 2^112, since float's exponents are biased by 112 more than half's.
  const float scaled = from_bits(exponent_mantissa) * from_bits(0x77800000u);
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

// Bring into the cache what will be read later. The range may lie past the array's end, where this
// has no effect. Addresses are computed as integers, since a pointer there would be undefined.
inline void prefetch(const Array& a, i64 at, i64 n) {
  const i64 size = bytes_of(a.dtype), first = i64(reinterpret_cast<intptr_t>(a.data)) + at * size;
  for (i64 line = first & -64; line < first + n * size; line += 64)
    PREFETCH(reinterpret_cast<const void*>(static_cast<intptr_t>(line)));
}

// to[i] = f(from[i]), 16 at a time. The compiler's own loops would do more elements at a time and
// leave long ends to single steps, which counts here, since the runs are short.
template <class From, class To, class F>
INLINE void convert(const From* RESTRICT from, i64 n, To* RESTRICT to, const F& f) {
  for (i64 first = 0; first < n; first += 16) {
    if (n < 16) {
      for (i64 i = 0; i < n; i++) to[i] = f(from[i]);
      return;
    }
    const i64 at = least(first, n - 16);  // The last step overlaps the one before.
    for (i64 i = 0; i < 16; i++) to[at + i] = f(from[at + i]);
  }
}

template <class T>
NOINLINE void read(const Array& a, i64 at, i64 n, T* RESTRICT to) {
  const char* from = a.data + at * bytes_of(a.dtype);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  if (a.dtype == DtypeOf<T>::value)
    memcpy(to, from, size_t(n) * sizeof(T));
  else if (a.dtype == kFloat16)
    convert(halves, n, to, [](uint16_t h) { return T(from_half(h)); });
  else if (a.dtype == kBFloat16)
    convert(halves, n, to, [](uint16_t b) { return T(from_bfloat(b)); });
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
    convert(from, n, halves, [](T f) { return to_half(float(f)); });
  else if (a.dtype == kBFloat16)
    convert(from, n, halves, [](T f) { return to_bfloat(float(f)); });
  else if (a.dtype == kFloat32)
    for (i64 i = 0; i < n; i++) reinterpret_cast<float*>(to)[i] = float(from[i]);
  else
    for (i64 i = 0; i < n; i++) reinterpret_cast<double*>(to)[i] = double(from[i]);
}

// The elements [at, at + n) in the computing type: in place, or else converted into scratch.
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

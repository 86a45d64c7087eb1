// Short vectors: the compiler's own (GCC, clang) or plain arrays (MSVC). Included by kernel.cpp
// inside the namespace of one instruction set.

#if defined(__GNUC__) && !defined(DEFORMND_PLAIN_LANES)
#define DEFORMND_VECTORS 1
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define RESTRICT __restrict__
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define DEFORMND_VECTORS 0
#if defined(_MSC_VER)
#define INLINE __forceinline
#define NOINLINE __declspec(noinline)
#else
#define INLINE inline
#define NOINLINE
#endif
#define RESTRICT __restrict
#define PREFETCH(address) static_cast<void>(address)
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 64")
#else
#define UNROLL
#endif

template <int... I>
struct Seq {};
template <int N, int... I>
struct MakeSeq : MakeSeq<N - 1, N - 1, I...> {};
template <int... I>
struct MakeSeq<0, I...> {
  using type = Seq<I...>;
};

#if !DEFORMND_VECTORS
template <class T, int N>
struct Plain {
  T v[N];
#define LANEWISE(result, expression)               \
  Plain<result, N> r;                              \
  for (int i = 0; i < N; i++) r.v[i] = expression; \
  return r;
  friend INLINE Plain operator+(Plain a, Plain b) { LANEWISE(T, a.v[i] + b.v[i]) }
  friend INLINE Plain operator-(Plain a, Plain b) { LANEWISE(T, a.v[i] - b.v[i]) }
  friend INLINE Plain operator*(Plain a, Plain b) { LANEWISE(T, a.v[i] * b.v[i]) }
  friend INLINE Plain operator&(Plain a, Plain b) { LANEWISE(T, a.v[i] & b.v[i]) }
  friend INLINE Plain<i32, N> operator<(Plain a, Plain b) { LANEWISE(i32, -(a.v[i] < b.v[i])) }
  friend INLINE Plain<i32, N> operator>=(Plain a, Plain b) { LANEWISE(i32, -(a.v[i] >= b.v[i])) }
  friend INLINE Plain<i32, N> operator!=(Plain a, Plain b) { LANEWISE(i32, -(a.v[i] != b.v[i])) }
#undef LANEWISE
};
#endif

// N lanes of T: V values, I 32-bit indices, M masks (a lane is 0 or -1).
template <class T, int N>
struct Lanes {
  static constexpr int size = N;
  using All = typename MakeSeq<N>::type;
#if DEFORMND_VECTORS
  typedef T V __attribute__((vector_size(N * sizeof(T))));
  typedef i32 I __attribute__((vector_size(N * sizeof(i32))));
  typedef decltype(V{} < V{}) M;
  // The compiler folds this to a broadcast. It could not fold s + 0, which is 0 for -0.
  static INLINE V splat(T s) { return s - V{}; }
  static INLINE I splat_index(i32 s) { return s - I{}; }
  static INLINE V select(M m, V a, V b) { return m ? a : b; }
  static INLINE I select_index(M m, I a, I b) { return __builtin_convertvector(m, I) ? a : b; }
  static INLINE M mask(I m) { return __builtin_convertvector(m, M); }
  static INLINE I to_index(V v) { return __builtin_convertvector(v, I); }
  static INLINE V to_value(I v) { return __builtin_convertvector(v, V); }
  template <int... J>
  static INLINE V shuffle(V a, V b, Seq<J...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, J...);
#else
    return __builtin_shuffle(a, b, M{J...});
#endif
  }
  static INLINE T lane(V v, int i) { return v[i]; }
#else
  typedef Plain<T, N> V;
  typedef Plain<i32, N> I;
  typedef Plain<i32, N> M;
#define LANEWISE(result, expression)               \
  result r;                                        \
  for (int i = 0; i < N; i++) r.v[i] = expression; \
  return r;
  static INLINE V splat(T s) { LANEWISE(V, s) }
  static INLINE I splat_index(i32 s) { LANEWISE(I, s) }
  static INLINE V select(M m, V a, V b) { LANEWISE(V, m.v[i] ? a.v[i] : b.v[i]) }
  static INLINE I select_index(M m, I a, I b) { LANEWISE(I, m.v[i] ? a.v[i] : b.v[i]) }
  static INLINE M mask(I m) { return m; }
  static INLINE I to_index(V v) { LANEWISE(I, i32(v.v[i])) }
  static INLINE V to_value(I v) { LANEWISE(V, T(v.v[i])) }
#undef LANEWISE
  template <int... J>
  static INLINE V shuffle(V a, V b, Seq<J...>) {
    return V{{(J < N ? a.v[J % N] : b.v[J % N])...}};
  }
  static INLINE T lane(V v, int i) { return v.v[i]; }
#endif
  static INLINE V zero() { return splat(0); }
  static INLINE V load(const T* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static INLINE void store(T* p, V v) { memcpy(p, &v, sizeof v); }
  static INLINE I load_index(const i32* p) {
    I v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static INLINE void store_index(i32* p, I v) { memcpy(p, &v, sizeof v); }
  // By truncation to an integer and a correction, so |v| must be below 2^31.
  static INLINE V floor(V v) {
    const V f = to_value(to_index(v));
    return f - select(v < f, splat(1), zero());
  }

  // Four values from each of N / 4 places.
  static INLINE V load4(const T* const* from) {
    if constexpr (N == 4) {
      return load(*from);
    } else {
      using Half = Lanes<T, N / 2>;
      return join(Half::load4(from), Half::load4(from + N / 8), All{});
    }
  }
  template <class H, int... J>
  static INLINE V join(H a, H b, Seq<J...>) {
#if DEFORMND_VECTORS && defined(__AVX__)
    if constexpr (N == 8 && sizeof(T) == 4)  // Compilers do not find this order by themselves.
      return (V)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)a), (__m128)b, 1);
#endif
#if DEFORMND_VECTORS && (defined(__clang__) || __GNUC__ >= 12)
    return __builtin_shufflevector(a, b, J...);
#else
    H both[] = {a, b};
    V v;
    memcpy(&v, both, sizeof v);
    return v;
#endif
  }
  // In each block of four lanes, transpose four vectors.
  static INLINE void transpose4(V* a) { transpose4(a, All{}); }
  template <int... J>
  static INLINE void transpose4(V* a, Seq<J...>) {
    const V b[] = {shuffle(a[0], a[1], Seq<(J / 4 * 4 + J % 2 + J % 4 / 2 * N)...>{}),
                   shuffle(a[2], a[3], Seq<(J / 4 * 4 + J % 2 + J % 4 / 2 * N)...>{}),
                   shuffle(a[0], a[1], Seq<(J / 4 * 4 + 2 + J % 2 + J % 4 / 2 * N)...>{}),
                   shuffle(a[2], a[3], Seq<(J / 4 * 4 + 2 + J % 2 + J % 4 / 2 * N)...>{})};
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      a[i] = shuffle(b[i], b[i + 1], Seq<(J / 4 * 4 + J % 2 * 2 + J % 4 / 2 * N)...>{});
      a[i + 1] = shuffle(b[i], b[i + 1], Seq<(J / 4 * 4 + 1 + J % 2 * 2 + J % 4 / 2 * N)...>{});
    }
  }

  template <int... J>
  static INLINE V low(V a, V b, Seq<J...>) {
    return shuffle(a, b, Seq<(J / 2 + J % 2 * N)...>{});
  }
  template <int... J>
  static INLINE V high(V a, V b, Seq<J...>) {
    return shuffle(a, b, Seq<(N / 2 + J / 2 + J % 2 * N)...>{});
  }
  // Transpose Rows vectors in place, from [Rows][N] to [N][Rows]: log2 Rows rounds of interleaving
  // the halves.
  template <int Rows>
  static INLINE void transpose(V* a) {
    UNROLL
    for (int round = 1; round < Rows; round *= 2) {
      V b[Rows];
      UNROLL
      for (int i = 0; i < Rows / 2; i++) {
        b[2 * i] = low(a[i], a[i + Rows / 2], All{});
        b[2 * i + 1] = high(a[i], a[i + Rows / 2], All{});
      }
      UNROLL
      for (int i = 0; i < Rows; i++) a[i] = b[i];
    }
  }

  // In each block of four lanes: (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
  template <int... J>
  static INLINE V add_pairs(V a, V b, Seq<J...>) {
    return shuffle(a, b, Seq<(J / 4 * 4 + J % 2 * 2 + J % 4 / 2 * N)...>{}) +
           shuffle(a, b, Seq<(J / 4 * 4 + J % 2 * 2 + J % 4 / 2 * N + 1)...>{});
  }
  // The sums of the lanes of four vectors.
  static INLINE typename Lanes<T, 4>::V sum4(V a, V b, V c, V d) {
    const V blocks = add_pairs(add_pairs(a, b, All{}), add_pairs(c, d, All{}), All{});
    return Lanes<T, N>::add_blocks(blocks);
  }
  static INLINE typename Lanes<T, 4>::V add_blocks(V v) {
    if constexpr (N == 4) {
      return v;
    } else {
      typename Lanes<T, N / 2>::V half[2];
      memcpy(half, &v, sizeof v);
      return Lanes<T, N / 2>::add_blocks(half[0] + half[1]);
    }
  }
};

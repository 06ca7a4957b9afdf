// Vectors of lanes for one instruction set: the vocabulary of math/lane.h over GCC vector extensions, plus the few
// operations that need an intrinsic to be fast (fused multiply-add, bit <-> lane conversions, wide multiply, 16-bit
// floats). Included once per level, inside namespace fusednorm::cpu::FN_LEVEL, with FN_VECTOR_BYTES set by the level
// file: g++ does not define __AVX2__ and friends after a target pragma, so the width is ours to say.

template <int v>
using Constant = std::integral_constant<int, v>;

// ---- bfloat16 and float16: one vector of floats from and to memory
// Own storage types: no torch header may be compiled with a level's flags.
FN_INLINE float widen_one(BFloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
FN_INLINE uint16_t bfloat16_bits(float f) {  // to nearest even; NaN stays a quiet NaN
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
FN_INLINE float widen_one(Float16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  uint32_t bits;
  float f;
  if (rest >= 0x7c00) {  // infinity, NaN (made quiet, as the instruction does)
    bits = 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0);
  } else {  // the exponent is rebased by a multiplication, which also takes care of denormals
    bits = rest << 13;
    memcpy(&f, &bits, 4);
    f *= 0x1p112f;
    memcpy(&bits, &f, 4);
  }
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}
FN_INLINE uint16_t float16_bits(float f) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // denormal result: let the addition of 0.5 * 2^-23 / 2^-24 round
    float a;
    memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t r;
    memcpy(&r, &a, 4);
    return static_cast<uint16_t>(sign | (r - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

FN_INLINE void narrow_one(float f, BFloat16* h) { h->bits = bfloat16_bits(f); }
FN_INLINE void narrow_one(float f, Float16* h) { h->bits = float16_bits(f); }

#if FN_VECTOR_BYTES == 64
typedef int16_t Words __attribute__((vector_size(64)));
template <class F>
FN_INLINE __m512i word_indices(F f) {  // folds to a constant
  Words r{};
  for (int i = 0; i < 32; ++i) r[i] = static_cast<int16_t>(f(i));
  return (__m512i)r;
}
template <class Raw>
FN_INLINE Raw widen(const BFloat16* p) {  // one shuffle, which leaves the lower halves 0
  const __m512i h = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (Raw)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, word_indices([](int i) FN_LAMBDA_INLINE { return i / 2; }), h);
}
FN_INLINE __m512i rounded(__m512 f, const BFloat16*) {  // in the upper halves
  const __m512i b = (__m512i)f, half = _mm512_set1_epi32(0x7fff), quiet = _mm512_set1_epi32(0x400000);
  const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
  const __m512i even = _mm512_add_epi32(b, _mm512_mask_sub_epi32(half, odd, half, _mm512_set1_epi32(-1)));
  return _mm512_mask_or_epi32(even, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), b, quiet);
}
FN_INLINE void store_narrow(__m512 f, BFloat16* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(f, p), 16)));
}
FN_INLINE __m512i narrow_line(__m512 low, __m512 high, const BFloat16* p) {  // one shuffle instead of four
  const __m512i upper = word_indices([](int i) FN_LAMBDA_INLINE { return 2 * i + 1; });
  return _mm512_permutex2var_epi16(rounded(low, p), upper, rounded(high, p));
}
template <class Raw>
FN_INLINE Raw widen(const Float16* p) {
  return (Raw)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FN_INLINE void store_narrow(__m512 f, Float16* p) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
}
FN_INLINE __m512i narrow_line(__m512 low, __m512 high, const Float16*) {
  const __m256i first = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
}
#elif FN_VECTOR_BYTES == 32
template <class Raw>
FN_INLINE Raw widen(const BFloat16* p) {
  return (Raw)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
FN_INLINE void store_narrow(__m256 f, BFloat16* p) {
  const __m256i b = (__m256i)f, odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  const __m256i w =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, (__m256i)_mm256_cmp_ps(f, f, _CMP_UNORD_Q)), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
template <class Raw>
FN_INLINE Raw widen(const Float16* p) {
  return (Raw)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FN_INLINE void store_narrow(__m256 f, Float16* p) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <class Raw, class T>
FN_INLINE Raw widen(const T* p) {
  Raw r{};
  for (int i = 0; i < static_cast<int>(sizeof(Raw) / sizeof(float)); ++i) r[i] = widen_one(p[i]);
  return r;
}
template <class Raw, class T>
FN_INLINE void store_narrow(Raw f, T* p) {
  for (int i = 0; i < static_cast<int>(sizeof(Raw) / sizeof(float)); ++i) narrow_one(f[i], p + i);
}
#if defined(__SSE2__)
template <class Raw>
FN_INLINE Raw widen(const BFloat16* p) {
  return (Raw)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
}
FN_INLINE void store_narrow(__m128 f, BFloat16* p) {
  const __m128i b = (__m128i)f, odd = _mm_and_si128(_mm_srli_epi32(b, 16), _mm_set1_epi32(1));
  const __m128i rounded = _mm_add_epi32(b, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff)));
  const __m128i quiet = _mm_or_si128(b, _mm_set1_epi32(0x400000)), nan = (__m128i)_mm_cmpunord_ps(f, f);
  const __m128i w = _mm_srai_epi32(_mm_or_si128(_mm_and_si128(nan, quiet), _mm_andnot_si128(nan, rounded)), 16);
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi32(w, w));
}
#endif
#endif

template <class A>
struct SameSizeInt;
template <>
struct SameSizeInt<float> {
  using type = int32_t;
};
template <>
struct SameSizeInt<double> {
  using type = int64_t;
};

template <class A>
struct Vec {
  static constexpr int width = FN_VECTOR_BYTES / sizeof(A);
  using Int = typename SameSizeInt<A>::type;
  typedef A Raw __attribute__((vector_size(FN_VECTOR_BYTES)));
  typedef A Unaligned __attribute__((vector_size(FN_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
  typedef Int Ints __attribute__((vector_size(FN_VECTOR_BYTES)));
  Raw raw;

  Vec() = default;
  FN_INLINE Vec(Raw r) : raw(r) {}
  template <class S, class = std::enable_if_t<std::is_arithmetic_v<S>>>
  FN_INLINE Vec(S s) : raw(static_cast<A>(s) - Raw{}) {}  // minus: -0 must stay -0
  static FN_INLINE Vec load(const A* p) { return Raw(*reinterpret_cast<const Unaligned*>(p)); }
  static FN_INLINE Vec load(const BFloat16* p) { return widen<Raw>(p); }
  static FN_INLINE Vec load(const Float16* p) { return widen<Raw>(p); }
  FN_INLINE void store(A* p) const { *reinterpret_cast<Unaligned*>(p) = raw; }
  FN_INLINE void store(BFloat16* p) const { store_narrow(raw, p); }
  FN_INLINE void store(Float16* p) const { store_narrow(raw, p); }

  friend FN_INLINE Vec operator+(Vec a, Vec b) { return a.raw + b.raw; }
  friend FN_INLINE Vec operator-(Vec a, Vec b) { return a.raw - b.raw; }
  friend FN_INLINE Vec operator*(Vec a, Vec b) { return a.raw * b.raw; }
  friend FN_INLINE Vec operator/(Vec a, Vec b) { return a.raw / b.raw; }
};

// ---- comparisons, selection, and masks from and to bits -------------------------------------------------------------
#if FN_VECTOR_BYTES == 64
template <class A>
struct Mask {
  uint32_t bits;  // a k register
};
FN_INLINE Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) {
  return Vec<float>(_mm512_mask_blend_ps(m.bits, b.raw, a.raw));
}
FN_INLINE Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return Vec<double>(_mm512_mask_blend_pd(m.bits, b.raw, a.raw));
}
FN_INLINE Mask<float> less(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LT_OQ)}; }
FN_INLINE Mask<double> less(Vec<double> a, Vec<double> b) { return {_mm512_cmp_pd_mask(a.raw, b.raw, _CMP_LT_OQ)}; }
FN_INLINE Mask<float> less_equal(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.raw, b.raw, _CMP_LE_OQ)}; }
FN_INLINE Mask<double> less_equal(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.raw, b.raw, _CMP_LE_OQ)};
}
template <class A>
FN_INLINE Mask<A> both(Mask<A> a, Mask<A> b) {
  return {a.bits & b.bits};
}
template <class A>
FN_INLINE Mask<A> negate(Mask<A> m) {
  return {~m.bits & ((1u << Vec<A>::width) - 1)};
}
template <class A>
FN_INLINE uint32_t to_bits(Mask<A> m) {
  return m.bits;
}
// Lanes [i*width, (i+1)*width) of a word of 32 bits.
template <class A>
FN_INLINE Mask<A> from_bits(uint32_t word, int i) {
  return {(word >> (i * Vec<A>::width)) & ((1u << Vec<A>::width) - 1)};
}
#else
template <class A>
struct Mask {
  typename Vec<A>::Ints lanes;  // 0 or -1
};
template <class A>
FN_INLINE Vec<A> select(Mask<A> m, Vec<A> a, Vec<A> b) {
  return Vec<A>(m.lanes ? a.raw : b.raw);
}
template <class A>
FN_INLINE Mask<A> less(Vec<A> a, Vec<A> b) {
  return {a.raw < b.raw};
}
template <class A>
FN_INLINE Mask<A> less_equal(Vec<A> a, Vec<A> b) {
  return {a.raw <= b.raw};
}
template <class A>
FN_INLINE Mask<A> both(Mask<A> a, Mask<A> b) {
  return {a.lanes & b.lanes};
}
template <class A>
FN_INLINE Mask<A> negate(Mask<A> m) {
  return {~m.lanes};
}
#if FN_VECTOR_BYTES == 32
FN_INLINE uint32_t to_bits(Mask<float> m) { return _mm256_movemask_ps((__m256)m.lanes); }
FN_INLINE uint32_t to_bits(Mask<double> m) { return _mm256_movemask_pd((__m256d)m.lanes); }
#elif defined(__SSE2__)
FN_INLINE uint32_t to_bits(Mask<float> m) { return _mm_movemask_ps((__m128)m.lanes); }
FN_INLINE uint32_t to_bits(Mask<double> m) { return _mm_movemask_pd((__m128d)m.lanes); }
#else
template <class A>
FN_INLINE uint32_t to_bits(Mask<A> m) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec<A>::width; ++i) bits |= (m.lanes[i] & 1u) << i;
  return bits;
}
#endif
template <class A>
FN_INLINE Mask<A> test_bits(uint32_t word, int first) {
  using Int = typename Vec<A>::Int;
  typename Vec<A>::Ints k{};
  for (int lane = 0; lane < Vec<A>::width; ++lane) k[lane] = Int(1) << (first + lane);  // folds to a constant
  const typename Vec<A>::Ints w = typename Vec<A>::Ints{} + static_cast<Int>(static_cast<int32_t>(word));
  return {(w & k) == k};
}
template <class A>
FN_INLINE Mask<A> from_bits(uint32_t word, int i) {
  return test_bits<A>(word >> (i * Vec<A>::width), 0);
}
template <class A, int i>
FN_INLINE Mask<A> from_bits(uint32_t word, Constant<i>) {  // one broadcast of the word serves all vectors of the block
  return test_bits<A>(word, i * Vec<A>::width);
}
#endif

// ---- arithmetic
#if FN_VECTOR_BYTES == 64
FN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm512_fmadd_ps(a.raw, b.raw, c.raw));
}
FN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm512_fmadd_pd(a.raw, b.raw, c.raw));
}
#elif FN_VECTOR_BYTES == 32
FN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>(_mm256_fmadd_ps(a.raw, b.raw, c.raw));
}
FN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm256_fmadd_pd(a.raw, b.raw, c.raw));
}
#else  // no such instruction in the baseline: rounds twice, one ulp away from the other levels
template <class A>
FN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return a * b + c;
}
#endif

#if FN_VECTOR_BYTES == 64
FN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_min_ps(a.raw, b.raw)); }
FN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return Vec<double>(_mm512_min_pd(a.raw, b.raw)); }
FN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_max_ps(a.raw, b.raw)); }
FN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return Vec<double>(_mm512_max_pd(a.raw, b.raw)); }
#elif FN_VECTOR_BYTES == 32
FN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_min_ps(a.raw, b.raw)); }
FN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return Vec<double>(_mm256_min_pd(a.raw, b.raw)); }
FN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(a.raw, b.raw)); }
FN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return Vec<double>(_mm256_max_pd(a.raw, b.raw)); }
#else
template <class A>
FN_INLINE Vec<A> min(Vec<A> a, Vec<A> b) {
  return select(less(a, b), a, b);
}
template <class A>
FN_INLINE Vec<A> max(Vec<A> a, Vec<A> b) {
  return select(less(b, a), a, b);
}
#endif

template <class A>
FN_INLINE Vec<A> abs(Vec<A> a) {
  const typename Vec<A>::Ints sign = (typename Vec<A>::Ints)Vec<A>(-0.0f).raw;
  return Vec<A>((typename Vec<A>::Raw)((typename Vec<A>::Ints)a.raw & ~sign));
}
template <class A>
FN_INLINE Vec<A> copy_sign(Vec<A> magnitude, Vec<A> sign_of) {
  const typename Vec<A>::Ints sign = (typename Vec<A>::Ints)Vec<A>(-0.0f).raw;
  return Vec<A>((typename Vec<A>::Raw)(((typename Vec<A>::Ints)magnitude.raw & ~sign) |
                                       ((typename Vec<A>::Ints)sign_of.raw & sign)));
}
FN_INLINE Vec<float> power_of_two(Vec<float> t) { return Vec<float>((Vec<float>::Raw)((Vec<float>::Ints)t.raw << 23)); }
FN_INLINE Vec<float> split_exponent(Vec<float> x, Vec<float>& e) {
  const Vec<float>::Ints bits = (Vec<float>::Ints)x.raw;
  e = Vec<float>(__builtin_convertvector((bits >> 23) - 127, Vec<float>::Raw));
  return Vec<float>((Vec<float>::Raw)((bits & 0x7fffff) | 0x3f800000));
}
FN_INLINE Vec<float> sqrt(Vec<float> a) {
#if FN_VECTOR_BYTES == 64
  return Vec<float>(_mm512_sqrt_ps(a.raw));
#elif FN_VECTOR_BYTES == 32
  return Vec<float>(_mm256_sqrt_ps(a.raw));
#else
  for (int i = 0; i < Vec<float>::width; ++i) a.raw[i] = ::sqrtf(a.raw[i]);
  return a;
#endif
}
template <class F>
FN_INLINE Vec<double> map(Vec<double> a, F f) {
  for (int i = 0; i < Vec<double>::width; ++i) a.raw[i] = f(a.raw[i]);
  return a;
}

// The two halves of a vector of floats, in double.
struct DoublePair {
  Vec<double> low, high;
};
FN_INLINE DoublePair widen(Vec<float> a) {
  typedef float Half __attribute__((vector_size(FN_VECTOR_BYTES / 2)));
  Half h[2];
  memcpy(h, &a.raw, sizeof(h));
  return {Vec<double>(__builtin_convertvector(h[0], Vec<double>::Raw)),
          Vec<double>(__builtin_convertvector(h[1], Vec<double>::Raw))};
}

#if FN_VECTOR_BYTES >= 32
FN_INLINE Vec<float> exact_fma(Vec<float> a, Vec<float> b, Vec<float> c) { return fma(a, b, c); }
#elif defined(__SSE2__)
// The product is exact in double. A sum rounded to odd (its error is known: Knuth's two-sum) may be rounded once more
// and is what one rounding had made of it (Boldo & Melquiond 2008).
FN_INLINE Vec<double> multiply_add_to_odd(Vec<double> a, Vec<double> b, Vec<double> c) {
  using Ints = Vec<double>::Ints;
  const Vec<double> product = a * b, sum = product + c, added = sum - product;
  const Vec<double> error = (product - (sum - added)) + (c - added);
  const Vec<double>::Raw zero{};
  const Ints bits = (Ints)sum.raw, towards_zero = (sum.raw < zero) ^ (error.raw < zero);
  const Ints step = (error.raw != zero) & ~bits & 1;
  return Vec<double>((Vec<double>::Raw)(bits + ((step ^ towards_zero) - towards_zero)));
}
FN_INLINE Vec<float> exact_fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  const DoublePair x = widen(a), y = widen(b), z = widen(c);
  const Vec<double> low = multiply_add_to_odd(x.low, y.low, z.low), high = multiply_add_to_odd(x.high, y.high, z.high);
  return Vec<float>(_mm_movelh_ps(_mm_cvtpd_ps(low.raw), _mm_cvtpd_ps(high.raw)));
}
#endif

// Multipliers are floats, whatever the type that they multiply.
template <class A>
FN_INLINE Vec<A> load_floats(const float* p) {
  if constexpr (sizeof(A) == sizeof(float)) {
    return Vec<A>::load(p);
  } else {
    typedef float Half __attribute__((vector_size(FN_VECTOR_BYTES / 2), aligned(4), may_alias));
    return Vec<A>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), typename Vec<A>::Raw));
  }
}

// ---- 32-bit words for Philox, one per 64-bit lane; what stands above the low 32 bits is garbage
#if defined(__SSE2__)
struct Word {
  static constexpr int width = FN_VECTOR_BYTES / 8;
  typedef uint64_t Raw __attribute__((vector_size(FN_VECTOR_BYTES)));
  Raw raw;
  Word() = default;
  FN_INLINE Word(Raw r) : raw(r) {}
  FN_INLINE Word(uint32_t s) : raw(Raw{} + s) {}
};
FN_INLINE Word xor3(Word a, Word b, Word c) {
#if FN_VECTOR_BYTES == 64
  return (Word::Raw)_mm512_ternarylogic_epi64((__m512i)a.raw, (__m512i)b.raw, (__m512i)c.raw, 0x96);
#else
  return a.raw ^ b.raw ^ c.raw;
#endif
}
FN_INLINE void multiply_wide(Word a, uint32_t b, Word& high, Word& low) {
#if FN_VECTOR_BYTES == 64
  low.raw = (Word::Raw)_mm512_mul_epu32((__m512i)a.raw, _mm512_set1_epi64(b));
#elif FN_VECTOR_BYTES == 32
  low.raw = (Word::Raw)_mm256_mul_epu32((__m256i)a.raw, _mm256_set1_epi64x(b));
#else
  low.raw = (Word::Raw)_mm_mul_epu32((__m128i)a.raw, _mm_set1_epi64x(b));
#endif
  high.raw = low.raw >> 32;
}
// 32-bit lanes: even ones from a, odd ones from b.
FN_INLINE Word::Raw interleave(Word a, Word b) {
#if FN_VECTOR_BYTES == 64
  return (Word::Raw)_mm512_mask_blend_epi32(0xAAAA, (__m512i)a.raw, (__m512i)(b.raw << 32));
#elif FN_VECTOR_BYTES == 32
  return (Word::Raw)_mm256_blend_epi32((__m256i)a.raw, (__m256i)(b.raw << 32), 0xAA);
#else
  return (a.raw & (Word::Raw{} + 0xffffffffu)) | (b.raw << 32);
#endif
}

// Two draws each, one in either half, as floats: exact.
FN_INLINE Vec<float> low_draws(Word::Raw w) {
  return Vec<float>(__builtin_convertvector((Vec<float>::Ints)w & 0xffff, Vec<float>::Raw));
}
FN_INLINE Vec<float> high_draws(Word::Raw w) {
  typedef uint32_t Unsigned __attribute__((vector_size(FN_VECTOR_BYTES)));
  return Vec<float>(__builtin_convertvector((Vec<float>::Ints)((Unsigned)w >> 16), Vec<float>::Raw));
}
// The words themselves, rounded to nearest. Two halves where no instruction does it: the product is exact.
FN_INLINE Vec<float> words_as_floats(Word::Raw w) {
#if FN_VECTOR_BYTES == 64
  return Vec<float>(_mm512_cvtepu32_ps((__m512i)w));
#else
  return fma(high_draws(w), Vec<float>(65536.0f), low_draws(w));
#endif
}

// v[i] becomes the transpose of the 4 x 4 matrix in every 128 bits.
FN_INLINE void transpose4(Vec<float> (&v)[4]) {
#if FN_VECTOR_BYTES == 64
  const __m512d a = (__m512d)_mm512_unpacklo_ps(v[0].raw, v[1].raw),
                b = (__m512d)_mm512_unpackhi_ps(v[0].raw, v[1].raw);
  const __m512d c = (__m512d)_mm512_unpacklo_ps(v[2].raw, v[3].raw),
                d = (__m512d)_mm512_unpackhi_ps(v[2].raw, v[3].raw);
  v[0] = Vec<float>((__m512)_mm512_unpacklo_pd(a, c));
  v[1] = Vec<float>((__m512)_mm512_unpackhi_pd(a, c));
  v[2] = Vec<float>((__m512)_mm512_unpacklo_pd(b, d));
  v[3] = Vec<float>((__m512)_mm512_unpackhi_pd(b, d));
#elif FN_VECTOR_BYTES == 32
  const __m256d a = (__m256d)_mm256_unpacklo_ps(v[0].raw, v[1].raw),
                b = (__m256d)_mm256_unpackhi_ps(v[0].raw, v[1].raw);
  const __m256d c = (__m256d)_mm256_unpacklo_ps(v[2].raw, v[3].raw),
                d = (__m256d)_mm256_unpackhi_ps(v[2].raw, v[3].raw);
  v[0] = Vec<float>((__m256)_mm256_unpacklo_pd(a, c));
  v[1] = Vec<float>((__m256)_mm256_unpackhi_pd(a, c));
  v[2] = Vec<float>((__m256)_mm256_unpacklo_pd(b, d));
  v[3] = Vec<float>((__m256)_mm256_unpackhi_pd(b, d));
#else
  const __m128d a = (__m128d)_mm_unpacklo_ps(v[0].raw, v[1].raw), b = (__m128d)_mm_unpackhi_ps(v[0].raw, v[1].raw);
  const __m128d c = (__m128d)_mm_unpacklo_ps(v[2].raw, v[3].raw), d = (__m128d)_mm_unpackhi_ps(v[2].raw, v[3].raw);
  v[0] = Vec<float>((__m128)_mm_unpacklo_pd(a, c));
  v[1] = Vec<float>((__m128)_mm_unpackhi_pd(a, c));
  v[2] = Vec<float>((__m128)_mm_unpacklo_pd(b, d));
  v[3] = Vec<float>((__m128)_mm_unpackhi_pd(b, d));
#endif
}

// The draws of Word::width consecutive counters, 8 each, counter after counter.
FN_INLINE void draws_of_words(Word::Raw first, Word::Raw second, Vec<float> (&draws)[4]) {
#if FN_VECTOR_BYTES == 64
  const __m512i low = _mm512_unpacklo_epi64((__m512i)first, (__m512i)second);
  const __m512i high = _mm512_unpackhi_epi64((__m512i)first, (__m512i)second);
  const auto widen = [](__m256i h)
                         FN_LAMBDA_INLINE { return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(h))); };
  draws[0] = widen(_mm512_castsi512_si256(low));
  draws[1] = widen(_mm512_extracti64x4_epi64(low, 1));
  draws[2] = widen(_mm512_castsi512_si256(high));
  draws[3] = widen(_mm512_extracti64x4_epi64(high, 1));
#elif FN_VECTOR_BYTES == 32
  const __m256i low = _mm256_unpacklo_epi64((__m256i)first, (__m256i)second);
  const __m256i high = _mm256_unpackhi_epi64((__m256i)first, (__m256i)second);
  const auto widen = [](__m128i h)
                         FN_LAMBDA_INLINE { return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(h))); };
  draws[0] = widen(_mm256_castsi256_si128(low));
  draws[1] = widen(_mm256_castsi256_si128(high));
  draws[2] = widen(_mm256_extracti128_si256(low, 1));
  draws[3] = widen(_mm256_extracti128_si256(high, 1));
#else
  const __m128i zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi64((__m128i)first, (__m128i)second);
  const __m128i high = _mm_unpackhi_epi64((__m128i)first, (__m128i)second);
  draws[0] = Vec<float>(_mm_cvtepi32_ps(_mm_unpacklo_epi16(low, zero)));
  draws[1] = Vec<float>(_mm_cvtepi32_ps(_mm_unpackhi_epi16(low, zero)));
  draws[2] = Vec<float>(_mm_cvtepi32_ps(_mm_unpacklo_epi16(high, zero)));
  draws[3] = Vec<float>(_mm_cvtepi32_ps(_mm_unpackhi_epi16(high, zero)));
#endif
}
#endif

// Vectors of lanes for one instruction set: the vocabulary of math/lane.h over GCC vector extensions, plus the few
// operations that need an intrinsic to be fast (fused multiply-add, bit <-> lane conversions, wide multiply, 16-bit
// floats). Included once per level, inside namespace fusednorm::cpu::FN_LEVEL, with FN_VECTOR_BYTES set by the level
// file: g++ does not define __AVX2__ and friends after a target pragma, so the width is ours to say.

template <int v>
using Constant = std::integral_constant<int, v>;

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
  FN_INLINE void store(A* p) const { *reinterpret_cast<Unaligned*>(p) = raw; }

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

// ---- arithmetic ------------------------------------------------------------------------------------------------------
#if FN_VECTOR_BYTES == 64
FN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return Vec<float>(_mm512_fmadd_ps(a.raw, b.raw, c.raw)); }
FN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm512_fmadd_pd(a.raw, b.raw, c.raw));
}
#elif FN_VECTOR_BYTES == 32
FN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return Vec<float>(_mm256_fmadd_ps(a.raw, b.raw, c.raw)); }
FN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>(_mm256_fmadd_pd(a.raw, b.raw, c.raw));
}
#else  // no such instruction in the baseline: rounds twice, one ulp away from the other levels
template <class A>
FN_INLINE Vec<A> fma(Vec<A> a, Vec<A> b, Vec<A> c) {
  return a * b + c;
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
FN_INLINE Vec<float> power_of_two(Vec<float> t) {
  return Vec<float>((Vec<float>::Raw)(((Vec<float>::Ints)t.raw << 23) + 0x3f800000));
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

// ---- 32-bit words for Philox, one per 64-bit lane; what stands above the low 32 bits is garbage ------------------------
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
#endif

// ---- bfloat16 and float16, 32 at a time --------------------------------------------------------------------------------
// Storage types of this backend: no torch header may be compiled with a level's flags.
FN_INLINE float widen_one(BFloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
FN_INLINE BFloat16 narrow_bfloat16(float f) {  // to nearest even; NaN stays a quiet NaN
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
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
FN_INLINE Float16 narrow_float16(float f) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff))};
  if (magnitude >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // denormal result: let the addition of 0.5 * 2^-23 / 2^-24 round
    float a;
    memcpy(&a, &magnitude, 4);
    a += 0.5f;
    uint32_t r;
    memcpy(&r, &a, 4);
    return {static_cast<uint16_t>(sign | (r - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
}

FN_INLINE void widen_block(const BFloat16* x, float* y) {
#if FN_VECTOR_BYTES == 64
  for (int i = 0; i < 32; i += 16) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + i)));
    _mm512_storeu_si512(y + i, _mm512_slli_epi32(w, 16));
  }
#elif FN_VECTOR_BYTES == 32
  for (int i = 0; i < 32; i += 8) {
    const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(x + i)));
    _mm256_storeu_si256((__m256i*)(y + i), _mm256_slli_epi32(w, 16));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < 32; i += 8) {
    const __m128i h = _mm_loadu_si128((const __m128i*)(x + i)), zero = _mm_setzero_si128();
    _mm_storeu_si128((__m128i*)(y + i), _mm_unpacklo_epi16(zero, h));
    _mm_storeu_si128((__m128i*)(y + i + 4), _mm_unpackhi_epi16(zero, h));
  }
#else
  for (int i = 0; i < 32; ++i) y[i] = widen_one(x[i]);
#endif
}
FN_INLINE void narrow_block(const float* x, BFloat16* y) {
#if FN_VECTOR_BYTES == 64
  for (int i = 0; i < 32; i += 16) {
    const __m512 f = _mm512_loadu_ps(x + i);
    const __m512i b = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(0x40));
    const __m512i w = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), r, quiet);
    _mm256_storeu_si256((__m256i*)(y + i), _mm512_cvtepi32_epi16(w));
  }
#elif FN_VECTOR_BYTES == 32
  for (int i = 0; i < 32; i += 16) {
    __m256i half[2];
    for (int j = 0; j < 2; ++j) {
      const __m256 f = _mm256_loadu_ps(x + i + 8 * j);
      const __m256i b = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
      const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
      half[j] = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half[0], half[1]), 0xD8);
    _mm256_storeu_si256((__m256i*)(y + i), packed);
  }
#else
  for (int i = 0; i < 32; ++i) y[i] = narrow_bfloat16(x[i]);
#endif
}
FN_INLINE void widen_block(const Float16* x, float* y) {
#if FN_VECTOR_BYTES == 64
  for (int i = 0; i < 32; i += 16) _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
#elif FN_VECTOR_BYTES == 32
  for (int i = 0; i < 32; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#else
  for (int i = 0; i < 32; ++i) y[i] = widen_one(x[i]);
#endif
}
FN_INLINE void narrow_block(const float* x, Float16* y) {
#if FN_VECTOR_BYTES == 64
  for (int i = 0; i < 32; i += 16) {
    _mm256_storeu_si256((__m256i*)(y + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif FN_VECTOR_BYTES == 32
  for (int i = 0; i < 32; i += 8) {
    _mm_storeu_si128((__m128i*)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < 32; ++i) y[i] = narrow_float16(x[i]);
#endif
}

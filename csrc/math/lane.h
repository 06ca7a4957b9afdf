// The vocabulary in which the formulas of math/ are written: a handful of functions that a scalar and a vector of
// lanes spell differently. Here are the scalar spellings (float, double), for CUDA threads and for the plain path;
// cpu/simd.h adds the same names for vectors. A formula is a template over V and never knows which it got.
//
// Everything in math/ has internal linkage (anonymous namespaces, forced inlining): the CPU backend compiles these
// headers several times with different instruction sets, and a shared weak symbol would let the linker keep the
// AVX-512 copy for every processor.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define FN_INLINE __host__ __device__ __forceinline__
#else
#define FN_INLINE inline __attribute__((always_inline))
#define FN_LAMBDA_INLINE __attribute__((always_inline))
#endif

namespace fusednorm::math {
namespace {

// What a lane type is made of. `element` is the scalar in each lane, `mask` the result of a comparison.
template <class V>
struct Lanes {
  using element = V;
  using mask = bool;
};

template <class V>
using element_t = typename Lanes<V>::element;
template <class V>
using mask_t = typename Lanes<V>::mask;

template <class V>
constexpr bool is_double = sizeof(element_t<V>) == sizeof(double);

FN_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
FN_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }

FN_INLINE float select(bool m, float a, float b) { return m ? a : b; }
FN_INLINE double select(bool m, double a, double b) { return m ? a : b; }
FN_INLINE uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
FN_INLINE bool both(bool a, bool b) { return a && b; }
FN_INLINE bool negate(bool m) { return !m; }
FN_INLINE bool less(float a, float b) { return a < b; }
FN_INLINE bool less(double a, double b) { return a < b; }
FN_INLINE bool less_equal(float a, float b) { return a <= b; }
FN_INLINE bool less_equal(double a, double b) { return a <= b; }

// The second where one is NaN, or both are 0: what x86's instructions do. A GPU's give NaN where one of them is, which
// is the same where the first is a number.
#if __CUDA_ARCH__ >= 800
FN_INLINE float min(float a, float b) {
  asm("min.NaN.f32 %0, %1, %0;" : "+f"(b) : "f"(a));
  return b;
}
FN_INLINE float max(float a, float b) {
  asm("max.NaN.f32 %0, %1, %0;" : "+f"(b) : "f"(a));
  return b;
}
#else
FN_INLINE float min(float a, float b) { return a < b ? a : b; }
FN_INLINE float max(float a, float b) { return a > b ? a : b; }
#endif
FN_INLINE double min(double a, double b) { return a < b ? a : b; }
FN_INLINE double max(double a, double b) { return a > b ? a : b; }

FN_INLINE float abs(float a) { return ::fabsf(a); }
FN_INLINE double abs(double a) { return ::fabs(a); }
FN_INLINE float sqrt(float a) { return ::sqrtf(a); }
FN_INLINE double sqrt(double a) { return ::sqrt(a); }
FN_INLINE float copy_sign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }
FN_INLINE double copy_sign(double magnitude, double sign) { return ::copysign(magnitude, sign); }

// t = kPowers + k for an integer k in [-126, 127]: 2^k. The sum's low bits are that float's exponent.
constexpr float kPowers = 12582912.0f + 127;  // 1.5 * 2^23, which rounds what is added to an integer, and the bias
FN_INLINE float power_of_two(float t) {
  uint32_t bits;
  memcpy(&bits, &t, 4);
  bits <<= 23;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

// x = f * 2^e with f in [1, 2), for a normal x > 0: returns f.
FN_INLINE float split_exponent(float x, float& e) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  e = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  bits = (bits & 0x7fffffu) | 0x3f800000u;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// fma, at whatever price: for what has to be the same bits on a processor without the instruction.
FN_INLINE float exact_fma(float a, float b, float c) { return ::fmaf(a, b, c); }

// Applies a scalar function to every lane: how double reaches libm, whose accuracy it needs and whose speed it can
// afford.
template <class F>
FN_INLINE double map(double a, F f) {
  return f(a);
}

}  // namespace
}  // namespace fusednorm::math

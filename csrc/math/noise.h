// The noise: a pure function of a 64-bit seed and the logical position (channel c, row r = n*S + s), so that every
// device, layout, vector width and thread count draws the same bits.
//
// Philox4x32-R (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11) keyed by the seed; one call gives
// the 16-bit draws of 8 consecutive rows of one channel. Seven rounds are the fewest that pass BigCrush; the published
// known answers are for ten, hence the template parameter.
#pragma once

#include "functions.h"

namespace fusednorm::math {
namespace {

constexpr int kPhiloxRounds = 7;
constexpr int kRowsPerCall = 8;  // 4 words of 32 bits = 8 draws of 16

struct Seed {
  uint32_t low, high;
};
FN_INLINE Seed split_seed(int64_t seed) {
  return {static_cast<uint32_t>(static_cast<uint64_t>(seed)), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

// 32 x 32 -> 64 bits. A lane type of its own (cpu/simd.h) may leave garbage above the low 32 bits of each lane.
FN_INLINE void multiply_wide(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)  // of widened factors nvcc makes two useless additions more
  asm("{.reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%1, %0}, product;}"
      : "=r"(high), "=r"(low)
      : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

template <int Rounds, class Word>
FN_INLINE void philox4x32(Word (&x)[4], Seed key) {
  for (int round = 0; round < Rounds; ++round) {
    Word high0, low0, high1, low1;
    multiply_wide(x[0], 0xD2511F53u, high0, low0);
    multiply_wide(x[2], 0xCD9E8D57u, high1, low1);
    x[0] = xor3(high1, x[1], Word(key.low));
    x[1] = low1;
    x[2] = xor3(high0, x[3], Word(key.high));
    x[3] = low0;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

// The counter of the call that serves rows [8*group, 8*group + 8) of channel c. Stage 0, but for Gaussian noise.
struct Counter {
  uint32_t word[4];
};
FN_INLINE Counter counter(uint64_t group, uint32_t c, uint32_t stage = 0) {
  return {{static_cast<uint32_t>(group), c, static_cast<uint32_t>(group >> 32), stage}};
}

// The draw of row r: lane r mod 8, low half of each word first.
FN_INLINE uint32_t draw16(Seed seed, uint64_t r, uint32_t c) {
  Counter x = counter(r / kRowsPerCall, c);
  philox4x32<kPhiloxRounds>(x.word, seed);
  const uint32_t lane = r % kRowsPerCall;
  return (x.word[lane / 2] >> (16 * (lane % 2))) & 0xffffu;
}

// Bernoulli: keep iff draw16 < threshold. The multiplier uses the realised threshold, which makes its mean exactly 1.
FN_INLINE uint32_t keep_threshold(double p) {
  const double t = ::floor((1.0 - p) * 65536.0 + 0.5);
  return t < 1.0 ? 1u : t > 65535.0 ? 65535u : static_cast<uint32_t>(t);
}
FN_INLINE double keep_scale(uint32_t threshold) { return 65536.0 / threshold; }

// The decisions of one call, from its words: bit i for row 8*group + i of channel c.
FN_INLINE uint32_t keep8(const uint32_t (&word)[4], uint32_t threshold) {
#if __CUDA_ARCH__ >= 900  // two draws at a time: 1 in the half of one that is not below, else 0
  constexpr uint32_t kBoth = 0x10001u;
  const uint32_t most = (threshold - 1) * kBoth, minus_most = (0u - most) & 0xffffu;
  uint32_t dropped = 0;
  for (int i = 0; i < 4; ++i) {
    dropped += __viaddmin_u16x2(__vmaxu2(word[i], most), minus_most * kBoth, kBoth) << (2 * i);
  }
  return ~(dropped | dropped >> 15) & 0xffu;
#else
  uint32_t bits = 0;
  const uint32_t above = threshold << 16;  // both halves are compared where they are the upper one
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>(word[i] << 16 < above) << (2 * i);
    bits |= static_cast<uint32_t>(word[i] < above) << (2 * i + 1);
  }
  return bits;
#endif
}
FN_INLINE uint32_t keep8(Seed seed, uint64_t group, uint32_t c, uint32_t threshold) {
  Counter x = counter(group, c);
  philox4x32<kPhiloxRounds>(x.word, seed);
  return keep8(x.word, threshold);
}

// The other noises are multipliers in float, whatever the tensor's type.
//
// Uniform on (1 - beta, 1 + beta) (Uout: Li et al. 2018), from a 16-bit draw: the 65536 values are symmetric about 1.
template <class V>
FN_INLINE V uniform_multiplier(V draw, V beta) {
  const V t = fma(draw, V(0x1p-15f), V(0x1p-16f - 1.0f));  // (2 draw + 1) / 65536 - 1, exactly
  return exact_fma(beta, t, V(1.0f));
}

// Gaussian N(1, sigma^2) (Srivastava et al. 2014, section 10), two from two 32-bit words rounded to float (Box & Muller
// 1958). A row needs 32 bits: the calls of stage 0 serve rows 0 to 3 of a group of 8, those of stage 1 the rows 4 to 7.
template <class V>
FN_INLINE void gaussian_multipliers(V radius_word, V angle_word, V sigma, V& first, V& second) {
  const V u = exact_fma(radius_word, V(0x1p-32f), V(0x1p-33f));  // (0, 1]: no infinity, at most 6.8 sigma
  const V radius = sigma * sqrt(V(-2.0f) * log_unit(u));
  V sine, cosine;
  sincos_pi(exact_fma(angle_word, V(0x1p-31f), V(-1.0f)), sine, cosine);
  first = exact_fma(radius, cosine, V(1.0f));
  second = exact_fma(radius, sine, V(1.0f));
}

// The multipliers of one call, from its words; of Gaussian noise those of 4 rows.
FN_INLINE void uniform8(const uint32_t (&word)[4], float beta, float (&m)[kRowsPerCall]) {
  for (int i = 0; i < 4; ++i) {
    m[2 * i] = uniform_multiplier(static_cast<float>(word[i] & 0xffffu), beta);
    m[2 * i + 1] = uniform_multiplier(static_cast<float>(word[i] >> 16), beta);
  }
}
FN_INLINE void gaussian4(const uint32_t (&word)[4], float sigma, float* m) {
  for (int i = 0; i < 4; i += 2) {
    gaussian_multipliers(static_cast<float>(word[i]), static_cast<float>(word[i + 1]), sigma, m[i], m[i + 1]);
  }
}

// The multipliers of rows [8*group, 8*group + 8) of channel c, one thread's or one lane's worth.
FN_INLINE void uniform8(Seed seed, uint64_t group, uint32_t c, float beta, float (&m)[kRowsPerCall]) {
  Counter x = counter(group, c);
  philox4x32<kPhiloxRounds>(x.word, seed);
  uniform8(x.word, beta, m);
}
FN_INLINE void gaussian8(Seed seed, uint64_t group, uint32_t c, float sigma, float (&m)[kRowsPerCall]) {
  for (uint32_t stage = 0; stage < 2; ++stage) {
    Counter x = counter(group, c, stage);
    philox4x32<kPhiloxRounds>(x.word, seed);
    gaussian4(x.word, sigma, m + 4 * stage);
  }
}

}  // namespace
}  // namespace fusednorm::math

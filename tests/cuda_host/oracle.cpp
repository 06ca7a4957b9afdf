// The noise, row by row, from its definition in math/noise.h: what the kernels' m must be, bit for bit. A shared
// library of its own; tests/definition.py says the same once more, without that header.
#include "../math/noise.h"

using namespace fusednorm::math;

// m of (N, C, S), channels-first. kind: 1 Bernoulli, 2 uniform, 3 Gaussian; granularity: 0 element, 1 channel, 2
// sample.
extern "C" void multipliers(int kind, int granularity, double strength, int64_t seed_value, int64_t N, int64_t C,
                            int64_t S, double* m) {
  const Seed seed = split_seed(seed_value);
  const uint32_t threshold = keep_threshold(strength);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t s = 0; s < S; ++s) {
        const int64_t r = granularity == 0 ? n * S + s : n;
        const uint32_t channel = granularity == 2 ? 0 : static_cast<uint32_t>(c);
        float eight[kRowsPerCall];
        if (kind == 2) uniform8(seed, r / kRowsPerCall, channel, static_cast<float>(strength), eight);
        if (kind == 3) gaussian8(seed, r / kRowsPerCall, channel, static_cast<float>(::sqrt(strength)), eight);
        *m++ =
            kind == 1 ? (draw16(seed, r, channel) < threshold ? keep_scale(threshold) : 0.0) : eight[r % kRowsPerCall];
      }
    }
  }
}

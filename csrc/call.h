// One call of the operator in canonical form, as both backends' kernels understand it: no Tensor, no string.
//
//   u = before(x),  z = (u - mean) * scale + shift,  y = after(z)
#pragma once

#include <cstdint>

namespace fusednorm {

// Any input as (N, C, S), in one of two dense layouts. A 2-D input is channels-last with S = 1.
struct Shape {
  int64_t N, C, S;
  bool channels_last;  // a matrix of N*S rows and C columns; otherwise N*C rows of S
  int64_t rows() const { return N * S; }
};

// The noise m, and the row r and channel of its draws. Constant: m = multiplier for all, and nothing is drawn.
enum class Noise { constant, bernoulli, uniform, gaussian };
enum class Granularity { element, channel, sample };  // r = n*S + s; r = n; r = n in channel 0

constexpr uint32_t kAllKept = 65536;  // as a threshold

enum class Stage : uint8_t { none, add, act, drop };

// The elementwise stages around the norm. Those that would do nothing have been left out, so the default order with
// neither activation nor live noise has none at all.
struct Chain {
  Stage before[2], after[3];  // in order; `none` fills up
  int activation;             // index into math::Activations
  double parameters[2];
  bool one_bit;     // the activation's derivative is 0 or 1
  bool has_weight;  // its parameter is a per-channel vector (PReLU)
  bool gaps;        // there may be rows that do not count
  Noise noise;
  Granularity granularity;
  uint32_t threshold;  // Bernoulli: keep iff draw16 < threshold; kAllKept, 0: where p is a tensor's value
  double multiplier;   // Bernoulli: of what is kept; constant: of everything
  float strength;      // uniform: beta; Gaussian: standard deviation

  // Where a stage stands in `after`, or -1.
  int after_at(Stage stage) const {
    for (int i = 0; i < 3; ++i) {
      if (after[i] == stage) return i;
    }
    return -1;
  }
  bool before_has(Stage stage) const { return before[0] == stage || before[1] == stage; }
  bool draws() const { return noise != Noise::constant; }

  // What a bit per element, saved for backward, holds. `pass`: that an activation's derivative behind an addition is 1,
  // which spares saving the residual; joined with the noise's decision where that comes behind the addition too. Or
  // else that decision alone (a backend may join it with an activation that it recomputes otherwise).
  bool saves_pass() const {
    const int act = after_at(Stage::act), add = after_at(Stage::add);
    return one_bit && add >= 0 && act > add;
  }
  bool saves_keep() const {
    if (noise != Noise::bernoulli || granularity != Granularity::element) return false;
    return !saves_pass() || after_at(Stage::drop) > after_at(Stage::add);
  }
};

}  // namespace fusednorm

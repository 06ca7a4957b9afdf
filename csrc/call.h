// One call of the operator in canonical form, as both backends' kernels understand it: no Tensor, no string.
#pragma once

#include <cstdint>

namespace fusednorm {

// Any input as (N, C, S), in one of two dense layouts. A 2-D input is channels-last with S = 1.
struct Shape {
  int64_t N, C, S;
  bool channels_last;  // a matrix of N*S rows and C columns; otherwise N*C rows of S
  int64_t rows() const { return N * S; }
};

enum class Noise { none, element, channel, all_dropped };

// The elementwise stages around the norm.
struct Chain {
  int activation;  // index into math::Activations
  double parameters[2];
  bool one_bit;  // the activation's derivative is 0 or 1
  Noise noise;
  uint32_t threshold;  // keep iff draw16 < threshold
  double multiplier;   // of what is kept
};

}  // namespace fusednorm

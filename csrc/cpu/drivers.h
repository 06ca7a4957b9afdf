// The two drivers, one per layout: they cut a tensor into tiles, share the tiles among threads, and call the kernels.
//
// Whatever the number of threads, the tiles are the same and their partial sums are merged in the same order, so
// results do not depend on it.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../math/noise.h"
#include "../math/norm.h"
#include "../ops.h"
#include "kernels.h"

namespace fusednorm::cpu {

template <class T>
struct ForwardPointers {
  using A = opmath_t<T>;
  const T* x;                           // (N, C, S) in the shape's layout
  T* y;                                 // same
  const A *weight, *bias;               // (C,) or null
  const A *running_mean, *running_var;  // (C,) or null when training
  A *mean, *invstd, *var;               // (C,) out
  uint32_t* mask;                       // out, or null
};

template <class T>
struct BackwardPointers {
  using A = opmath_t<T>;
  const T *x, *g;              // (N, C, S) in the shape's layout
  T* dx;                       // same, or null
  const A *weight, *bias;      // (C,) or null
  const A *mean, *invstd;      // (C,)
  A *grad_weight, *grad_bias;  // (C,) out, or null: not needed
  const uint32_t* mask;        // or null: redraw
};

struct Call {  // what both directions need beside the pointers
  Shape shape;
  Chain chain;
  int64_t seed;
  bool training;
  double eps;
};

template <class T>
void forward_channels_first(const Call& call, const ForwardPointers<T>& p);
template <class T>
void forward_channels_last(const Call& call, const ForwardPointers<T>& p);
template <class T>
void backward_channels_first(const Call& call, const BackwardPointers<T>& p);
template <class T>
void backward_channels_last(const Call& call, const BackwardPointers<T>& p);

// m itself, for a channels-first shape.
template <class T>
void noise(const Call& call, T* m);

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerial = 32768;

// f(i) for i in [0, n), in ascending or descending order within each thread.
template <class F>
void for_tasks(int64_t n, bool serial, bool descending, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(descending ? begin + end - 1 - i : i);
  };
  if (serial || n == 1) {
    range(0, n);
  } else {
    at::parallel_for(0, n, 1, range);
  }
}

// Per-channel vectors of opmath type that kernels read 32 at a time.
constexpr int64_t padded(int64_t channels) { return (channels + 31) / 32 * 32; }
constexpr int64_t words_of(int64_t bits) { return (bits + 31) / 32; }

template <class A>
struct ChannelVectors {
  std::vector<A> mean, scale, shift;
  explicit ChannelVectors(int64_t channels)
      : mean(padded(channels)), scale(padded(channels)), shift(padded(channels)) {}
  Affine<A> at(int64_t c) const { return {mean.data() + c, scale.data() + c, shift.data() + c}; }
};

// Statistics of one channel: from its moments or from the running ones, into the results and the affine map.
template <class T>
void finish_statistics(const Call& call, const ForwardPointers<T>& p, int64_t c, double mean, double m2,
                       ChannelVectors<opmath_t<T>>& channel) {
  using A = opmath_t<T>;
  const double var = call.training ? m2 / call.shape.rows() : p.running_var[c];
  p.mean[c] = call.training ? static_cast<A>(mean) : p.running_mean[c];
  p.var[c] = static_cast<A>(var);
  p.invstd[c] = static_cast<A>(math::inverse_std(var, call.eps));
  channel.mean[c] = p.mean[c];
  channel.scale[c] = (p.weight ? p.weight[c] : A(1)) * p.invstd[c];
  channel.shift[c] = p.bias ? p.bias[c] : A(0);
}

template <class T>
void load_statistics(const BackwardPointers<T>& p, int64_t c, ChannelVectors<opmath_t<T>>& channel) {
  using A = opmath_t<T>;
  channel.mean[c] = p.mean[c];
  channel.scale[c] = (p.weight ? p.weight[c] : A(1)) * p.invstd[c];
  channel.shift[c] = p.bias ? p.bias[c] : A(0);
}

// The parameters' gradients of one channel, and the coefficients of its input gradient.
template <class T>
math::InputGradient<double> finish_gradient(const Call& call, const BackwardPointers<T>& p, int64_t c, double sum_dz,
                                            double sum_dz_xmu, double scale) {
  using A = opmath_t<T>;
  if (p.grad_bias) p.grad_bias[c] = static_cast<A>(sum_dz);
  if (p.grad_weight) p.grad_weight[c] = static_cast<A>(sum_dz_xmu * p.invstd[c]);
  if (!call.training) return {scale, 0, 0};
  return math::input_gradient<double>(scale, p.invstd[c], sum_dz, sum_dz_xmu, static_cast<double>(call.shape.rows()));
}

template <class T>
const KernelsFor<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) return kernels().f32;
  if constexpr (std::is_same_v<T, double>) return kernels().f64;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels().bf16;
  if constexpr (std::is_same_v<T, Float16>) return kernels().f16;
}

}  // namespace fusednorm::cpu

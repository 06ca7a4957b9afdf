// The two drivers, one per kind of tile: they cut a tensor into tiles, share these among threads, and call the kernels.
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
#include "gaps.h"
#include "kernels.h"

namespace fusednorm::cpu {

template <class T>
struct ForwardPointers {
  using A = opmath_t<T>;
  const T *x, *residual;                // (N, C, S) in the shape's layout; residual: or null
  T* y;                                 // same, or null: statistics alone
  const A *weight, *bias, *act_weight;  // (C,) or null
  const A *running_mean, *running_var;  // (C,) or null when training
  A *mean, *invstd, *var;               // (C,) out
  A* clean_mean;                        // (C,) out: with var, of u without its noise; or null
  A* own_var;                           // (C,) out: of u, noise and all; or null
  uint32_t* mask;                       // out, or null
};

template <class T>
struct BackwardPointers {
  using A = opmath_t<T>;
  const T *x, *g, *residual;                          // (N, C, S) in the shape's layout; residual: or null
  T *dx, *grad_residual;                              // same, or null
  const A *weight, *bias, *act_weight;                // (C,) or null
  const A *mean, *invstd;                             // (C,)
  double *grad_weight, *grad_bias, *grad_act_weight;  // (C,) out, or null: not needed
  double* sums;                                       // (2, C) out, or null: not needed
  const double* given;                                // (2, C), or null: to be gathered
  double count;                                       // of the values that `given` is of
  const uint32_t* mask;                               // or null: redraw
};

struct Call {  // what both directions need beside the pointers: of one group of the batch
  Shape shape;
  Chain chain;
  int64_t seed;
  int64_t first_row;  // of the group, for the noise
  bool training;
  double eps;
  int64_t elements;  // of all groups
  bool trains;       // it is part of a step of training: backward reads x next, or it is backward
  const Gaps* gaps;  // rows of the group that do not count, or null
  double count;      // of values of a channel that do
};

template <class T>
void forward_runs(const Call& call, const ForwardPointers<T>& p);
template <class T>
void forward_columns(const Call& call, const ForwardPointers<T>& p);
template <class T>
void forward_in_order(const Call& call, const ForwardPointers<T>& p);
template <class T>
void backward_runs(const Call& call, const BackwardPointers<T>& p);
template <class T>
void backward_columns(const Call& call, const BackwardPointers<T>& p);

// y = x * m, or m itself where x is null.
template <class T>
void noise_runs(const Call& call, const T* x, T* y);
template <class T>
void noise_columns(const Call& call, const T* x, T* y);

// Whether a tensor is worked on in columns: channels-last, or where its rows are short.
inline bool in_columns(const Shape& s, const Chain& chain) { return s.channels_last || has_short_rows(s, chain); }

// Whether a forward has one pass over rows long enough for the vectors of a block, and may take them as they come.
inline bool in_order(const Call& call, bool masked) {
  return !call.training && !masked && !call.gaps && !call.chain.draws() && !call.shape.channels_last &&
         (call.shape.S >= 32 || call.shape.C == 1);
}

inline bool outgrows_caches(const Call& call, int64_t element_bytes) {
  return outgrows_caches(call.elements * element_bytes, call.trains);
}

constexpr int64_t kTile = 4096;  // values of a run, at most: they stay in the first-level cache

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerial = 32768;

// Results that went past the caches are seen by others from here on.
inline void fence_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// f(i) for i in [0, n), in ascending or descending order within each thread.
template <class F>
void for_tasks(int64_t n, bool serial, bool descending, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(descending ? begin + end - 1 - i : i);
    fence_stores();
  };
  if (serial || n == 1) {
    range(0, n);
  } else {
    at::parallel_for(0, n, 1, range);
  }
}

// The share of each, but for the last, where n are cut into as few as there are at `most` for each: all about as large,
// so that none who has one waits for another. In whole units; `most` is some of these.
constexpr int64_t even_share(int64_t n, int64_t most, int64_t unit) {
  const int64_t shares = std::max<int64_t>((n + most - 1) / most, 1), share = (n + shares - 1) / shares;
  return (share + unit - 1) / unit * unit;
}
static_assert(even_share(1024, 960, 64) == 512 && even_share(24, 16, 1) == 12 && even_share(5, 8, 1) == 5);

// Per-channel vectors of opmath type that kernels read 32 at a time.
constexpr int64_t padded(int64_t channels) { return (channels + 31) / 32 * 32; }

template <class A>
struct ChannelVectors {
  std::vector<A> mean, scale, shift;
  explicit ChannelVectors(int64_t channels)
      : mean(padded(channels)), scale(padded(channels)), shift(padded(channels)) {}
  Affine<A> at(int64_t c) const { return {mean.data() + c, scale.data() + c, shift.data() + c}; }
};

template <class A>
std::vector<A> padded_copy(const A* vector, int64_t channels) {
  std::vector<A> copy(vector ? padded(channels) : 0);
  if (vector) std::copy_n(vector, channels, copy.data());
  return copy;
}

// The moments of u, and those that the running statistics are to learn: the same, unless these are to be without noise.
namespace {  // like what it is made of
struct Statistics {
  math::Moments<double> u, clean;
};
}  // namespace

// Statistics of one channel: from its moments or from the running ones, into the results and the affine map.
template <class T>
void finish_statistics(const Call& call, const ForwardPointers<T>& p, int64_t c, const Statistics& s,
                       ChannelVectors<opmath_t<T>>& channel) {
  using A = opmath_t<T>;
  const double rows = std::max(call.count, 1.0);
  const double var = call.training ? s.u.m2 / rows : p.running_var[c];
  p.mean[c] = call.training ? static_cast<A>(s.u.mean) : p.running_mean[c];
  p.var[c] = static_cast<A>(p.clean_mean ? s.clean.m2 / rows : var);
  if (p.own_var) p.own_var[c] = static_cast<A>(var);
  if (p.clean_mean) p.clean_mean[c] = static_cast<A>(s.clean.mean);
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
  const int64_t C = call.shape.C;
  if (p.grad_bias) p.grad_bias[c] = sum_dz;
  if (p.grad_weight) p.grad_weight[c] = sum_dz_xmu * p.invstd[c];
  if (p.sums) {
    p.sums[c] = sum_dz;
    p.sums[C + c] = sum_dz_xmu;
  }
  if (!call.training) return {scale, 0, 0};
  if (p.given) return math::input_gradient<double>(scale, p.invstd[c], p.given[c], p.given[C + c], p.count);
  return math::input_gradient<double>(scale, p.invstd[c], sum_dz, sum_dz_xmu, std::max(call.count, 1.0));
}

// Whether a backward has a first pass.
template <class T>
bool gathers(const BackwardPointers<T>& p) {
  return p.grad_weight || p.sums;
}
// What the second pass of a backward makes.
template <class T>
bool emits(const BackwardPointers<T>& p) {
  return p.dx || p.grad_residual || p.grad_act_weight;
}

template <class T>
const KernelsFor<T>& kernels_for() {
  if constexpr (std::is_same_v<T, float>) return kernels().f32;
  if constexpr (std::is_same_v<T, double>) return kernels().f64;
  if constexpr (std::is_same_v<T, BFloat16>) return kernels().bf16;
  if constexpr (std::is_same_v<T, Float16>) return kernels().f16;
}
template <class A>
const ElementwiseFor<A>& elementwise_for() {
  if constexpr (std::is_same_v<A, float>) return kernels().elementwise_f32;
  if constexpr (std::is_same_v<A, double>) return kernels().elementwise_f64;
}

}  // namespace fusednorm::cpu

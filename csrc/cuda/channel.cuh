// What happens once per channel: from statistics to the affine map, from the sums of the gradient to its coefficients.
#pragma once

#include "chain.cuh"
#include "reduce.cuh"

namespace fusednorm::cuda {

// How a channel's rows are cut into chunks, one for each block of its blocks.
struct Chunks {
  int64_t rows, length;  // of a channel, of a chunk
  int count;
  FN_HOST_DEVICE int64_t begin(int i) const { return i * length; }
  FN_HOST_DEVICE int64_t end(int i) const { return begin(i) + length < rows ? begin(i) + length : rows; }
  FN_HOST_DEVICE int64_t size(int i) const { return end(i) - begin(i); }
};

// How the rows of a channel lie in memory: samples of `length` rows, `stride` elements apart. A single sample is
// counted from the chunk's first row on, so that places fit into 32 bits however long it is.
struct Samples {
  uint32_t length;
  int64_t stride;
  uint32_t reciprocal;  // ceil(2^32 / length) where a tile can hold several samples
  bool one;
};

// The arguments of every forward kernel, and of every backward kernel.
template <class T>
struct ForwardArguments {
  using A = opmath_t<T>;
  Shape shape;
  Chunks chunks;
  Samples samples;  // channels-first only
  Stages<A> stages;
  Forward<T> p;
  Pair<A>* partials;  // (chunks, C): mean and m2 of a chunk
  A eps;
  bool training;
};
template <class T>
struct BackwardArguments {
  using A = opmath_t<T>;
  Shape shape;
  Chunks chunks;
  Samples samples;
  Stages<A> stages;
  Backward<T> p;
  Pair<A>* partials;  // (chunks, C): sums of dz and of dz*(x - mean) over a chunk; null: not gathered
  bool training;
};

template <class A>
struct Affine {
  A mean, scale, shift;
  FN_DEVICE A operator()(A x) const { return math::normalize(x, mean, scale, shift); }
};

// From the moments of channel c, or from its running statistics when not training. One thread in all `writes`.
template <class T, class A = opmath_t<T>>
FN_DEVICE Affine<A> finish_statistics(const ForwardArguments<T>& q, int64_t c, A mean, A m2, bool writes) {
  const A var = q.training ? m2 / static_cast<A>(q.chunks.rows) : read<A>(q.p.running_var, c, A(0));
  if (!q.training) mean = read<A>(q.p.running_mean, c, A(0));
  const A invstd = math::inverse_std(var, q.eps);
  if (writes) {
    static_cast<A*>(q.p.mean)[c] = mean;
    static_cast<A*>(q.p.invstd)[c] = invstd;
    static_cast<A*>(q.p.var)[c] = var;
  }
  return {mean, read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

template <class T, class A = opmath_t<T>>
FN_DEVICE Affine<A> saved_statistics(const BackwardArguments<T>& q, int64_t c) {
  const A invstd = static_cast<const A*>(q.p.invstd)[c];
  return {static_cast<const A*>(q.p.mean)[c], read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

// dx = a*dz + b*(x - mean) + c, from the channel's sums of dz and dz*(x - mean).
template <class T, class A = opmath_t<T>>
FN_DEVICE math::InputGradient<A> finish_gradient(const BackwardArguments<T>& q, int64_t c, A scale, Pair<A> sums,
                                                 bool writes) {
  const A invstd = static_cast<const A*>(q.p.invstd)[c];
  if (writes && q.p.grad_weight.data) write(q.p.grad_weight, c, sums.second * invstd);
  if (writes && q.p.grad_bias.data) write(q.p.grad_bias, c, sums.first);
  if (!q.training) return {scale, A(0), A(0)};
  return math::input_gradient(scale, invstd, sums.first, sums.second, static_cast<A>(q.chunks.rows));
}

}  // namespace fusednorm::cuda

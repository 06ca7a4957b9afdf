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

// How the rows of a channel lie in memory: samples of `length` rows, `gap` elements between two. A single sample is
// counted from the chunk's first row on, so that places fit into 32 bits however long it is.
struct Samples {
  int length;
  int64_t gap;
  uint32_t reciprocal;  // ceil(2^32 / length) where samples are short
  bool one;
};

// Which channels and which chunk a block takes; blockIdx.y == 0 is one block of each channel. The first blocks of a
// second pass over a tensor take what the last ones of the first pass have left in the L2 cache.
struct Place {
  unsigned x;
  int chunk;
};
FN_DEVICE Place in_first_pass() { return {blockIdx.x, static_cast<int>(blockIdx.y)}; }
FN_DEVICE Place in_second_pass() { return {gridDim.x - 1 - blockIdx.x, static_cast<int>(gridDim.y - 1 - blockIdx.y)}; }
FN_DEVICE Place in_cluster() { return {blockIdx.x, static_cast<int>(cluster_rank())}; }

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
  const A var = q.training ? ratio(m2, static_cast<A>(q.chunks.rows)) : read<A>(q.p.running_var, c, A(0));
  if (!q.training) mean = read<A>(q.p.running_mean, c, A(0));
  const A invstd = math::inverse_std(var, q.eps);
  if (writes) {
    static_cast<A*>(q.p.mean)[c] = mean;
    static_cast<A*>(q.p.invstd)[c] = invstd;
    static_cast<A*>(q.p.stat_var)[c] = var;
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

// ---- programs -----------------------------------------------------------------------------------------------------
// The groups of a batch. Block x counts the blocks of one group after another.
struct Groups {
  int64_t count;
  unsigned blocks_x;  // of one group
  int64_t rows;       // of a channel, in all groups
  FN_DEVICE unsigned group(Place place) const { return place.x / blocks_x; }
  FN_DEVICE unsigned block_x(Place place) const { return place.x % blocks_x; }
};

// What Chunks is to a channel: the rows [first, last) of a group's channel. Chunks begin at multiples of 8 of the whole
// batch's rows, as Philox calls do, so the first one may begin up to 7 rows too early; the last group has fewer rows,
// and perhaps empty chunks.
struct Window {
  int64_t first, last, rows, length;
  int count;
  FN_DEVICE Window(const Chunks& cut, const Groups& groups, int64_t group)
      : first(group * cut.rows),
        last(first + cut.rows < groups.rows ? first + cut.rows : groups.rows),
        rows(last - first),
        length(cut.length),
        count(cut.count) {}
  FN_DEVICE int64_t begin(int i) const { return first / 8 * 8 + i * length; }
  FN_DEVICE int64_t end(int i) const { return begin(i) + length < last ? begin(i) + length : last; }
  FN_DEVICE int64_t size(int i) const {
    const int64_t from = begin(i) < first ? first : begin(i), to = end(i);
    return from < to ? to - from : 0;
  }
};

// The arguments of the kernels that walk a program.
template <class T>
struct StagedForwardArguments {
  using A = opmath_t<T>;
  Shape shape;
  Chunks chunks;  // `rows` of a group
  Groups groups;
  Samples samples;
  Program<A> program;
  Forward<T> p;
  Pair<A>* partials;          // (G, chunks, C)
  Pair<A>* matched_partials;  // likewise, of u without its noise
  A eps;
  bool training;
  FN_DEVICE bool matches() const { return p.stat_mean != nullptr; }
};
// Sums over rows, from which all gradients of per-channel vectors follow: of dz and dz*(u - mean), and for PReLU behind
// the norm of its weight's gradient, or before the norm, with w = du/dweight, of dz*w, (u - mean)*w and w.
constexpr int kSums = 5;
template <class T>
struct StagedBackwardArguments {
  using A = opmath_t<T>;
  Shape shape;
  Chunks chunks;
  Groups groups;
  Samples samples;
  Program<A> program;
  Backward<T> p;
  A* partials;  // (kSums or 2, G, chunks, C); null: not gathered
  bool training;
  FN_DEVICE A* partial(int sum, int64_t group, int chunk, int64_t c) const {
    return partials + ((sum * groups.count + group) * chunks.count + chunk) * shape.C + c;
  }
};

template <class T, class A = opmath_t<T>>
FN_DEVICE Affine<A> finish_statistics(const StagedForwardArguments<T>& q, int64_t group, int64_t rows, int64_t c,
                                      Pair<A> moments, Pair<A> matched, bool writes) {
  const A var = q.training ? ratio(moments.second, static_cast<A>(rows)) : read<A>(q.p.running_var, c, A(0));
  const A mean = q.training ? moments.first : read<A>(q.p.running_mean, c, A(0));
  const A invstd = math::inverse_std(var, q.eps);
  if (writes) {
    const int64_t at = group * q.shape.C + c;
    static_cast<A*>(q.p.mean)[at] = mean;
    static_cast<A*>(q.p.invstd)[at] = invstd;
    static_cast<A*>(q.p.stat_var)[at] = q.matches() ? matched.second / static_cast<A>(rows) : var;
    if (q.matches()) static_cast<A*>(q.p.stat_mean)[at] = matched.first;
  }
  return {mean, read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

template <class T, class A = opmath_t<T>>
FN_DEVICE Affine<A> saved_statistics(const StagedBackwardArguments<T>& q, int64_t group, int64_t c) {
  const int64_t at = group * q.shape.C + c;
  const A invstd = static_cast<const A*>(q.p.invstd)[at];
  return {static_cast<const A*>(q.p.mean)[at], read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

template <class T, class A = opmath_t<T>>
FN_DEVICE math::InputGradient<A> coefficients(const StagedBackwardArguments<T>& q, int64_t group, int64_t rows,
                                              int64_t c, const A (&sums)[kSums]) {
  const A invstd = static_cast<const A*>(q.p.invstd)[group * q.shape.C + c];
  const A scale = read<A>(q.p.weight, c, A(1)) * invstd;
  if (!q.training) return {scale, A(0), A(0)};
  return math::input_gradient(scale, invstd, sums[0], sums[1], static_cast<A>(rows));
}

// The gradients of weight, bias and PReLU's weight, in this order, as far as one group contributes to them.
template <class T, class A = opmath_t<T>>
FN_DEVICE void add_parameter_gradients(const StagedBackwardArguments<T>& q, int64_t group, int64_t rows, int64_t c,
                                       const A (&sums)[kSums], A (&to)[kSums]) {
  to[0] += sums[1] * static_cast<const A*>(q.p.invstd)[group * q.shape.C + c];
  to[1] += sums[0];
  if (!q.program.has_weight) return;
  const math::InputGradient<A> k = coefficients(q, group, rows, c, sums);
  to[2] += q.program.act_after ? sums[2] : math::fma(k.a, sums[2], math::fma(k.b, sums[3], k.c * sums[4]));
}
template <class T, class A = opmath_t<T>>
FN_DEVICE void write_parameter_gradients(const StagedBackwardArguments<T>& q, int64_t c, const A (&from)[kSums]) {
  if (q.p.grad_weight.data) write(q.p.grad_weight, c, from[0]);
  if (q.p.grad_bias.data) write(q.p.grad_bias, c, from[1]);
  if (q.p.grad_act_weight.data) write(q.p.grad_act_weight, c, from[2]);
}

// From the partial sums of groups `first`, `first + step`, ...: with each thread taking its share, all of them.
template <class T, class A = opmath_t<T>>
FN_DEVICE void add_groups(const StagedBackwardArguments<T>& q, int64_t c, int first, int step, A (&to)[kSums]) {
  for (int64_t group = first; group < q.groups.count; group += step) {
    A sums[kSums] = {};
    for (int chunk = 0; chunk < q.chunks.count; ++chunk) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (i < 2 || q.program.has_weight) sums[i] += *q.partial(i, group, chunk, c);
      }
    }
    add_parameter_gradients(q, group, Window(q.chunks, q.groups, group).rows, c, sums, to);
  }
}

}  // namespace fusednorm::cuda

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

// The groups of a batch. Block x counts the blocks of one group after another.
struct Groups {
  int64_t count;
  unsigned blocks_x;  // of one group
  int64_t rows;       // of a channel, in all groups
  FN_DEVICE unsigned group(Place place) const { return place.x / blocks_x; }
  FN_DEVICE unsigned block_x(Place place) const { return place.x % blocks_x; }
};

// How many rows ahead of that one count; and of rows [begin, end).
FN_DEVICE int64_t count_before(const Counting& counting, int64_t row) {
  uint32_t bits = row % 8 ? counting.bits[row / 8] & ((1u << row % 8) - 1u) : 0;
  bits -= bits >> 1 & 0x55u;
  bits = (bits & 0x33u) + (bits >> 2 & 0x33u);
  return counting.before[row / 8] + (bits + (bits >> 4) & 0xfu);
}
FN_DEVICE int64_t count(const Counting& counting, int64_t begin, int64_t end) {
  return counting.bits ? count_before(counting, end) - count_before(counting, begin) : end - begin;
}

// What Chunks is to a channel: the rows [first, last) of a group's channel. Chunks begin at multiples of 8 of the whole
// batch's rows, as Philox calls do, so the first one may begin up to 7 rows too early; the last group has fewer rows,
// and perhaps empty chunks. How many rows there are is told of those that count; of a group, one at least.
struct Window {
  int64_t group, first, last, rows, length;
  int count;
  const Counting& counting;
  FN_DEVICE Window(const Chunks& cut, const Groups& groups, int64_t group, const Counting& counting)
      : group(group),
        first(group * cut.rows),
        last(first + cut.rows < groups.rows ? first + cut.rows : groups.rows),
        rows(cuda::count(counting, first, last)),
        length(cut.length),
        count(cut.count),
        counting(counting) {
    if (counting.bits && rows == 0) rows = 1;
  }
  FN_DEVICE int64_t begin(int i) const { return first / 8 * 8 + i * length; }
  FN_DEVICE int64_t end(int i) const { return begin(i) + length < last ? begin(i) + length : last; }
  FN_DEVICE int64_t size(int i) const {
    const int64_t from = begin(i) < first ? first : begin(i), to = end(i);
    return from < to ? cuda::count(counting, from, to) : 0;
  }
};

// Sums over rows, from which all gradients of per-channel vectors follow: of dz and dz*(u - mean), and for PReLU behind
// the norm of its weight's gradient, or before the norm, with w = du/dweight, of dz*w, (u - mean)*w and w. They travel
// in pairs, so there is one too many.
constexpr int kSums = 6;

// The arguments of every forward kernel, and of every backward kernel. The chain is Stages, or a Program, which alone
// has groups, statistics of u without its noise, and PReLU.
template <class Type, template <class> class Chain>
struct Arguments {
  using T = Type;
  using A = opmath_t<T>;
  static constexpr bool walks = std::is_same_v<Chain<A>, Program<A>>;
  Shape shape;
  Chunks chunks;  // `rows` of a group
  Groups groups;
  Samples samples;  // channels-first only
  Chain<A> chain;
  Counting counting;  // of a Program only
  bool training;
  FN_DEVICE int64_t rows() const { return walks ? groups.rows : chunks.rows; }  // of a channel, in all groups
  FN_DEVICE unsigned block_x(Place place) const { return walks ? groups.block_x(place) : place.x; }
  // Of a chunk's partial sums for a channel.
  FN_DEVICE int64_t place(int64_t group, int chunk, int64_t c) const {
    return (group * chunks.count + chunk) * shape.C + c;
  }
};
template <class T, template <class> class Chain>
struct AnyForward : Arguments<T, Chain> {
  using A = opmath_t<T>;
  static constexpr int moments = AnyForward::walks ? 2 : 1;  // of u, and of u without its noise
  Forward<T> p;
  Pair<A>* partials[2];  // (G, chunks, C) each: mean and m2 of a chunk
  A eps;
  FN_DEVICE bool gathers(int i) const { return i == 0 || p.stat_mean != nullptr; }
};
template <class T, template <class> class Chain>
struct AnyBackward : Arguments<T, Chain> {
  using A = opmath_t<T>;
  static constexpr int sums = AnyBackward::walks ? kSums : 2;
  Backward<T> p;
  Pair<A>* partials;  // (pairs of sums, G, chunks, C): of a chunk; null: not gathered
  FN_HOST_DEVICE bool gathers(int i) const {
    if constexpr (AnyBackward::walks) return i < 2 || (this->chain.has_weight && i < kSums - 1);
    return i < 2;
  }
  FN_DEVICE Pair<A>* pairs(int i) const {
    return partials + i / 2 * (this->groups.count * this->chunks.count * this->shape.C);
  }
};
template <class T>
using ForwardArguments = AnyForward<T, Stages>;
template <class T>
using BackwardArguments = AnyBackward<T, Stages>;
template <class T>
using StagedForwardArguments = AnyForward<T, Program>;
template <class T>
using StagedBackwardArguments = AnyBackward<T, Program>;

// The rows that share statistics, where the block is: those of its group, or all.
template <class Q>
FN_DEVICE decltype(auto) rows_of(const Q& q, Place place) {
  if constexpr (Q::walks) {
    return Window(q.chunks, q.groups, q.groups.group(place), q.counting);
  } else {
    return (q.chunks);
  }
}

template <class A>
struct Affine {
  A mean, scale, shift;
  FN_DEVICE A operator()(A x) const { return math::normalize(x, mean, scale, shift); }
};

// The partial sums of a chunk: there, and back.
template <class Q, class A = typename Q::A>
FN_DEVICE void write_partials(const Q& q, int64_t group, int chunk, int64_t c, const A (&sums)[Q::sums]) {
#pragma unroll
  for (int i = 0; i < Q::sums; i += 2) {
    if (q.gathers(i)) q.pairs(i)[q.place(group, chunk, c)] = {sums[i], sums[i + 1]};
  }
}
template <class Q, class A = typename Q::A>
FN_DEVICE void add_partials(const Q& q, int64_t group, int chunk, int64_t c, A (&sums)[Q::sums]) {
#pragma unroll
  for (int i = 0; i < Q::sums; i += 2) {
    if (!q.gathers(i)) continue;
    const Pair<A> pair = q.pairs(i)[q.place(group, chunk, c)];
    sums[i] += pair.first;
    sums[i + 1] += pair.second;
  }
}

// From the moments of channel c in its group, with noise and without, or from its running statistics when not training.
// One thread in all `writes`.
template <class Q, class A = typename Q::A>
FN_DEVICE Affine<A> finish_statistics(const Q& q, int64_t group, int64_t rows, int64_t c,
                                      const Pair<A> (&moments)[Q::moments], bool writes) {
  const A var = q.training ? ratio(moments[0].second, static_cast<A>(rows)) : read<A>(q.p.running_var, c, A(0));
  const A mean = q.training ? moments[0].first : read<A>(q.p.running_mean, c, A(0));
  const A invstd = math::inverse_std(var, q.eps);
  if (writes) {
    const int64_t at = group * q.shape.C + c;
    static_cast<A*>(q.p.mean)[at] = mean;
    static_cast<A*>(q.p.invstd)[at] = invstd;
    const bool quiet = Q::moments > 1 && q.gathers(1);
    const Pair<A>& known = moments[Q::moments - 1];
    static_cast<A*>(q.p.stat_var)[at] = quiet ? known.second / static_cast<A>(rows) : var;
    if (quiet) static_cast<A*>(q.p.stat_mean)[at] = known.first;
    if (q.p.var) static_cast<A*>(q.p.var)[at] = var;
  }
  return {mean, read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

template <class Q, class A = typename Q::A>
FN_DEVICE Affine<A> saved_statistics(const Q& q, int64_t group, int64_t c) {
  const int64_t at = group * q.shape.C + c;
  const A invstd = static_cast<const A*>(q.p.invstd)[at];
  return {static_cast<const A*>(q.p.mean)[at], read<A>(q.p.weight, c, A(1)) * invstd, read<A>(q.p.bias, c, A(0))};
}

// dx = a*dz + b*(u - mean) + c, from the channel's sums.
template <class Q, class A = typename Q::A>
FN_DEVICE math::InputGradient<A> coefficients(const Q& q, int64_t group, int64_t rows, int64_t c, A scale,
                                              const A (&sums)[Q::sums]) {
  const A invstd = static_cast<const A*>(q.p.invstd)[group * q.shape.C + c];
  if (!q.training) return {scale, A(0), A(0)};
  const A count = q.p.given ? static_cast<A>(*q.p.count) : static_cast<A>(rows);
  return math::input_gradient(scale, invstd, sums[0], sums[1], count);
}

// Sums that come from elsewhere, or go there.
template <class Q, class A = typename Q::A>
FN_DEVICE void read_given(const Q& q, int64_t c, A (&sums)[Q::sums]) {
#pragma unroll
  for (int i = 0; i < Q::sums; ++i) {
    if (q.gathers(i)) sums[i] = static_cast<A>(q.p.given[i * q.shape.C + c]);
  }
}
template <class Q, class A = typename Q::A>
FN_DEVICE void write_sums(const Q& q, int64_t c, const A (&sums)[Q::sums]) {
#pragma unroll
  for (int i = 0; i < Q::sums; ++i) {
    if (q.p.sums && q.gathers(i)) q.p.sums[i * q.shape.C + c] = static_cast<double>(sums[i]);
  }
}

// The gradients of weight, bias and PReLU's weight, in this order, as far as one group contributes to them.
template <class Q, class A = typename Q::A>
FN_DEVICE void add_parameter_gradients(const Q& q, int64_t group, int64_t rows, int64_t c, A scale,
                                       const A (&sums)[Q::sums], A (&to)[Q::sums]) {
  to[0] += sums[1] * static_cast<const A*>(q.p.invstd)[group * q.shape.C + c];
  to[1] += sums[0];
  if constexpr (Q::walks) {
    if (!q.chain.has_weight) return;
    const math::InputGradient<A> k = coefficients(q, group, rows, c, scale, sums);
    to[2] += q.chain.act_after ? sums[2] : math::fma(k.a, sums[2], math::fma(k.b, sums[3], k.c * sums[4]));
  }
}
template <class Q, class A = typename Q::A>
FN_DEVICE void write_parameter_gradients(const Q& q, int64_t c, const A (&from)[Q::sums]) {
  if (q.p.grad_weight.data) write(q.p.grad_weight, c, from[0]);
  if (q.p.grad_bias.data) write(q.p.grad_bias, c, from[1]);
  if constexpr (Q::walks) {
    if (q.p.grad_act_weight.data) write(q.p.grad_act_weight, c, from[2]);
  }
}
// The same from all groups: those of `first`, `first + step`, ... , each thread its share, to be added up.
template <class Q, class A = typename Q::A>
FN_DEVICE void add_groups(const Q& q, int64_t c, int first, int step, A (&to)[Q::sums]) {
  for (int64_t group = first; group < q.groups.count; group += step) {
    A sums[Q::sums] = {};
    for (int chunk = 0; chunk < q.chunks.count; ++chunk) add_partials(q, group, chunk, c, sums);
    const A scale = saved_statistics(q, group, c).scale;
    add_parameter_gradients(q, group, Window(q.chunks, q.groups, group, q.counting).rows, c, scale, sums, to);
  }
}

}  // namespace fusednorm::cuda

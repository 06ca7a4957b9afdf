// Sums over the threads of a block, always in the same order, and the merge of partial statistics on top of them:
// the only place where threads meet.
//
// A block is two-dimensional. Channels-first, a row of threads (one threadIdx.y, a multiple of 32 threads) is a team
// that works on one channel. Channels-last, a column of threads (one threadIdx.x) works on the same channels.
#pragma once

#include "../math/norm.h"
#include "backend.h"
#include "device.cuh"

namespace fusednorm::cuda {

using math::Moments;

template <class A>
struct alignas(2 * sizeof(A)) Pair {  // so that it moves in one access
  A first, second;
};

FN_DEVICE int lane() { return threadIdx.x % kWarp; }  // of a team

// ---- teams --------------------------------------------------------------------------------------------------------
// Every function of a team is called by all threads of the block and gives all threads of a team the same result.
constexpr int kMostWarps = 16;                                 // of a block
constexpr int kTeamScratch = kMostWarps * 6 * sizeof(double);  // bytes, at the start of shared memory

template <class A>
FN_DEVICE A warp_sum(A v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

template <int N, class A>
FN_DEVICE void team_sum(A (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  A* scratch = shared_memory<A>() + threadIdx.y * warps * N;
  barrier();  // of an earlier call, all have read
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (lane() == 0) scratch[threadIdx.x / kWarp * N + i] = v[i];
  }
  barrier();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = scratch[i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += scratch[warp * N + i];
  }
}
template <class A>
FN_DEVICE A team_sum(A v) {
  A values[1] = {v};
  team_sum(values);
  return values[0];
}
template <class A>
FN_DEVICE Pair<A> team_sum(Pair<A> v) {
  A values[2] = {v.first, v.second};
  team_sum(values);
  return {values[0], values[1]};
}

// The value of the team's thread `from`, which is in its first warp.
template <class A>
FN_DEVICE A team_value(A v, int from) {
  if (blockDim.x == kWarp) return shuffle(v, from);
  A* scratch = shared_memory<A>() + threadIdx.y;
  barrier();
  if (threadIdx.x == static_cast<unsigned>(from)) *scratch = v;
  barrier();
  return *scratch;
}

// ---- columns ------------------------------------------------------------------------------------------------------
// Channels-last, the threads side by side have V adjacent channels each: together the block's channels. Shared memory
// holds numbers to be added up, two for each value of each thread, and behind them a table with a row of numbers for
// every vector that is needed per channel.
constexpr int kTableRows = 5;
template <class A, int V>
FN_HOST_DEVICE int column_scratch(int threads, int threads_x) {
  return (2 * threads + kTableRows * threads_x) * V * static_cast<int>(sizeof(A));
}

FN_DEVICE int block_threads() { return blockDim.x * blockDim.y; }
FN_DEVICE int thread_in_block() { return threadIdx.y * blockDim.x + threadIdx.x; }

template <class A, int V>
struct Table {
  A* numbers = shared_memory<A>() + 2 * block_threads() * V;
  FN_DEVICE A& at(int row, int channel) const { return numbers[row * static_cast<int>(blockDim.x) * V + channel]; }
  // A row's values of N of the thread's own channels.
  template <int N>
  FN_DEVICE void get(int row, A (&to)[N], int first = 0) const {
    constexpr int kValues = N * sizeof(A) > 16 ? 16 / sizeof(A) : N;
#pragma unroll
    for (int i = 0; i < N; i += kValues) {
      const Pack<A, kValues> pack = load<kValues>(&at(row, threadIdx.x * V + first + i));
#pragma unroll
      for (int j = 0; j < kValues; ++j) to[i + j] = pack.word[j];
    }
  }
};

// f(channel) for each of the block's channels, by one thread.
template <int V, class F>
FN_DEVICE void each_channel(F f) {
  for (int channel = thread_in_block(); channel < static_cast<int>(blockDim.x) * V; channel += block_threads())
    f(channel);
}

// How many threads can share each of the block's channels, and f(place, channel, share) for each share of them.
template <int V>
FN_DEVICE int channel_shares() {
  return blockDim.y > V ? blockDim.y / V : 1;
}
template <int V, class F>
FN_DEVICE void each_share(F f) {
  const int channels = blockDim.x * V;
  for (int place = thread_in_block(); place < channel_shares<V>() * channels; place += block_threads()) {
    f(place, place % channels, place / channels);
  }
}

// The sum of `rows` rows of `width` numbers in shared memory, into the first row. All threads of the block arrive.
template <class A>
FN_DEVICE void fold_rows(A* numbers, int rows, int width) {
  int half = 1;
  while (half < rows) half *= 2;
  barrier();
  for (half /= 2; half > 0; rows = half, half /= 2) {
    for (int i = thread_in_block(); i < (rows - half) * width; i += block_threads())
      numbers[i] += numbers[half * width + i];
    barrier();
  }
}

// The sums of the values of each column of threads, for all of them.
template <int N, class A>
FN_DEVICE void column_sum(A (&v)[N]) {
  A* numbers = shared_memory<A>();
  const int thread = thread_in_block();
  int rows = blockDim.y, row = threadIdx.y;
  bool leads = true;
  if (kWarp % blockDim.x == 0 && block_threads() % kWarp == 0) {  // the rows of a warp first
    rows = block_threads() / kWarp;
    row = thread / kWarp;
    leads = thread % kWarp < static_cast<int>(blockDim.x);
    for (int mask = kWarp / 2; mask >= static_cast<int>(blockDim.x); mask /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += shuffle_xor(v[i], mask);
    }
  }
  barrier();  // of an earlier call, all have read
  if (leads) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      numbers[(row * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N + i] = v[i];
  }
  fold_rows(numbers, rows, blockDim.x * N);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = numbers[threadIdx.x * N + i];
}

// The values of the column's first thread, for all of it.
template <int N, class A>
FN_DEVICE void column_first(A (&v)[N]) {
  A* numbers = shared_memory<A>() + threadIdx.x * N;
  barrier();
  if (threadIdx.y == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) numbers[i] = v[i];
  }
  barrier();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = numbers[i];
}

// ---- moments ------------------------------------------------------------------------------------------------------
// Merges 8 values into m. Their own mean and squares are formed first: one division, and no cancellation.
template <class A>
FN_DEVICE void merge_fragment(Moments<A>& m, const A (&v)[8]) {
  const A mean = (((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))) * A(0.125);
  A m2 = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) m2 = math::fma(v[i] - mean, v[i] - mean, m2);
  m = math::merge(m, Moments<A>{A(8), mean, m2}, ratio(A(8), m.count + A(8)));
}
template <class A>
FN_DEVICE void merge_value(Moments<A>& m, A v) {
  m = math::merge(m, Moments<A>{A(1), v, A(0)}, ratio(A(1), m.count + A(1)));
}

// What a part of a set adds to the two sums from which the moments of the set follow:
//   mean = pivot + sum(from_pivot) / count,   m2 = sum(squares)
// for any pivot near the mean. No division per part, and no order in which parts must be merged.
template <class A>
FN_DEVICE A from_pivot(const Moments<A>& part, A pivot) {
  return part.count * (part.mean - pivot);
}
template <class A>
FN_DEVICE A squares(const Moments<A>& part, A mean) {
  const A delta = part.mean - mean;
  return math::fma(part.count * delta, delta, part.m2);
}

// ---- per-channel vectors ------------------------------------------------------------------------------------------
template <class A>
FN_DEVICE A read(const void* data, DType type, int64_t i) {
  switch (type) {
    case DType::float32:
      return static_cast<A>(static_cast<const float*>(data)[i]);
    case DType::float64:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    case DType::bfloat16:
      return static_cast<A>(widen(static_cast<const BFloat16*>(data)[i]));
    default:
      return static_cast<A>(widen(static_cast<const Float16*>(data)[i]));
  }
}
template <class A>
FN_DEVICE A read(const Vector& v, int64_t i, A otherwise) {
  return v.data ? read<A>(v.data, v.type, i) : otherwise;
}
template <class A>
FN_DEVICE A read(const MutableVector& v, int64_t i) {
  return read<A>(v.data, v.type, i);
}
template <class A>
FN_DEVICE void write(const MutableVector& v, int64_t i, A value) {
  switch (v.type) {
    case DType::float32:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      break;
    case DType::float64:
      static_cast<double*>(v.data)[i] = static_cast<double>(value);
      break;
    case DType::bfloat16:
      static_cast<BFloat16*>(v.data)[i] = narrow<BFloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<Float16*>(v.data)[i] = narrow<Float16>(static_cast<float>(value));
  }
}

}  // namespace fusednorm::cuda

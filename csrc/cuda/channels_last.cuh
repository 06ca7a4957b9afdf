// Channels-last kernels: a matrix of rows r = n*S + s and C columns. A thread owns V adjacent channels and takes 8 rows
// of them at a time: one Philox call for each channel, 8 accesses of 16 bytes in flight. The same four kernels, and the
// same way of merging partial sums, as in channels_first.cuh.
//
// Blocks: x = columns (blockDim.x threads side by side), y = chunk of rows (blockDim.y threads below one another).
#pragma once

#include "channel.cuh"
#include "plan.h"

namespace fusednorm::cuda {

constexpr int kRows = math::kRowsPerCall;

// The thread's columns; a thread beyond the last one reads and writes nothing, but meets the others.
template <class T, int V>
struct Columns {
  int64_t c, C;
  bool active;
  FN_DEVICE explicit Columns(const Shape& shape, int64_t block = blockIdx.x)
      : c((block * blockDim.x + threadIdx.x) * V), C(shape.C), active(c < shape.C) {
    if (!active) c = 0;
  }
  FN_DEVICE bool leads() const { return active && threadIdx.y == 0; }

  // Rows [row, row + N) as far as they lie before `end`.
  template <int N>
  FN_DEVICE void read(const T* p, int64_t row, int64_t end, Pack<T, V> (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = row + i < end ? load<V>(p + (row + i) * C + c) : Pack<T, V>{};
  }
  FN_DEVICE void write(T* p, int64_t row, const opmath_t<T> (&from)[V]) const {
    store<V>(p + row * C + c, narrow<T, V>(from));
  }

  // f(first row of a group of 8) for the thread's groups of a chunk.
  template <class Chunks, class F>
  FN_DEVICE void each_group(const Chunks& chunks, bool descending, F f) const {
    if (!active) return;
    const int64_t begin = chunks.begin(blockIdx.y), groups = (chunks.end(blockIdx.y) - begin + kRows - 1) / kRows;
    for (int64_t i = threadIdx.y; i < groups; i += blockDim.y) f(begin + (descending ? groups - 1 - i : i) * kRows);
  }
};

// ---- noise --------------------------------------------------------------------------------------------------------
// The decisions of V Philox calls: bit i of byte v for the group's row i and channel c + v.
template <int V>
struct Decisions {
  uint32_t word[(V + 3) / 4];
  FN_DEVICE explicit Decisions(uint32_t all) {
    for (uint32_t& w : word) w = all * 0x01010101u;
  }
  FN_DEVICE void add(int v, uint32_t byte) { word[V > 4 ? v / 4 : 0] |= byte << (8 * (v % 4)); }
  FN_DEVICE uint32_t byte(int v) const { return word[v / 4] >> (8 * (v % 4)) & 0xffu; }
  FN_DEVICE bool keeps(int v, int i) const { return word[v / 4] >> (8 * (v % 4) + i) & 1u; }
  // Row i becomes row i - rows.
  FN_DEVICE void skip(int rows) {
    for (uint32_t& w : word) w >>= rows;
  }
};

template <class T, int V, class A>
FN_DEVICE Decisions<V> draw(const Stages<A>& stages, Seed seed, const Columns<T, V>& columns, int64_t row, int64_t S) {
  const uint32_t c = static_cast<uint32_t>(columns.c);
  Decisions<V> keep(stages.draw == Draw::none ? kKeepAll : 0);
  if (stages.draw == Draw::each_row) {
#pragma unroll
    for (int v = 0; v < V; ++v) keep.add(v, math::keep8(seed, row / kRows, c + v, stages.threshold));
  } else if (stages.draw == Draw::each_sample) {
    int64_t n = row / S, s = row - n * S, group = -1;
    Decisions<V> drawn(0);
    for (int i = 0; i < kRows; ++i) {
      if (n / kRows != group) {
        group = n / kRows;
        drawn = Decisions<V>(0);
#pragma unroll
        for (int v = 0; v < V; ++v) drawn.add(v, math::keep8(seed, group, c + v, stages.threshold));
      }
#pragma unroll
      for (int v = 0; v < V; ++v) keep.add(v, static_cast<uint32_t>(drawn.keeps(v, n % kRows)) << i);
      if (++s == S) {
        s = 0;
        ++n;
      }
    }
  }
  return keep;
}

// A saved mask is (ceil(rows / 8), C): the byte of channel c is that of its Philox call.
template <class T, int V>
FN_DEVICE void save_decisions(uint8_t* mask, const Columns<T, V>& columns, int64_t row, const Decisions<V>& keep) {
  Pack<uint8_t, V> bytes;
#pragma unroll
  for (int v = 0; v < V; ++v) bytes.word[v] = static_cast<uint8_t>(keep.byte(v));
  store<V>(mask + row / kRows * columns.C + columns.c, bytes);
}
template <class T, int V>
FN_DEVICE Decisions<V> decisions(const BackwardArguments<T>& q, Seed seed, const Columns<T, V>& columns, int64_t row) {
  if (!q.p.mask) return draw(q.stages, seed, columns, row, q.shape.S);
  const Pack<uint8_t, V> bytes = load<V>(q.p.mask + row / kRows * columns.C + columns.c);
  Decisions<V> keep(0);
#pragma unroll
  for (int v = 0; v < V; ++v) keep.add(v, bytes.word[v]);
  return keep;
}

// ---- per channel --------------------------------------------------------------------------------------------------
// The moments of the chunk's rows, from those that the column's threads have gathered.
template <int V, class A>
FN_DEVICE void merge_column(const Moments<A> (&own)[V], int64_t rows, A (&mean)[V], A (&m2)[V]) {
  A pivot[V];
#pragma unroll
  for (int v = 0; v < V; ++v) pivot[v] = threadIdx.y == 0 ? own[v].mean : A(0);
  column_sum(pivot);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] = from_pivot(own[v], pivot[v]);
  column_sum(mean);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean[v] = pivot[v] + mean[v] / static_cast<A>(rows);
    m2[v] = squares(own[v], mean[v]);
  }
  column_sum(m2);
}

// V adjacent pairs, 16 bytes at a time.
template <int V, class A>
FN_DEVICE void read_pairs(const Pair<A>* from, Pair<A> (&to)[V]) {
  constexpr int kValues = V > 1 ? 16 / sizeof(A) : 2;
#pragma unroll
  for (int i = 0; i < 2 * V; i += kValues) {
    const Pack<A, kValues> pack = load<kValues>(reinterpret_cast<const A*>(from) + i);
#pragma unroll
    for (int j = 0; j < kValues; j += 2) to[(i + j) / 2] = {pack.word[j], pack.word[j + 1]};
  }
}

// The moments of each channel from those of its chunks.
template <int V, class A, class Chunks>
FN_DEVICE void merge_chunks(const Chunks& chunks, const Pair<A>* partials, int64_t C, int64_t c, A (&mean)[V],
                            A (&m2)[V]) {
  Pair<A> parts[V];
  read_pairs(partials + c, parts);
  A pivot[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    pivot[v] = parts[v].first;
    mean[v] = m2[v] = 0;
  }
  const auto each = [&](auto f) {
    for (int i = threadIdx.y; i < chunks.count; i += blockDim.y) {
      const A count = static_cast<A>(chunks.size(i));
      read_pairs(partials + i * C + c, parts);
#pragma unroll
      for (int v = 0; v < V; ++v) f(v, Moments<A>{count, parts[v].first, parts[v].second});
    }
  };
  each([&](int v, const Moments<A>& part) { mean[v] += from_pivot(part, pivot[v]); });
  column_sum(mean);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] = pivot[v] + mean[v] / static_cast<A>(chunks.rows);
  each([&](int v, const Moments<A>& part) { m2[v] += squares(part, mean[v]); });
  column_sum(m2);
}

template <int V, class A>
FN_DEVICE void sum_chunks(const Chunks& chunks, const Pair<A>* partials, int64_t C, int64_t c, A (&first)[V],
                          A (&second)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) first[v] = second[v] = 0;
  for (int i = threadIdx.y; i < chunks.count; i += blockDim.y) {
    Pair<A> parts[V];
    read_pairs(partials + i * C + c, parts);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      first[v] += parts[v].first;
      second[v] += parts[v].second;
    }
  }
  column_sum(first);
  column_sum(second);
}

template <int V, class T, class A>
FN_DEVICE void write_partials(Pair<A>* partials, const Columns<T, V>& columns, const A (&first)[V],
                              const A (&second)[V]) {
  if (!columns.leads()) return;
#pragma unroll
  for (int v = 0; v < V; ++v) partials[blockIdx.y * columns.C + columns.c + v] = {first[v], second[v]};
}

// ---- forward ------------------------------------------------------------------------------------------------------
template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_statistics(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Columns<T, V> columns(q.shape);
  const int64_t end = q.chunks.end(blockIdx.y);
  Moments<A> m[V];
#pragma unroll
  for (int v = 0; v < V; ++v) m[v] = {0, 0, 0};
  columns.each_group(q.chunks, false, [&](int64_t row) {
    Pack<T, V> x[kRows];
    columns.read(q.p.x, row, end, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A values[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) values[i] = widen(x[i], v);
      if (row + kRows <= end) {
        merge_fragment(m[v], values);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (row + i < end) merge_value(m[v], values[i]);
        }
      }
    }
  });
  A mean[V], m2[V];
  merge_column(m, q.chunks.size(blockIdx.y), mean, m2);
  write_partials(q.partials, columns, mean, m2);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_apply(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Columns<T, V> columns(q.shape);
  const int64_t end = q.chunks.end(blockIdx.y);
  A mean[V] = {}, m2[V] = {};
  if (q.training) merge_chunks(q.chunks, q.partials, columns.C, columns.c, mean, m2);
  Affine<A> affine[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    affine[v] = finish_statistics(q, columns.c + v, mean[v], m2[v], columns.leads() && blockIdx.y == 0);
  }
  const Seed seed = seed_of(q.stages);
  columns.each_group(q.chunks, true, [&](int64_t row) {
    Pack<T, V> x[kRows];
    columns.read(q.p.x, row, end, x);
    const Decisions<V> keep = draw(q.stages, seed, columns, row, q.shape.S);
    if (q.p.mask) save_decisions(q.p.mask, columns, row, keep);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      A z[V];
#pragma unroll
      for (int v = 0; v < V; ++v) z[v] = affine[v](widen(x[i], v));
      activate(q.stages, z);
#pragma unroll
      for (int v = 0; v < V; ++v) z[v] = drop(q.stages, z[v], keep.keeps(v, i));
      if (row + i < end) columns.write(q.p.y, row + i, z);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------
// f(row, dz, x) for the thread's rows of a chunk; x and g of 4 rows are in flight.
template <class T, int V, class A, class F>
FN_DEVICE void each_row(const BackwardArguments<T>& q, const Columns<T, V>& columns, const Affine<A> (&affine)[V],
                        bool descending, F f) {
  constexpr int kHalf = kRows / 2;
  const int64_t end = q.chunks.end(blockIdx.y);
  const Seed seed = q.p.mask ? Seed{} : seed_of(q.stages);
  columns.each_group(q.chunks, descending, [&](int64_t group) {
    Decisions<V> keep = decisions(q, seed, columns, group);
#pragma unroll 1
    for (int64_t row = group; row < group + kRows; row += kHalf) {
      Pack<T, V> x[kHalf], g[kHalf];
      columns.read(q.p.x, row, end, x);
      columns.read(q.p.g, row, end, g);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        A z[V], dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          z[v] = affine[v](widen(x[i], v));
          dz[v] = drop_gradient(q.stages, A(widen(g[i], v)), keep.keeps(v, i));
        }
        activation_gradient(q.stages, z, dz);
        if (row + i < end) f(row + i, dz, x[i]);
      }
      keep.skip(kHalf);
    }
  });
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_gradient_sums(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const Columns<T, V> columns(q.shape);
  Affine<A> affine[V];
  A dz_sum[V], dz_xmu_sum[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    affine[v] = saved_statistics(q, columns.c + v);
    dz_sum[v] = dz_xmu_sum[v] = 0;
  }
  each_row(q, columns, affine, false, [&](int64_t, const A(&dz)[V], const Pack<T, V>& x) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dz_sum[v] += dz[v];
      dz_xmu_sum[v] = math::fma(dz[v], widen(x, v) - affine[v].mean, dz_xmu_sum[v]);
    }
  });
  column_sum(dz_sum);
  column_sum(dz_xmu_sum);
  write_partials(q.partials, columns, dz_sum, dz_xmu_sum);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_input_gradient(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const Columns<T, V> columns(q.shape);
  A dz_sum[V] = {}, dz_xmu_sum[V] = {};
  if (q.partials) sum_chunks(q.chunks, q.partials, columns.C, columns.c, dz_sum, dz_xmu_sum);
  Affine<A> affine[V];
  math::InputGradient<A> k[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    affine[v] = saved_statistics(q, columns.c + v);
    k[v] = finish_gradient(q, columns.c + v, affine[v].scale, Pair<A>{dz_sum[v], dz_xmu_sum[v]},
                           columns.leads() && blockIdx.y == 0);
  }
  if (!q.p.dx) return;
  each_row(q, columns, affine, true, [&](int64_t row, const A(&dz)[V], const Pack<T, V>& x) {
    A dx[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dx[v] = math::apply_input_gradient(dz[v], widen(x, v) - affine[v].mean, k[v].a, k[v].b, k[v].c);
    }
    columns.write(q.p.dx, row, dx);
  });
}

}  // namespace fusednorm::cuda

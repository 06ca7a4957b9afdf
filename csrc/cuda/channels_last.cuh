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
  int chunk;
  int64_t block_c, c, C;  // the first channels of the block and of the thread; the number of all
  bool active;
  FN_DEVICE Columns(const Shape& shape, Place place)
      : chunk(place.chunk),
        block_c(int64_t{place.x} * blockDim.x * V),
        c(block_c + threadIdx.x * V),
        C(shape.C),
        active(c < shape.C) {
    if (!active) c = 0;
  }
  FN_DEVICE bool leads() const { return active && threadIdx.y == 0; }

  // Rows [row, row + N), or the first `there` of them.
  template <int N>
  FN_DEVICE void read(const T* p, int64_t row, int there, Pack<T, V> (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < there ? load<V>(p + (row + i) * C + c) : Pack<T, V>{};
  }
  FN_DEVICE void write(T* p, int64_t row, const Pack<T, V>& from) const { store<V>(p + row * C + c, from); }

  // f(first row of a group of 8, rows of the chunk from there on) for the thread's groups of a chunk.
  template <class Chunks, class F>
  FN_DEVICE void each_group(const Chunks& chunks, bool descending, F f) const {
    if (!active) return;
    const int64_t begin = chunks.begin(chunk);
    const int rows = static_cast<int>(chunks.end(chunk) - begin), groups = (rows + kRows - 1) / kRows;
    for (int i = threadIdx.y; i < groups; i += blockDim.y) {
      const int at = (descending ? groups - 1 - i : i) * kRows;
      f(begin + at, rows - at);
    }
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
  if (!q.p.mask) return draw(q.chain, seed, columns, row, q.shape.S);
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
  for (int v = 0; v < V; ++v) pivot[v] = own[v].mean;
  column_first(pivot);
#pragma unroll
  for (int v = 0; v < V; ++v) mean[v] = from_pivot(own[v], pivot[v]);
  column_sum(mean);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    mean[v] = pivot[v] + ratio(mean[v], static_cast<A>(rows));
    m2[v] = squares(own[v], mean[v]);
  }
  column_sum(m2);
}

// What all threads with a channel need of it, computed once.
template <class A, int V>
struct ChannelTable {
  Table<A, V> numbers;
  FN_DEVICE void put(int channel, const Affine<A>& affine) const {
    numbers.at(0, channel) = affine.mean;
    numbers.at(1, channel) = affine.scale;
    numbers.at(2, channel) = affine.shift;
  }
  FN_DEVICE void put(int channel, const math::InputGradient<A>& k) const {
    numbers.at(3, channel) = k.b;  // a is the scale
    numbers.at(4, channel) = k.c;
  }
  // Of N of the thread's channels, behind a barrier.
  template <int N>
  FN_DEVICE void get(Affine<A> (&affine)[N], int first = 0) const {
    A mean[N], scale[N], shift[N];
    numbers.get(0, mean, first);
    numbers.get(1, scale, first);
    numbers.get(2, shift, first);
#pragma unroll
    for (int v = 0; v < N; ++v) affine[v] = {mean[v], scale[v], shift[v]};
  }
  FN_DEVICE void get(const Affine<A> (&affine)[V], math::InputGradient<A> (&k)[V]) const {
    A b[V], c[V];
    numbers.get(3, b);
    numbers.get(4, c);
#pragma unroll
    for (int v = 0; v < V; ++v) k[v] = {affine[v].scale, b[v], c[v]};
  }
};

// The partial sums of the block's channels; beyond the last one stands that one again, for nobody.
template <class A>
struct Partials {
  const Pair<A>* first;  // of the chunks of a group
  int64_t C, c;          // c: of the block's first channel
  FN_DEVICE Pair<A> at(int chunk, int channel) const {
    return first[chunk * C + (c + channel < C ? c + channel : C - 1)];
  }
};

// f(channel, moments) for each of the block's channels, from those of its chunks.
template <int V, class A, class Chunks, class F>
FN_DEVICE void merge_chunks(const Chunks& chunks, const Partials<A>& partials, F f) {
  const int shares = channel_shares<V>(), channels = blockDim.x * V;
  A *sums = shared_memory<A>(), *squared = sums + block_threads() * V;
  const auto sum = [&](int channel, int share, auto term) {
    A all = 0;
    for (int i = share; i < chunks.count; i += shares) {
      const Pair<A> part = partials.at(i, channel);
      all += term(Moments<A>{static_cast<A>(chunks.size(i)), part.first, part.second});
    }
    return all;
  };
  const auto mean_of = [&](int channel) {
    return partials.at(0, channel).first + ratio(sums[channel], static_cast<A>(chunks.rows));
  };
  each_share<V>([&](int place, int channel, int share) {
    const A pivot = partials.at(0, channel).first;
    sums[place] = sum(channel, share, [&](const Moments<A>& part) { return from_pivot(part, pivot); });
  });
  fold_rows(sums, shares, channels);
  each_share<V>([&](int place, int channel, int share) {
    const A mean = mean_of(channel);
    squared[place] = sum(channel, share, [&](const Moments<A>& part) { return squares(part, mean); });
  });
  fold_rows(squared, shares, channels);
  each_channel<V>([&](int channel) { f(channel, Pair<A>{mean_of(channel), squared[channel]}); });
}

// f(channel, sums), likewise.
template <int V, class A, class F>
FN_DEVICE void sum_chunks(const Chunks& chunks, const Partials<A>& partials, F f) {
  const int shares = channel_shares<V>(), channels = blockDim.x * V;
  A* sums = shared_memory<A>();
  each_share<V>([&](int place, int channel, int share) {
    Pair<A> all{0, 0};
    for (int i = share; i < chunks.count; i += shares) {
      const Pair<A> part = partials.at(i, channel);
      all.first += part.first;
      all.second += part.second;
    }
    sums[2 * place] = all.first;
    sums[2 * place + 1] = all.second;
  });
  fold_rows(sums, shares, 2 * channels);
  each_channel<V>([&](int channel) { f(channel, Pair<A>{sums[2 * channel], sums[2 * channel + 1]}); });
}

template <int V, class T, class A>
FN_DEVICE void write_partials(Pair<A>* partials, const Columns<T, V>& columns, const A (&first)[V],
                              const A (&second)[V]) {
  if (!columns.leads()) return;
#pragma unroll
  for (int v = 0; v < V; ++v) partials[columns.chunk * columns.C + columns.c + v] = {first[v], second[v]};
}

// Values first, first + 1, ... of a pack.
template <class T, int V, int N>
FN_DEVICE void narrow_into(Pack<T, V>& pack, int first, const opmath_t<T> (&v)[N]) {
  const Pack<T, N> part = narrow<T, N>(v);
  constexpr int kWords = sizeof(part) / sizeof(part.word[0]);
#pragma unroll
  for (int i = 0; i < kWords; ++i) pack.word[first * kWords / N + i] = part.word[i];
}

// ---- forward ------------------------------------------------------------------------------------------------------
template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_statistics(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const Columns<T, V> columns(q.shape, in_first_pass());
  Moments<A> m[V];
#pragma unroll
  for (int v = 0; v < V; ++v) m[v] = {0, 0, 0};
  columns.each_group(q.chunks, false, [&](int64_t row, int left) {
    Pack<T, V> x[kRows];
    columns.read(q.p.x, row, left, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      A values[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) values[i] = widen(x[i], v);
      if (left >= kRows) {
        merge_fragment(m[v], values);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (i < left) merge_value(m[v], values[i]);
        }
      }
    }
  });
  A mean[V], m2[V];
  merge_column(m, q.chunks.size(columns.chunk), mean, m2);
  write_partials(q.partials[0], columns, mean, m2);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_apply(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const Columns<T, V> columns(q.shape, in_second_pass());
  const ChannelTable<A, V> table;
  const auto finish = [&](int channel, Pair<A> moments) {
    const int64_t c = columns.block_c + channel;
    if (c < columns.C) table.put(channel, finish_statistics(q, 0, q.chunks.rows, c, {moments}, blockIdx.y == 0));
  };
  if (q.training) {
    merge_chunks<V>(q.chunks, Partials<A>{q.partials[0], columns.C, columns.block_c}, finish);
  } else {
    each_channel<V>([&](int channel) { finish(channel, {}); });
  }
  if (!q.p.y) return;
  barrier();
  const Seed seed = seed_of(q.chain);
  columns.each_group(q.chunks, true, [&](int64_t row, int left) {
    Pack<T, V> x[kRows];
    columns.read(q.p.x, row, left, x);
    const Decisions<V> keep = draw(q.chain, seed, columns, row, q.shape.S);
    if (q.p.mask) save_decisions(q.p.mask, columns, row, keep);
    // Some channels after others: registers are few.
    constexpr int kPart = V > 4 ? 4 : V;
#pragma unroll
    for (int first = 0; first < V; first += kPart) {
      Affine<A> affine[kPart];
      table.get(affine, first);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        A z[kPart];
#pragma unroll
        for (int v = 0; v < kPart; ++v) z[v] = affine[v](widen(x[i], first + v));
        activate(q.chain, z);
#pragma unroll
        for (int v = 0; v < kPart; ++v) z[v] = drop(q.chain, z[v], keep.keeps(first + v, i));
        narrow_into(x[i], first, z);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < left) columns.write(q.p.y, row + i, x[i]);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------
// f(row, dz, x) for the thread's rows of a chunk; x and g of 4 rows are in flight.
template <class T, int V, class A, class F>
FN_DEVICE void each_row(const BackwardArguments<T>& q, const Columns<T, V>& columns, const Affine<A> (&affine)[V],
                        bool descending, F f) {
  constexpr int kHalf = kRows / 2;
  const Seed seed = q.p.mask ? Seed{} : seed_of(q.chain);
  columns.each_group(q.chunks, descending, [&](int64_t group, int left) {
    Decisions<V> keep = decisions(q, seed, columns, group);
#pragma unroll 1
    for (int at = 0; at < kRows; at += kHalf, left -= kHalf) {
      const int64_t row = group + at;
      Pack<T, V> x[kHalf], g[kHalf];
      columns.read(q.p.x, row, left, x);
      columns.read(q.p.g, row, left, g);
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        A z[V], dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          z[v] = affine[v](widen(x[i], v));
          dz[v] = drop_gradient(q.chain, A(widen(g[i], v)), keep.keeps(v, i));
        }
        activation_gradient(q.chain, z, dz);
        if (i < left) f(row + i, dz, x[i]);
      }
      keep.skip(kHalf);
    }
  });
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_gradient_sums(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const Columns<T, V> columns(q.shape, in_first_pass());
  const ChannelTable<A, V> table;
  each_channel<V>([&](int channel) {
    const int64_t c = columns.block_c + channel;
    if (c < columns.C) table.put(channel, saved_statistics(q, 0, c));
  });
  barrier();
  Affine<A> affine[V];
  table.get(affine);
  A dz_sum[V] = {}, dz_xmu_sum[V] = {};
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
  previous_grid_ends();
  const Columns<T, V> columns(q.shape, in_second_pass());
  const ChannelTable<A, V> table;
  const auto finish = [&](int channel, Pair<A> sums) {
    const int64_t c = columns.block_c + channel;
    if (c >= columns.C) return;
    const Affine<A> of = saved_statistics(q, 0, c);
    A both[2] = {sums.first, sums.second};
    if (q.p.given) read_given(q, c, both);
    table.put(channel, of);
    table.put(channel, coefficients(q, 0, q.chunks.rows, c, of.scale, both));
    if (blockIdx.y != 0) return;
    write_parameter_gradients(q, c, {both[1] * static_cast<const A*>(q.p.invstd)[c], both[0]});
    write_sums(q, c, both);
  };
  if (q.partials) {
    sum_chunks<V>(q.chunks, Partials<A>{q.partials, columns.C, columns.block_c}, finish);
  } else {
    each_channel<V>([&](int channel) { finish(channel, {}); });
  }
  if (!q.p.dx) return;
  barrier();
  Affine<A> affine[V];
  math::InputGradient<A> k[V];
  table.get(affine);
  table.get(affine, k);
  each_row(q, columns, affine, true, [&](int64_t row, const A(&dz)[V], const Pack<T, V>& x) {
    A dx[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dx[v] = math::apply_input_gradient(dz[v], widen(x, v) - affine[v].mean, k[v].a, k[v].b, k[v].c);
    }
    columns.write(q.p.dx, row, narrow<T, V>(dx));
  });
}

}  // namespace fusednorm::cuda

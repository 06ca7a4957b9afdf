// Channels-first, who works on what: a team of threads takes a channel's chunk of rows, tile by tile, whatever becomes
// of a tile.
#pragma once

#include "rows.cuh"

namespace fusednorm::cuda {

// The moments of the rows that the team's threads have gathered, for all of them. Thread `pivots` has one.
template <class A>
FN_DEVICE Pair<A> merge_team(const Moments<A>& own, int64_t rows, int pivots = 0) {
  const A pivot = team_value(own.mean, pivots);
  const A mean = pivot + ratio(team_sum(from_pivot(own, pivot)), static_cast<A>(rows));
  return {mean, team_sum(squares(own, mean))};
}

// The moments of a channel from those of its chunks; part(i) gives mean and m2 of chunk i. Each warp does it for
// itself.
template <class A, class Chunks, class Part>
FN_DEVICE Pair<A> merge_chunks(const Chunks& chunks, Part part) {
  const A pivot = part(0).first;
  const auto moments = [&](int i) {
    const Pair<A> p = part(i);
    return Moments<A>{static_cast<A>(chunks.size(i)), p.first, p.second};
  };
  A sum = 0;
  for (int i = lane(); i < chunks.count; i += kWarp) sum += from_pivot(moments(i), pivot);
  const A mean = pivot + ratio(warp_sum(sum), static_cast<A>(chunks.rows));
  sum = 0;
  for (int i = lane(); i < chunks.count; i += kWarp) sum += squares(moments(i), mean);
  return {mean, warp_sum(sum)};
}

// The sums of a channel from those of its chunks, likewise.
template <class A, class Chunks, class Part>
FN_DEVICE Pair<A> sum_chunks(const Chunks& chunks, Part part) {
  Pair<A> sums{0, 0};
  for (int i = lane(); i < chunks.count; i += kWarp) {
    const Pair<A> p = part(i);
    sums.first += p.first;
    sums.second += p.second;
  }
  return {warp_sum(sums.first), warp_sum(sums.second)};
}

// What a thread reads of a tile.
template <class T, int V>
struct Input {
  Fragment<T, V> x, g, residual;
};

// The team's channel and the tiles of its chunk; a team beyond the last channel visits none, but meets the others.
template <class Q, int V>
struct Team {
  using T = typename Q::T;
  using A = typename Q::A;
  using Rows = std::conditional_t<Q::walks, Window, const Chunks&>;
  // Tiles in flight: forward, and backward, where two tensors are read, or three of a program's.
  static constexpr int kForward = kTilesInFlight<T, V>, kHalf = kForward > 1 ? kForward / 2 : 1;
  static constexpr int kBackward = Q::walks ? kHalf : kForward, kResidentBackward = Q::walks ? 1 : kForward;
  static constexpr int kOnShelf = Q::walks ? kForward : 1;  // of the residual only

  Rows rows;
  int64_t c;
  int chunk;
  bool active;
  const Samples& samples;
  Visits visits;
  SavedBytes saved;
  A weight[1];  // PReLU's
  FN_DEVICE Team(const Q& q, const Samples& samples, Place place, bool descending)
      : rows(rows_of(q, place)),
        c(int64_t{q.block_x(place)} * blockDim.y + threadIdx.y),
        chunk(place.chunk),
        active(c < q.shape.C),
        samples(samples),
        visits(rows, chunk, c, q.shape.S, samples, lane() * V, descending),
        saved(q.p.mask, q.rows(), c) {
    if (!active) c = visits.count = 0;
    if constexpr (Q::walks) weight[0] = cuda::read<A>(q.p.act_weight, c, A(0));
  }
  FN_DEVICE bool leads() const { return active && threadIdx.x == 0; }
  FN_DEVICE bool writes() const { return leads() && blockIdx.y == 0; }
  FN_DEVICE int64_t group() const {
    if constexpr (Q::walks) return rows.group;
    return 0;
  }

  // A tile without the rows of the group before, and with those that do not count marked.
  FN_DEVICE decltype(auto) cut(const Tile& tile) const {
    if constexpr (Q::walks) {
      uint32_t counting = kKeepAll;
      if (rows.counting.bits) counting = row_bits<V>(SavedBytes(rows.counting.bits, 0, 0).get(visits, tile));
      return CutTile(tile, visits.row(tile), rows.first, counting);
    } else {
      return (tile);
    }
  }
  FN_DEVICE void read(const T* p, const Tile& tile, Fragment<T, V>& to) const {
    const auto& own = cut(tile);
    cuda::read<V>(p, own, samples, to);
    if constexpr (Q::walks) blank<V>(own, to);
  }
  FN_DEVICE void write(T* p, const Tile& tile, Fragment<T, V>& from) const {
    const auto& own = cut(tile);
    if constexpr (Q::walks) blank<V>(own, from);
    cuda::write<V>(p, own, samples, from);
  }
  // The decisions that were saved for the fragment.
  FN_DEVICE uint32_t saved_bits(const Tile& tile) const { return row_bits<V>(saved.get(visits, tile)); }

  // read(tile, input) for `Ahead` tiles, then f(tile, input) for each of them, until all are visited. What a program
  // does is long, so f is there once, in a loop, and the inputs move; else there is a copy for each of them.
  template <int Ahead, class Read, class F>
  FN_DEVICE void each(Read read, F f) const {
    Input<T, V> in[Ahead];
    const auto read_into = [&](int u, const Tile& tile) { read(tile, in[u]); };
    if constexpr (Q::walks) {
      visits.template each<Ahead>(
          samples, read_into, [&](const Tile& tile) { f(tile, in[0]); },
          [&] {
#pragma unroll
            for (int u = 0; u + 1 < Ahead; ++u) in[u] = in[u + 1];
          });
    } else {
      visits.template each<Ahead>(samples, read_into, [&](int u, const Tile& tile) { f(tile, in[u]); });
    }
  }

  // The moments of the chunk's rows, from those that the team's threads have gathered.
  FN_DEVICE Pair<A> merge(const Moments<A>& own) const {
    const int64_t count = rows.size(chunk);
    if constexpr (Q::walks) {  // a chunk may have no rows, or its first ones belong to the group before
      const int skipped = chunk == 0 ? static_cast<int>(rows.first % math::kRowsPerCall) : 0;
      return merge_team(own, count > 0 ? count : 1, skipped / V);
    } else {
      return merge_team(own, count);
    }
  }
};

}  // namespace fusednorm::cuda

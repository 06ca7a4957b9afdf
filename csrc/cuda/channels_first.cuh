// Channels-first kernels, streaming: statistics and apply, each reading x once, and likewise backward. A team of
// threads takes a channel's chunk of rows; partial sums go through global memory, and every block of the second kernel
// merges them anew, which costs less than a third launch and needs no atomics.
//
//   forward    statistics: x -> partials                 apply:          partials, x -> y            3 units
//   backward   gradient_sums: x, g -> partials           input_gradient: partials, x, g -> dx        5 units
//
// Blocks: x = teams of adjacent channels, so that those who share a sector of memory run together; y = chunk.
#pragma once

#include "rows.cuh"

namespace fusednorm::cuda {

// The team's channel and the tiles of its chunk; a team beyond the last channel visits none, but meets the others.
template <class T, int V>
struct Team {
  int64_t c;
  int chunk;
  bool active;
  const Samples& samples;
  Visits visits;
  SavedBytes saved;
  template <class Arguments>
  FN_DEVICE Team(const Arguments& q, const Samples& samples, Place place, bool descending)
      : c(int64_t{place.x} * blockDim.y + threadIdx.y),
        chunk(place.chunk),
        active(c < q.shape.C),
        samples(samples),
        visits(q.chunks, chunk, c, q.shape.S, samples, lane() * V, descending),
        saved(q.p.mask, q.chunks.rows, c) {
    if (!active) c = visits.count = 0;
  }
  FN_DEVICE bool leads() const { return active && threadIdx.x == 0; }
  FN_DEVICE bool writes() const { return leads() && blockIdx.y == 0; }

  template <class A>
  FN_DEVICE Drawn draw(const Stages<A>& stages, Seed seed, const Tile& tile) const {
    return draw_fragment<V>(stages, seed, samples, visits, tile, c);
  }
  FN_DEVICE void read(const T* p, const Tile& tile, Fragment<T, V>& to) const { cuda::read<V>(p, tile, samples, to); }
  FN_DEVICE void write(T* p, const Tile& tile, const Fragment<T, V>& from) const {
    cuda::write<V>(p, tile, samples, from);
  }
  template <int Ahead, class Read, class F>
  FN_DEVICE void each(Read read, F f) const {
    visits.template each<Ahead>(samples, read, f);
  }
};

// ---- forward, tile by tile ----------------------------------------------------------------------------------------
// A tile's first `left` rows into the thread's moments.
template <int V, class A, class Tile>
FN_DEVICE void merge_values(Moments<A>& m, const A (&v)[kFragment], const Tile& tile) {
  if (tile.full()) {
    merge_fragment(m, v);
  } else {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      if (tile.there(row_in_tile<V>(i / V) + i % V)) merge_value(m, v[i]);
    }
  }
}
template <int V, class T, class A>
FN_DEVICE void merge_tile(Moments<A>& m, const Fragment<T, V>& x, const Tile& tile) {
  A v[kFragment];
  widen_fragment<V>(x, v);
  merge_values<V>(m, v, tile);
}

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

// y in the place of x.
template <class T, int V, class A = opmath_t<T>>
FN_DEVICE void apply_tile(const ForwardArguments<T>& q, const Team<T, V>& team, const Affine<A>& affine, Seed seed,
                          const Tile& tile, Fragment<T, V>& x) {
  const auto [byte, keep] = team.draw(q.stages, seed, tile);
  team.saved.put(team.visits, tile, byte);
  A v[kFragment];
  widen_fragment<V>(x, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = affine(v[i]);
  activate(q.stages, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = drop(q.stages, v[i], keep >> i & 1u);
  narrow_fragment<V>(v, x);
}

// ---- backward, tile by tile ---------------------------------------------------------------------------------------
template <class T>
FN_DEVICE Seed seed_unless_saved(const BackwardArguments<T>& q) {
  return q.p.mask ? Seed{} : seed_of(q.stages);
}

// The decisions of a tile, drawn again or read.
template <class T, int V>
FN_DEVICE uint32_t decisions(const BackwardArguments<T>& q, const Team<T, V>& team, Seed seed, const Tile& tile) {
  return q.p.mask ? row_bits<V>(team.saved.get(team.visits, tile)) : team.draw(q.stages, seed, tile).keep;
}

// dz and x - mean of a fragment.
template <int V, class T, class A = opmath_t<T>>
FN_DEVICE void local_gradient(const BackwardArguments<T>& q, const Affine<A>& affine, uint32_t keep,
                              const Fragment<T, V>& x, const Fragment<T, V>& g, A (&dz)[kFragment],
                              A (&centred)[kFragment]) {
  A z[kFragment];
  widen_fragment<V>(x, z);
  widen_fragment<V>(g, dz);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    centred[i] = kept(z[i] - affine.mean);
    z[i] = affine(z[i]);
    dz[i] = drop_gradient(q.stages, dz[i], keep >> i & 1u);
  }
  activation_gradient(q.stages, z, dz);
}

// Adds a tile's sums of dz and dz*(x - mean). Rows that are not there were read as zeros, so their dz is one too: 0
// times the derivative at z(0), which is finite unless z(0) is beyond all that a float32 activation takes (1e13).
template <class A>
FN_DEVICE void add_tile(Pair<A>& sums, const A (&dz)[kFragment], const A (&centred)[kFragment]) {
  Pair<A> part{0, 0};  // apart first: a long sum of short ones rounds less than a long one
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    part.first += dz[i];
    part.second = math::fma(dz[i], centred[i], part.second);
  }
  sums.first += part.first;
  sums.second += part.second;
}

// dx of a fragment, in the place of x; dz is spent.
template <int V, class T, class A>
FN_DEVICE void input_gradient(const math::InputGradient<A>& k, A (&dz)[kFragment], const A (&centred)[kFragment],
                              Fragment<T, V>& x) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) dz[i] = math::apply_input_gradient(dz[i], centred[i], k.a, k.b, k.c);
  narrow_fragment<V>(dz, x);
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

// ---- the kernels --------------------------------------------------------------------------------------------------
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? kBackwardBlocks : kForwardBlocks;

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_statistics(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const Team<T, V> team(q, q.samples, in_first_pass(), false);
  Moments<A> m{0, 0, 0};
  Fragment<T, V> x[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>([&](int u, const Tile& tile) { team.read(q.p.x, tile, x[u]); },
                                           [&](int u, const Tile& tile) { merge_tile<V>(m, x[u], tile); });
  const Pair<A> moments = merge_team(m, q.chunks.size(team.chunk));
  if (team.leads()) q.partials[team.chunk * q.shape.C + team.c] = moments;
}

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_apply(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const Team<T, V> team(q, q.samples, in_second_pass(), true);
  Pair<A> moments{0, 0};
  if (q.training) {
    moments = merge_chunks<A>(q.chunks, [&](int i) { return q.partials[i * q.shape.C + team.c]; });
  }
  const Affine<A> affine = finish_statistics(q, team.c, moments.first, moments.second, team.writes());
  const Seed seed = seed_of(q.stages);
  Fragment<T, V> x[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>([&](int u, const Tile& tile) { team.read(q.p.x, tile, x[u]); },
                                           [&](int u, const Tile& tile) {
                                             apply_tile(q, team, affine, seed, tile, x[u]);
                                             team.write(q.p.y, tile, x[u]);
                                           });
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_gradient_sums(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const Team<T, V> team(q, q.samples, in_first_pass(), false);
  const Affine<A> affine = saved_statistics(q, team.c);
  const Seed seed = seed_unless_saved(q);
  Pair<A> sums{0, 0};
  Fragment<T, V> x[kTilesInFlight<T, V>], g[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>(
      [&](int u, const Tile& tile) {
        team.read(q.p.x, tile, x[u]);
        team.read(q.p.g, tile, g[u]);
      },
      [&](int u, const Tile& tile) {
        A dz[kFragment], centred[kFragment];
        local_gradient<V>(q, affine, decisions(q, team, seed, tile), x[u], g[u], dz, centred);
        add_tile(sums, dz, centred);
      });
  sums = team_sum(sums);
  if (team.leads()) q.partials[team.chunk * q.shape.C + team.c] = sums;
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_input_gradient(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const Team<T, V> team(q, q.samples, in_second_pass(), true);
  Pair<A> sums{0, 0};
  if (q.partials) {
    sums = sum_chunks<A>(q.chunks, [&](int i) { return q.partials[i * q.shape.C + team.c]; });
  }
  const Affine<A> affine = saved_statistics(q, team.c);
  const math::InputGradient<A> k = finish_gradient(q, team.c, affine.scale, sums, team.writes());
  if (!q.p.dx) return;
  const Seed seed = seed_unless_saved(q);
  Fragment<T, V> x[kTilesInFlight<T, V>], g[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>(
      [&](int u, const Tile& tile) {
        team.read(q.p.x, tile, x[u]);
        team.read(q.p.g, tile, g[u]);
      },
      [&](int u, const Tile& tile) {
        A dz[kFragment], centred[kFragment];
        local_gradient<V>(q, affine, decisions(q, team, seed, tile), x[u], g[u], dz, centred);
        input_gradient<V>(k, dz, centred, x[u]);
        team.write(q.p.dx, tile, x[u]);
      });
}

}  // namespace fusednorm::cuda

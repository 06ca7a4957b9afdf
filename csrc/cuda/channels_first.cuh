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

// The team's channel and what it reads; a team beyond the last channel visits nothing, but meets the others.
template <class T, int V, class Arguments>
struct Team {
  int64_t c;
  bool active;
  Channel<T, V> channel;
  FN_DEVICE explicit Team(const Arguments& q)
      : c(int64_t{blockIdx.x} * blockDim.y + threadIdx.y),
        active(c < q.shape.C),
        channel{c * q.shape.S, q.sample, q.shape.S, q.reciprocal} {
    if (!active) c = 0;
  }
  FN_DEVICE Visits visits(const Chunks& chunks, int chunk, bool descending) const {
    Visits v(chunks, chunk, descending);
    if (!active) v.count = 0;
    return v;
  }
  FN_DEVICE bool leads() const { return active && threadIdx.x == 0; }
};

// ---- forward, tile by tile
// --------------------------------------------------------------------------------------------- A tile's first `left`
// rows into the thread's moments.
template <int V, class T, class A>
FN_DEVICE void merge_tile(Moments<A>& m, const Pack<T, V> (&x)[kFragment / V], const Tile& tile) {
  A v[kFragment];
  widen_fragment<V>(x, v);
  if (tile.left >= kTile) {
    merge_fragment(m, v);
  } else {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      if (row_in_tile<V>(i / V) < tile.left) merge_value(m, v[i]);
    }
  }
}

// The moments of the rows that the team's threads have gathered, for all of them.
template <class A>
FN_DEVICE Pair<A> merge_team(const Moments<A>& own, int64_t rows) {
  const A pivot = team_sum(threadIdx.x == 0 ? own.mean : A(0));
  const A mean = pivot + team_sum(from_pivot(own, pivot)) / static_cast<A>(rows);
  return {mean, team_sum(squares(own, mean))};
}

// The moments of a channel from those of its chunks; part(i) gives mean and m2 of chunk i.
template <class A, class Part>
FN_DEVICE Pair<A> merge_chunks(const Chunks& chunks, Part part) {
  const A pivot = part(0).first;
  const auto moments = [&](int i) {
    const Pair<A> p = part(i);
    return Moments<A>{static_cast<A>(chunks.size(i)), p.first, p.second};
  };
  A sum = 0;
  for (int i = threadIdx.x; i < chunks.count; i += blockDim.x) sum += from_pivot(moments(i), pivot);
  const A mean = pivot + team_sum(sum) / static_cast<A>(chunks.rows);
  sum = 0;
  for (int i = threadIdx.x; i < chunks.count; i += blockDim.x) sum += squares(moments(i), mean);
  return {mean, team_sum(sum)};
}

template <class T, int V, class A = opmath_t<T>>
FN_DEVICE void apply_tile(const ForwardArguments<T>& q, const Team<T, V, ForwardArguments<T>>& team,
                          const Affine<A>& affine, Seed seed, const Tile& tile, Pack<T, V> (&x)[kFragment / V]) {
  const Draws draws(q.stages, seed, tile, q.shape.S, team.c);
  if (q.p.mask) {
    uint8_t* saved = mask_byte(q.p.mask, q.chunks.rows, tile.at.row(q.shape.S), team.c);
    if (saved) *saved = static_cast<uint8_t>(draws.byte);
  }
  const uint32_t keep = draws.fragment(team.channel, tile);
  A v[kFragment];
  widen_fragment<V>(x, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = affine(v[i]);
  activate(q.stages, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = drop(q.stages, v[i], keep >> i & 1u);
  narrow_fragment<V>(v, x);
  team.channel.write(q.p.y, tile, x);
}

// ---- backward, tile by tile
// --------------------------------------------------------------------------------------------
template <class T>
FN_DEVICE Seed seed_unless_saved(const BackwardArguments<T>& q) {
  return q.p.mask ? Seed{} : seed_of(q.stages);
}

// The decisions of a tile, drawn again or read.
template <class T, int V>
FN_DEVICE uint32_t decisions(const BackwardArguments<T>& q, const Team<T, V, BackwardArguments<T>>& team, Seed seed,
                             const Tile& tile) {
  if (!q.p.mask) return Draws(q.stages, seed, tile, q.shape.S, team.c).fragment(team.channel, tile);
  const uint8_t* saved = mask_byte(q.p.mask, q.chunks.rows, tile.at.row(q.shape.S), team.c);
  return Draws(saved ? *saved : 0).fragment(team.channel, tile);
}

// dz of a fragment.
template <int V, class T, class A = opmath_t<T>>
FN_DEVICE void local_gradient(const BackwardArguments<T>& q, const Affine<A>& affine, uint32_t keep,
                              const Pack<T, V> (&x)[kFragment / V], const Pack<T, V> (&g)[kFragment / V],
                              A (&dz)[kFragment]) {
  A z[kFragment];
  widen_fragment<V>(x, z);
  widen_fragment<V>(g, dz);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    z[i] = affine(z[i]);
    dz[i] = drop_gradient(q.stages, dz[i], keep >> i & 1u);
  }
  activation_gradient(q.stages, z, dz);
}

// Adds a tile's sums of dz and dz*(x - mean).
template <int V, class T, class A>
FN_DEVICE void add_tile(Pair<A>& sums, const A (&dz)[kFragment], const Pack<T, V> (&x)[kFragment / V], A mean,
                        const Tile& tile) {
  Pair<A> part{0, 0};  // apart first: a long sum of short ones rounds less than a long one
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    const bool there = row_in_tile<V>(i / V) < tile.left;
    part.first += there ? dz[i] : A(0);
    part.second = there ? math::fma(dz[i], widen(x[i / V], i % V) - mean, part.second) : part.second;
  }
  sums.first += part.first;
  sums.second += part.second;
}

template <int V, class T, class A = opmath_t<T>>
FN_DEVICE void input_gradient_tile(const BackwardArguments<T>& q, const Team<T, V, BackwardArguments<T>>& team,
                                   const math::InputGradient<A>& k, A (&dz)[kFragment],
                                   const Pack<T, V> (&x)[kFragment / V], A mean, const Tile& tile) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    dz[i] = math::apply_input_gradient(dz[i], widen(x[i / V], i % V) - mean, k.a, k.b, k.c);
  }
  Pack<T, V> dx[kFragment / V];
  narrow_fragment<V>(dz, dx);
  team.channel.write(q.p.dx, tile, dx);
}

// The sums of a channel from those of its chunks.
template <class A, class Part>
FN_DEVICE Pair<A> sum_chunks(const Chunks& chunks, Part part) {
  Pair<A> sums{0, 0};
  for (int i = threadIdx.x; i < chunks.count; i += blockDim.x) {
    const Pair<A> p = part(i);
    sums.first += p.first;
    sums.second += p.second;
  }
  return team_sum(sums);
}

// ---- the kernels
// -------------------------------------------------------------------------------------------------------
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? kTeamBlocks - 1 : kTeamBlocks;

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_statistics(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V, ForwardArguments<T>> team(q);
  const int chunk = blockIdx.y;
  Moments<A> m{0, 0, 0};
  Pack<T, V> x[kTilesInFlight<T, V>][kFragment / V];
  team.visits(q.chunks, chunk, false)
      .template each<kTilesInFlight<T, V>>(
          q.shape.S, [&](int u, const Tile& tile) { team.channel.read(q.p.x, tile, x[u]); },
          [&](int u, const Tile& tile) { merge_tile<V>(m, x[u], tile); });
  const Pair<A> moments = merge_team(m, q.chunks.size(chunk));
  if (team.leads()) q.partials[chunk * q.shape.C + team.c] = moments;
}

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_apply(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V, ForwardArguments<T>> team(q);
  const int chunk = blockIdx.y;
  Pair<A> moments{0, 0};
  if (q.training) {
    moments = merge_chunks<A>(q.chunks, [&](int i) { return q.partials[i * q.shape.C + team.c]; });
  }
  const Affine<A> affine = finish_statistics(q, team.c, moments.first, moments.second, team.leads() && chunk == 0);
  const Seed seed = seed_of(q.stages);
  Pack<T, V> x[kTilesInFlight<T, V>][kFragment / V];
  team.visits(q.chunks, chunk, true)
      .template each<kTilesInFlight<T, V>>(
          q.shape.S, [&](int u, const Tile& tile) { team.channel.read(q.p.x, tile, x[u]); },
          [&](int u, const Tile& tile) { apply_tile(q, team, affine, seed, tile, x[u]); });
}

// Half as many tiles ahead as forward: there are two tensors.
template <class T, int V>
constexpr int kTilesBackward = kTilesInFlight<T, V> > 1 ? kTilesInFlight<T, V> / 2 : 1;

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_gradient_sums(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V, BackwardArguments<T>> team(q);
  const int chunk = blockIdx.y;
  const Affine<A> affine = saved_statistics(q, team.c);
  const Seed seed = seed_unless_saved(q);
  Pair<A> sums{0, 0};
  Pack<T, V> x[kTilesBackward<T, V>][kFragment / V], g[kTilesBackward<T, V>][kFragment / V];
  team.visits(q.chunks, chunk, false)
      .template each<kTilesBackward<T, V>>(
          q.shape.S,
          [&](int u, const Tile& tile) {
            team.channel.read(q.p.x, tile, x[u]);
            team.channel.read(q.p.g, tile, g[u]);
          },
          [&](int u, const Tile& tile) {
            A dz[kFragment];
            local_gradient<V>(q, affine, decisions(q, team, seed, tile), x[u], g[u], dz);
            add_tile<V>(sums, dz, x[u], affine.mean, tile);
          });
  sums = team_sum(sums);
  if (team.leads()) q.partials[chunk * q.shape.C + team.c] = sums;
}

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_input_gradient(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V, BackwardArguments<T>> team(q);
  const int chunk = blockIdx.y;
  Pair<A> sums{0, 0};
  if (q.partials) {
    sums = sum_chunks<A>(q.chunks, [&](int i) { return q.partials[i * q.shape.C + team.c]; });
  }
  const Affine<A> affine = saved_statistics(q, team.c);
  const math::InputGradient<A> k = finish_gradient(q, team.c, affine.scale, sums, team.leads() && chunk == 0);
  if (!q.p.dx) return;
  const Seed seed = seed_unless_saved(q);
  Pack<T, V> x[kTilesBackward<T, V>][kFragment / V], g[kTilesBackward<T, V>][kFragment / V];
  team.visits(q.chunks, chunk, true)
      .template each<kTilesBackward<T, V>>(
          q.shape.S,
          [&](int u, const Tile& tile) {
            team.channel.read(q.p.x, tile, x[u]);
            team.channel.read(q.p.g, tile, g[u]);
          },
          [&](int u, const Tile& tile) {
            A dz[kFragment];
            local_gradient<V>(q, affine, decisions(q, team, seed, tile), x[u], g[u], dz);
            input_gradient_tile<V>(q, team, k, dz, x[u], affine.mean, tile);
          });
}

// m itself, written to p.y.
template <class T>
FN_KERNEL(256, 4)
channels_first_noise(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, 1, ForwardArguments<T>> team(q);
  const Seed seed = seed_of(q.stages);
  team.visits(q.chunks, blockIdx.y, false)
      .template each<1>(
          q.shape.S, [](int, const Tile&) {},
          [&](int, const Tile& tile) {
            const uint32_t keep = Draws(q.stages, seed, tile, q.shape.S, team.c).fragment(team.channel, tile);
            A v[kFragment];
#pragma unroll
            for (int i = 0; i < kFragment; ++i) v[i] = drop(q.stages, A(1), keep >> i & 1u);
            Pack<T, 1> m[kFragment];
            narrow_fragment<1>(v, m);
            team.channel.write(q.p.y, tile, m);
          });
}

}  // namespace fusednorm::cuda

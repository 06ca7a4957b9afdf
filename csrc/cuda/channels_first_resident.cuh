// Channels-first kernels, resident: a channel's rows stay in the shared memory of one block, or of the blocks of one
// cluster, so that each tensor is read once: x -> y forward (2 units), x, g -> dx backward (3 units). The partial sums
// of a cluster's blocks travel through distributed shared memory. Everything else is what the streaming kernels do.
//
// Each thread comes back for what it put away itself, so shared memory serves as more registers and needs no barrier.
// Blocks: x = teams of adjacent channels, y = chunk = rank in the cluster.
#pragma once

#include "channels_first.cuh"

namespace fusednorm::cuda {

constexpr int kSlotBytes = kMostWarps * sizeof(Pair<double>);  // a Pair for each team, behind the scratch of the sums
constexpr int kResidentScratch = kTeamScratch + kSlotBytes;

// What a team puts away: for each tensor the tiles of its chunk one after another, and, if there are two of them, a
// byte of decisions for each thread's fragment. A thread stands at the tile of one visit and goes on to that of the
// next one, so that no place is computed anew.
template <class T, int V, int Tensors>
struct Shelf {
  int area;   // of a tensor, in packs
  int bytes;  // from visit to visit
  Pack<T, V>* own;
  uint8_t* byte;
  FN_DEVICE explicit Shelf(int64_t chunk_rows) {
    const int tiles = tiles_of(chunk_rows), warp = threadIdx.x / kWarp;
    area = blockDim.y * tiles * (kTile / V);
    bytes = kept(static_cast<int>(blockDim.x) * kFragment);
    T* first = shared_memory<T>(kResidentScratch) + threadIdx.y * tiles * kTile;
    own = reinterpret_cast<Pack<T, V>*>(first + warp * kTile) + lane();
    byte = shared_memory<uint8_t>(kResidentScratch) + Tensors * area * V * sizeof(T) +
           (threadIdx.y * tiles + warp) * kWarp + lane();
  }
  FN_DEVICE void put(int tensor, const Fragment<T, V>& from) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) own[tensor * area + j * kWarp] = from[j];
  }
  FN_DEVICE void get(int tensor, Fragment<T, V>& to) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) to[j] = own[tensor * area + j * kWarp];
  }
  FN_DEVICE void next() {
    own += bytes / V;
    if (Tensors > 1) byte += bytes / kFragment;
  }
};
// The bytes of a block's shelf.
inline int64_t shelf_bytes(int64_t chunk_rows, int teams, int tensors, int bytes) {
  return int64_t{tiles_of(chunk_rows)} * teams * (tensors * kTile * bytes + (tensors > 1 ? kWarp : 0));
}

// Of a block, at most: where half as many leave room for two blocks, registers are as many either way.
template <class T>
constexpr int kResidentThreads = sizeof(T) == 8 ? 256 : 512;

// Exchanges one pair per team among the blocks of the cluster: f(part), where part(i) is that of block i.
template <class A, class F>
FN_DEVICE Pair<A> exchange(Pair<A> own, F f) {
  Pair<A>* slot = shared_memory<Pair<A>>(kTeamScratch) + threadIdx.y;
  if (threadIdx.x == 0) *slot = own;
  cluster_barrier();
  const Pair<A> merged = f([&](int i) { return *cluster_peer(slot, i); });
  cluster_barrier();  // no block ends while another reads its slot
  return merged;
}

// Of the whole channel, from what the team's threads have gathered of the chunk.
template <class T, int V, class A>
FN_DEVICE Affine<A> finish_moments(const ForwardArguments<T>& q, const Team<T, V>& team, const Moments<A>& own) {
  const Pair<A> moments =
      exchange(merge_team(own, q.chunks.size(team.chunk)), [&](auto part) { return merge_chunks<A>(q.chunks, part); });
  return finish_statistics(q, team.c, moments.first, moments.second, team.writes());
}
template <class T, int V, class A>
FN_DEVICE math::InputGradient<A> finish_sums(const BackwardArguments<T>& q, const Team<T, V>& team,
                                             const Affine<A>& affine, Pair<A> own) {
  const Pair<A> sums = exchange(team_sum(own), [&](auto part) { return sum_chunks<A>(q.chunks, part); });
  return finish_gradient(q, team.c, affine.scale, sums, team.writes());
}

template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_resident_forward(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V> team(q, q.samples, in_cluster(), false);
  Shelf<T, V, 1> shelf(q.chunks.length);
  Moments<A> m{0, 0, 0};
  Fragment<T, V> x[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>([&](int u, const Tile& tile) { team.read(q.p.x, tile, x[u]); },
                                           [&](int u, const Tile& tile) {
                                             merge_tile<V>(m, x[u], tile);
                                             shelf.put(0, x[u]);
                                             shelf.next();
                                           });
  const Affine<A> affine = finish_moments(q, team, m);
  const Seed seed = seed_of(q.stages);
  shelf = Shelf<T, V, 1>(q.chunks.length);
  team.template each<1>([&](int, const Tile&) { shelf.get(0, x[0]); },
                        [&](int, const Tile& tile) {
                          apply_tile(q, team, affine, seed, tile, x[0]);
                          team.write(q.p.y, tile, x[0]);
                          shelf.next();
                        });
}

template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_resident_backward(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<T, V> team(q, q.samples, in_cluster(), false);
  Shelf<T, V, 2> shelf(q.chunks.length);
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
        const uint32_t keep = decisions(q, team, seed, tile);
        A dz[kFragment], centred[kFragment];
        local_gradient<V>(q, affine, keep, x[u], g[u], dz, centred);
        add_tile(sums, dz, centred);
        shelf.put(0, x[u]);
        shelf.put(1, g[u]);
        *shelf.byte = static_cast<uint8_t>(keep);
        shelf.next();
      });
  const math::InputGradient<A> k = finish_sums(q, team, affine, sums);
  shelf = Shelf<T, V, 2>(q.chunks.length);
  team.template each<1>(
      [&](int, const Tile&) {
        shelf.get(0, x[0]);
        shelf.get(1, g[0]);
      },
      [&](int, const Tile& tile) {
        A dz[kFragment], centred[kFragment];
        local_gradient<V>(q, affine, *shelf.byte, x[0], g[0], dz, centred);
        input_gradient<V>(k, dz, centred, x[0]);
        team.write(q.p.dx, tile, x[0]);
        shelf.next();
      });
}

}  // namespace fusednorm::cuda

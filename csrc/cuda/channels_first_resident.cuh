// Channels-first kernels, resident: a channel's rows stay in the shared memory of one block, or of the blocks of one
// cluster, so that each tensor is read once: x -> y forward (2 units), x, g -> dx backward (3 units). The partial sums
// of a cluster's blocks travel through distributed shared memory. Everything else is what the streaming kernels do.
//
// Each thread comes back for what it put away itself, so shared memory serves as more registers and needs no barrier.
// Blocks: x = teams of adjacent channels, y = chunk = rank in the cluster.
#pragma once

#include "channels_first.cuh"

namespace fusednorm::cuda {

constexpr int kSlotBytes = 256;  // a Pair for each team, behind the scratch of the sums
static_assert(kSlotBytes >= 8 * sizeof(Pair<double>));
constexpr int kResidentScratch = kTeamScratch + kSlotBytes;

// What threads put away: a fragment for each visit, and a byte of decisions.
template <class T, int V>
struct Shelf {
  int base;  // bytes
  FN_DEVICE Pack<T, V>* at(int visit, int j) const {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return shared_memory<Pack<T, V>>(base) + (visit * (kFragment / V) + j) * threads + thread;
  }
  FN_DEVICE void put(int visit, const Fragment<T, V>& from) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) *at(visit, j) = from[j];
  }
  FN_DEVICE void get(int visit, Fragment<T, V>& to) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) to[j] = *at(visit, j);
  }
};
// The bytes of a shelf of `tensors` fragments and the decisions; the same sum as a kernel's bases below.
template <class T>
FN_HOST_DEVICE int64_t shelf_bytes(int visits, int threads, int tensors) {
  return visits * threads * (tensors * kFragment * static_cast<int64_t>(sizeof(T)) + (tensors > 1 ? 1 : 0));
}

// The most visits that a warp of the block makes.
FN_HOST_DEVICE int64_t most_visits(int64_t chunk_rows, int team_threads) {
  return (chunk_rows + team_threads * kFragment - 1) / (team_threads * kFragment);
}

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

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_resident_forward(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  const int chunk = cluster_rank();
  const Team<T, V> team(q, chunk, false);
  const Shelf<T, V> shelf{kResidentScratch};
  Moments<A> m{0, 0, 0};
  Fragment<T, V> x[kTilesInFlight<T, V>];
  team.template each<kTilesInFlight<T, V>>([&](int u, const Tile& tile) { team.read(q.p.x, tile, x[u]); },
                                           [&](int u, const Tile& tile) {
                                             merge_tile<V>(m, x[u], tile);
                                             shelf.put(tile.visit, x[u]);
                                           });
  const Pair<A> moments =
      exchange(merge_team(m, q.chunks.size(chunk)), [&](auto part) { return merge_chunks<A>(q.chunks, part); });
  const Affine<A> affine = finish_statistics(q, team.c, moments.first, moments.second, team.leads() && chunk == 0);
  const Seed seed = seed_of(q.stages);
  team.template each<1>([&](int, const Tile& tile) { shelf.get(tile.visit, x[0]); },
                        [&](int, const Tile& tile) { apply_tile(q, team, affine, seed, tile, x[0]); });
}

template <class T, int V>
FN_KERNEL(256, sizeof(T) == 8 ? 1 : kBackwardBlocks)
channels_first_resident_backward(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  const int chunk = cluster_rank();
  const Team<T, V> team(q, chunk, false);
  const int threads = blockDim.x * blockDim.y;
  const int fragments = static_cast<int>(shelf_bytes<T>(most_visits(q.chunks.length, blockDim.x), threads, 1));
  const Shelf<T, V> shelf_x{kResidentScratch}, shelf_g{kResidentScratch + fragments};
  uint8_t* shelf_keep =
      shared_memory<uint8_t>(kResidentScratch + 2 * fragments) + threadIdx.y * blockDim.x + threadIdx.x;

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
        A dz[kFragment];
        local_gradient<V>(q, affine, keep, x[u], g[u], dz);
        add_tile<V>(sums, dz, x[u], affine.mean);
        shelf_x.put(tile.visit, x[u]);
        shelf_g.put(tile.visit, g[u]);
        shelf_keep[tile.visit * threads] = static_cast<uint8_t>(keep);
      });
  sums = exchange(team_sum(sums), [&](auto part) { return sum_chunks<A>(q.chunks, part); });
  const math::InputGradient<A> k = finish_gradient(q, team.c, affine.scale, sums, team.leads() && chunk == 0);
  team.template each<1>(
      [&](int, const Tile& tile) {
        shelf_x.get(tile.visit, x[0]);
        shelf_g.get(tile.visit, g[0]);
      },
      [&](int, const Tile& tile) {
        A dz[kFragment];
        local_gradient<V>(q, affine, shelf_keep[tile.visit * threads], x[0], g[0], dz);
        input_gradient_tile<V>(q, team, k, dz, x[0], affine.mean, tile);
      });
}

}  // namespace fusednorm::cuda

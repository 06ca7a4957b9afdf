// Channels-first kernels, resident: a channel's rows stay in the shared memory of one block, or of the blocks of one
// cluster, so that each tensor is read once: x -> y forward (2 units), x, g -> dx backward (3 units). The partial sums
// of a cluster's blocks travel through distributed shared memory. Everything else is what the streaming kernels do. A
// residual is read where it is needed; backward of several groups is never resident, because the sums of all groups
// meet in a second kernel.
//
// Each thread comes back for what it put away itself, so shared memory serves as more registers and needs no barrier.
// Blocks: x = teams of adjacent channels, of one group after another; y = chunk = rank in the cluster.
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

template <int V, class T>
FN_DEVICE auto on_shelf(const Shelf<T, V, 2>& shelf, int tensor) {
  return [&shelf, tensor](opmath_t<T>(&to)[kFragment]) {
    Fragment<T, V> from;
    shelf.get(tensor, from);
    widen_fragment<V>(from, to);
  };
}

// Of the whole channel, from what the team's threads have gathered of the chunk.
template <class Q, int V, class A>
FN_DEVICE Affine<A> finish_moments(const Q& q, const Team<Q, V>& team, const Moments<A> (&own)[Q::moments]) {
  Pair<A> moments[Q::moments] = {};
#pragma unroll
  for (int i = 0; i < Q::moments; ++i) {
    if (!q.gathers(i)) break;
    moments[i] = exchange(team.merge(own[i]), [&](auto part) { return merge_chunks<A>(team.rows, part); });
  }
  return finish_statistics(q, team.group(), team.rows.rows, team.c, moments, team.writes());
}
template <class Q, int V, class A>
FN_DEVICE math::InputGradient<A> finish_sums(const Q& q, const Team<Q, V>& team, const Affine<A>& affine,
                                             A (&sums)[Q::sums]) {
  team_sums(q, sums);
#pragma unroll
  for (int i = 0; i < Q::sums; i += 2) {
    if (!q.gathers(i)) break;
    const auto all = exchange(Pair<A>{sums[i], sums[i + 1]}, [&](auto part) { return sum_chunks<A>(q.chunks, part); });
    sums[i] = all.first;
    sums[i + 1] = all.second;
  }
  finish_parameters(q, team, affine.scale, sums);
  return coefficients(q, team.group(), team.rows.rows, team.c, affine.scale, sums);
}

template <int V, class Q>
FN_DEVICE void resident_forward(const Q& q) {
  using T = typename Q::T;
  using A = typename Q::A;
  const Team<Q, V> team(q, q.samples, in_cluster(), false);
  Shelf<T, V, 1> shelf(q.chunks.length);
  const Seed seed = seed_of(q.chain);
  Moments<A> own[Q::moments] = {};
  team.template each<team.kForward>([&](const Tile& tile, auto& in) { team.read(q.p.x, tile, in.x); },
                                    [&](const Tile& tile, auto& in) {
                                      gather_tile<V>(q, team, seed, tile, in.x, own);
                                      shelf.put(0, in.x);
                                      shelf.next();
                                    });
  const Affine<A> affine = finish_moments(q, team, own);
  shelf = Shelf<T, V, 1>(q.chunks.length);
  team.template each<team.kOnShelf>([&](const Tile& tile, auto& in) { read_residual(q, team, tile, in); },
                                    [&](const Tile& tile, auto& in) {
                                      shelf.get(0, in.x);
                                      shelf.next();
                                      apply_tile<V>(q, team, affine, seed, tile, in.x, in.residual);
                                      team.write(q.p.y, tile, in.x);
                                    });
}

// Beside x and g, the byte of a tile's noise is put away.
template <int V, class Q>
FN_DEVICE void resident_backward(const Q& q) {
  using T = typename Q::T;
  using A = typename Q::A;
  const Team<Q, V> team(q, q.samples, in_cluster(), false);
  Shelf<T, V, 2> shelf(q.chunks.length);
  const Affine<A> affine = saved_statistics(q, team.group(), team.c);
  const Seed seed = backward_seed(q);
  A sums[Q::sums] = {};
  team.template each<team.kResidentBackward>(gradient_reader(q, team), [&](const Tile& tile, auto& in) {
    const auto noise = restore_noise<V>(q, team, seed, tile);
    if constexpr (Q::walks) {  // which has no registers left for x and g
      shelf.put(0, in.x);
      shelf.put(1, in.g);
      add_tile<V>(q, team, affine, noise, on_shelf<V>(shelf, 0), on_shelf<V>(shelf, 1), in.residual, sums);
    } else {
      add_tile<V>(q, team, affine, noise, in_registers<V>(in.x), in_registers<V>(in.g), in.residual, sums);
      shelf.put(0, in.x);
      shelf.put(1, in.g);
    }
    *shelf.byte = static_cast<uint8_t>(noise.keep);
    shelf.next();
  });
  const math::InputGradient<A> k = finish_sums(q, team, affine, sums);
  shelf = Shelf<T, V, 2>(q.chunks.length);
  team.template each<1>([&](const Tile& tile, auto& in) { read_residual(q, team, tile, in); },
                        [&](const Tile& tile, auto& in) {
                          const auto noise = kept_noise<V>(q, team, seed, tile, *shelf.byte);
                          input_gradient_tile<V>(q, team, affine, k, noise, tile, on_shelf<V>(shelf, 0),
                                                 on_shelf<V>(shelf, 1), in.residual, in.x);
                          if (!Q::walks || q.p.dx) team.write(q.p.dx, tile, in.x);
                          shelf.next();
                        });
}

template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_resident_forward(ForwardArguments<T> q) {
  resident_forward<V>(q);
}
template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_staged_resident_forward(StagedForwardArguments<T> q) {
  resident_forward<V>(q);
}

template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_resident_backward(BackwardArguments<T> q) {
  resident_backward<V>(q);
}
template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_staged_resident_backward(StagedBackwardArguments<T> q) {
  resident_backward<V>(q);
}

}  // namespace fusednorm::cuda

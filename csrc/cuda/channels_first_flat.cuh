// Channels-first kernels, flat: resident ones for samples of any length, like those of 7x7 pictures, whose channels do
// not begin at multiples of 16 bytes. As many channels as a vector has values do: in each sample they are whole
// vectors. All threads of a block copy them, whichever channel they are of, and put every value at its row on the shelf
// of its channel; from there on a channel is one long sample, which the teams walk as in channels_first_resident.cuh.
//
// Blocks: x = groups of adjacent channels, y = chunk of whole samples = rank in the cluster.
#pragma once

#include "channels_first_resident.cuh"

namespace fusednorm::cuda {

// A shelf's channel as a sample.
FN_DEVICE Samples one_sample() { return {INT32_MAX, 0, 0, true}; }

// The block's channels of its chunk in memory: S vectors in each sample.
template <class T>
struct Run {
  static constexpr int V = kVector<T>;
  static constexpr int kLanes = 8;                                     // vectors of a sample that a warp takes at once,
  static constexpr int kSpread = sizeof(T) == 2 ? 2 : 1;               // from samples that lie so far apart that the
  static constexpr int kGroup = kWarp / kLanes * kSpread, kAhead = 4;  // rows they go to are in different banks
  unsigned S, samples, pitch;                                          // pitch: of a channel on the shelf, in values
  uint32_t reciprocal;                                                 // of S
  int64_t first;                                                       // where the chunk's first sample is, in values,
  unsigned stride;                                                     // and how far from each other they are
  uint8_t* shelf = shared_memory<uint8_t>(kResidentScratch);

  template <class Arguments>
  FN_DEVICE Run(const Arguments& q, int chunk)
      : S(static_cast<unsigned>(q.shape.S)),
        samples(static_cast<unsigned>(q.chunks.size(chunk)) / S),
        pitch(tiles_of(q.chunks.length) * kTile),
        reciprocal(q.samples.reciprocal),
        first(int64_t{blockIdx.x} * V * S + static_cast<unsigned>(q.chunks.length) / S * chunk * (q.shape.C * S)),
        stride(kept(static_cast<int>(q.shape.C) * S)) {}

  // read(u, vector in memory), then f(u, vector in memory, places of its values) for the thread's vectors, kAhead of
  // them at a time: one vector of some samples after another, as its values have the same places in all of them.
  template <class Read, class F>
  FN_DEVICE void each(const T* p, int tensor, Read read, F f) const {
    const unsigned warps = block_threads() / kWarp, warp = thread_in_block() / kWarp, own = thread_in_block() % kWarp;
    // Lanes begin at a sector of memory, which has two vectors.
    const unsigned before = reinterpret_cast<uintptr_t>(p + first) / 16 % 2;
    const unsigned columns = (S + before + kLanes - 1) / kLanes, shares = columns < warps ? warps / columns : 1;
    for (unsigned column = warp; column < columns * shares; column += warps) {
      const unsigned share = column / columns, v = (column - share * columns) * kLanes + own % kLanes - before;
      if (v >= S) continue;
      const unsigned channel = multiply_high(v * V, reciprocal), row = v * V - channel * S;
      int place[V];  // bytes, like all places on the shelf below: what is added to them is not scaled anew
#pragma unroll
      for (int i = 0; i < V; ++i) {  // those beyond the channel's rows are the next channel's first ones
        const unsigned at = (tensor * V + channel) * pitch + row + i + (row + i < S ? 0 : pitch - S);
        place[i] = kept(static_cast<int>(at * sizeof(T)));
      }
      const T* from = p + first + v * V;
      for (unsigned at = share * kGroup + own / kLanes * kSpread; at < samples;
           at += kAhead / kSpread * shares * kGroup) {
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const unsigned n = at + u / kSpread * shares * kGroup + u % kSpread;
          if (n < samples) read(u, from + uint64_t{n} * stride);
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const unsigned n = at + u / kSpread * shares * kGroup + u % kSpread;
          const int sample = kept(static_cast<int>(n * S * sizeof(T)));
          if (n < samples) f(u, from + uint64_t{n} * stride, [&](int i) { return shelf + place[i] + sample; });
        }
      }
    }
  }

  // From memory to the shelf's tensor; zeros behind the last row. A barrier stands between this and the first use.
  FN_DEVICE void fetch(const T* p, int tensor) const {
    Pack<T, V> x[kAhead];
    each(
        p, tensor, [&](int u, const T* at) { x[u] = load<V>(at); },
        [&](int u, const T*, auto place) {
#pragma unroll
          for (int i = 0; i < V; ++i) *reinterpret_cast<T*>(place(i)) = reinterpret_cast<const T*>(&x[u])[i];
        });
    T* tail = reinterpret_cast<T*>(shelf) + (tensor * V + threadIdx.y) * pitch;
    for (unsigned i = samples * S + threadIdx.x; i < pitch; i += blockDim.x) tail[i] = narrow<T>(opmath_t<T>(0));
  }
  // From the shelf's first tensor to memory, behind a barrier.
  FN_DEVICE void deliver(T* p) const {
    each(
        p, 0, [](int, const T*) {},
        [&](int, const T* at, auto place) {
          Pack<T, V> x;
#pragma unroll
          for (int i = 0; i < V; ++i) reinterpret_cast<T*>(&x)[i] = *reinterpret_cast<const T*>(place(i));
          store<V>(const_cast<T*>(at), x);
        });
  }
};

template <class T>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_flat_forward(ForwardArguments<T> q) {
  using A = opmath_t<T>;
  constexpr int V = kVector<T>;
  const Samples samples = one_sample();
  const Team<ForwardArguments<T>, V> team(q, samples, in_cluster(), false);
  const Run<T> run(q, team.chunk);
  run.fetch(q.p.x, 0);
  barrier();

  Shelf<T, V, 1> shelf(q.chunks.length);
  const Seed seed = seed_of(q.chain);
  Moments<A> own[1] = {};
  const auto read = [&](const Tile&, auto& in) { shelf.get(0, in.x); };
  team.template each<1>(read, [&](const Tile& tile, auto& in) {
    gather_tile<V>(q, team, seed, tile, in.x, own);
    shelf.next();
  });
  const Affine<A> affine = finish_moments(q, team, own);
  shelf = Shelf<T, V, 1>(q.chunks.length);
  team.template each<1>(read, [&](const Tile& tile, auto& in) {
    apply_tile<V>(q, team, affine, seed, tile, in.x, in.residual);
    shelf.put(0, in.x);
    shelf.next();
  });
  barrier();
  run.deliver(q.p.y);
}

template <class T>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_flat_backward(BackwardArguments<T> q) {
  using A = opmath_t<T>;
  constexpr int V = kVector<T>;
  const Samples samples = one_sample();
  const Team<BackwardArguments<T>, V> team(q, samples, in_cluster(), false);
  const Run<T> run(q, team.chunk);
  run.fetch(q.p.x, 0);
  run.fetch(q.p.g, 1);
  barrier();

  Shelf<T, V, 2> shelf(q.chunks.length);
  const auto x = on_shelf<V>(shelf, 0), g = on_shelf<V>(shelf, 1);
  const auto read = [](const Tile&, auto&) {};
  const Affine<A> affine = saved_statistics(q, 0, team.c);
  const Seed seed = backward_seed(q);
  A sums[2] = {};
  team.template each<1>(read, [&](const Tile& tile, auto& in) {
    const Decided noise = restore_noise<V>(q, team, seed, tile);
    add_tile<V>(q, team, affine, noise, x, g, in.residual, sums);
    *shelf.byte = static_cast<uint8_t>(noise.keep);
    shelf.next();
  });
  const math::InputGradient<A> k = finish_sums(q, team, affine, sums);
  shelf = Shelf<T, V, 2>(q.chunks.length);
  team.template each<1>(read, [&](const Tile& tile, auto& in) {
    input_gradient_tile<V>(q, team, affine, k, {*shelf.byte}, tile, x, g, in.residual, in.x);
    shelf.put(0, in.x);
    shelf.next();
  });
  barrier();
  run.deliver(q.p.dx);
}

}  // namespace fusednorm::cuda

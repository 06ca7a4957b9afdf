// Channels-first memory as kernels walk it. A warp's unit is a tile: 256 consecutive rows r = n*S + s of one channel,
// starting at a multiple of 256, 8 of them for each thread. So the 32 Philox calls of a tile, one a thread, serve its
// rows exactly, whatever S is; and since r, not memory, is walked, short samples (7x7) waste no draws.
#pragma once

#include "chain.cuh"
#include "channel.cuh"
#include "plan.h"

namespace fusednorm::cuda {

constexpr int kFragment = 8;
constexpr int kTile = kFragment * kWarp;
static_assert(kFragment == math::kRowsPerCall);

// Tiles that a thread asks for before it uses any: 16 registers of them. Memory latency times bandwidth is about 26 kB
// on a multiprocessor; 768 threads then have 48 kB in flight.
template <class T, int V>
constexpr int kRegisters = kFragment * (V > 1 || sizeof(T) > 4 ? sizeof(T) : 4) / 4;
template <class T, int V>
constexpr int kTilesInFlight = 16 / kRegisters<T, V>;

// Element i of vector j of a thread's fragment is row (j*32 + lane)*V + i of the tile: accesses of a warp are
// contiguous. With V > 1 a vector lies within one sample (V divides S).
template <int V>
FN_DEVICE int row_in_tile(int j) {
  return (j * kWarp + lane()) * V;
}

struct Place {
  int n;
  int64_t s;
  FN_DEVICE int64_t row(int64_t S) const { return n * S + s; }
};

// The places of the tiles that a warp visits, a constant number of rows apart (which may be negative).
struct Walk {
  Place at, step;
  FN_DEVICE Walk(int64_t row, int64_t rows_apart, int64_t S) {
    at.n = static_cast<int>(row / S);
    at.s = row - at.n * S;
    step.n = static_cast<int>(rows_apart / S);
    step.s = rows_apart - step.n * S;
    if (step.s < 0) {
      step.s += S;
      --step.n;
    }
  }
  FN_DEVICE void advance(int64_t S) {
    at.n += step.n;
    at.s += step.s;
    if (at.s >= S) {
      at.s -= S;
      ++at.n;
    }
  }
};

// A warp's visit to a tile.
struct Tile {
  int visit;  // the how manieth
  Place at;   // of its first row
  int left;   // rows that are there from this one on
};

// Which tiles of its chunk a warp visits.
struct Visits {
  int64_t row;  // of the first visit
  int left;     // rows of the chunk from there on
  int step;     // rows between visits
  int count;

  // `descending` reads first what a pass before has read last, and finds it in the L2 cache.
  FN_DEVICE Visits(const Chunks& chunks, int chunk, bool descending) {
    const int rows = static_cast<int>(chunks.size(chunk)), tiles = (rows + kTile - 1) / kTile;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    count = warp < tiles ? (tiles - warp + warps - 1) / warps : 0;
    const int first = (descending ? tiles - 1 - warp : warp) * kTile;
    row = chunks.begin(chunk) + first;
    left = rows - first;
    step = (descending ? -warps : warps) * kTile;
  }

  // read(u, tile) for u < Ahead, then f(u, tile) for the same, until all are visited: so many loads are in flight at
  // once.
  template <int Ahead, class Read, class F>
  FN_DEVICE void each(int64_t S, Read read, F f) const {
    if (count == 0) return;
    Walk ahead(row, step, S);
    Walk walk = ahead;
    const auto tile = [&](int visit, const Place& at) { return Tile{visit, at, left - visit * step}; };
    for (int i = 0; i < count; i += Ahead) {
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if (i + u < count) read(u, tile(i + u, ahead.at));
        ahead.advance(S);
      }
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if (i + u < count) f(u, tile(i + u, walk.at));
        walk.advance(S);
      }
    }
  }
};

// How many samples further than its tile's first row the row i of the tile lies. `reciprocal` is that of S.
FN_DEVICE int samples_on(const Place& at, int i, int64_t S, uint32_t reciprocal) {
  return S >= kTile ? at.s + i >= S : multiply_high(static_cast<uint32_t>(at.s) + i, reciprocal);
}
// ceil(2^32 / S), which divides numbers up to 511 exactly; a single row needs none.
inline uint32_t reciprocal_of(int64_t S) {
  return S < 2 || S >= kTile ? 0 : static_cast<uint32_t>(((int64_t{1} << 32) + S - 1) / S);
}

// One channel of a tensor.
template <class T, int V>
struct Channel {
  using Fragment = Pack<T, V>[kFragment / V];
  int64_t offset, stride, S;  // of its first element; between its samples; between channels
  uint32_t reciprocal;

  FN_DEVICE int64_t index(const Place& at, int i) const {
    return offset + at.n * stride + at.s + i + samples_on(at, i, S, reciprocal) * (stride - S);
  }
  // A tile's rows, those that are there.
  FN_DEVICE void read(const T* p, const Tile& tile, Fragment& to) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = row_in_tile<V>(j);
      to[j] = i < tile.left ? load<V>(p + index(tile.at, i)) : Pack<T, V>{};
    }
  }
  FN_DEVICE void write(T* p, const Tile& tile, const Fragment& from) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = row_in_tile<V>(j);
      if (i < tile.left) store<V>(p + index(tile.at, i), from[j]);
    }
  }
};

template <int V, class T, class A>
FN_DEVICE void widen_fragment(const Pack<T, V> (&from)[kFragment / V], A (&to)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) to[i] = widen(from[i / V], i % V);
}
template <int V, class T, class A>
FN_DEVICE void narrow_fragment(const A (&from)[kFragment], Pack<T, V> (&to)[kFragment / V]) {
#pragma unroll
  for (int j = 0; j < kFragment / V; ++j) to[j] = narrow<T, V>(from + j * V);
}

// ---- noise
// ----------------------------------------------------------------------------------------------------------- The
// decisions of a tile's fragments. First each thread makes a Philox call, for 8 of the tile's rows or samples; then the
// fragments fetch their bits from the threads that drew them.
struct Draws {
  uint32_t byte;
  bool live;
  bool per_sample;

  FN_DEVICE explicit Draws(uint32_t saved) : byte(saved), live(true), per_sample(false) {}
  template <class A>
  FN_DEVICE Draws(const Stages<A>& stages, Seed seed, const Tile& tile, int64_t S, int64_t c)
      : byte(stages.noise == Noise::all_dropped ? 0 : kKeepAll),
        live(stages.noise == Noise::element || stages.noise == Noise::channel),
        per_sample(stages.noise == Noise::channel) {
    if (!live) return;
    const uint64_t group = static_cast<uint64_t>(per_sample ? tile.at.n : tile.at.row(S)) / math::kRowsPerCall + lane();
    byte = math::keep8(seed, group, static_cast<uint32_t>(c), stages.threshold);
  }

  // Bit i for element i of the fragment. All threads of the warp arrive.
  template <class T, int V>
  FN_DEVICE uint32_t fragment(const Channel<T, V>& channel, const Tile& tile) const {
    if (!live || (V == kFragment && !per_sample)) return byte;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      int i = row_in_tile<V>(j);
      if (per_sample) {
        i = (tile.at.n % math::kRowsPerCall + samples_on(tile.at, i, channel.S, channel.reciprocal)) % kTile;
      }
      const uint32_t drawn = shuffle(byte, i / math::kRowsPerCall) >> (i % math::kRowsPerCall);
      const uint32_t own = per_sample ? (drawn & 1u) * ((1u << V) - 1u) : drawn & ((1u << V) - 1u);
      bits |= own << (j * V);
    }
    return bits;
  }
};

// Where the thread's byte of a saved mask (C, ceil(rows / 8)) is, or null beyond the last row.
template <class Byte>
FN_DEVICE Byte* mask_byte(Byte* mask, int64_t rows, int64_t row, int64_t c) {
  const int64_t own = row + lane() * math::kRowsPerCall;
  return own < rows ? mask + c * ((rows + 7) / 8) + own / 8 : nullptr;
}

}  // namespace fusednorm::cuda

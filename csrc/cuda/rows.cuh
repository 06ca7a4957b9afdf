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
static_assert(kFragment == math::kRowsPerCall && kTile == kTileRows);

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

// The shape's S is below 2^31, or N is 1.
inline Samples samples_of(const Shape& shape) {
  const int64_t S = shape.S, stride = shape.C * S;
  if (shape.N == 1) return {INT32_MAX, stride, 0, true};
  const uint32_t reciprocal = S < kTile ? static_cast<uint32_t>(((int64_t{1} << 32) + S - 1) / S) : 0;
  return {static_cast<uint32_t>(S), stride, reciprocal, false};
}

// A warp's visit to a tile.
struct Tile {
  int visit;      // the how manieth
  int left;       // rows of the chunk from its first one on
  uint32_t s;     // of its first row, in its sample
  int64_t first;  // where that row is, in elements

  // How many samples further than the first row the row i lies. Exact for up to 511 rows.
  FN_DEVICE int samples_on(const Samples& samples, int i) const {
    if (samples.length >= kTile) return s + i >= samples.length;
    return samples.length == 1 ? i : multiply_high(s + i, samples.reciprocal);  // that of 1 does not fit 32 bits
  }
  FN_DEVICE bool there(int i) const { return i < left; }
  FN_DEVICE bool full() const { return left >= kTile; }
  // All rows are there, and in one sample: no bounds, no samples to find.
  FN_DEVICE bool plain(const Samples& samples) const { return full() && s + kTile <= samples.length; }
};

// One whose first rows, perhaps, belong to the group before.
struct CutTile : Tile {
  int skip;
  FN_DEVICE CutTile(const Tile& tile, int64_t row, int64_t first)
      : Tile(tile), skip(row < first ? static_cast<int>(first - row) : 0) {}
  FN_DEVICE bool there(int i) const { return i >= skip && i < left; }
  FN_DEVICE bool full() const { return skip == 0 && Tile::full(); }
  FN_DEVICE bool plain(const Samples& samples) const { return skip == 0 && Tile::plain(samples); }
};

// Which tiles of its chunk of channel c a warp visits.
struct Visits {
  Tile start;
  int step;  // rows between visits, perhaps negative
  uint32_t step_s;
  int64_t step_first, end;  // elements between visits; the chunk's last row + 1
  int count;

  // `descending` reads first what a pass before has read last, and finds it in the L2 cache.
  template <class Chunks>
  FN_DEVICE Visits(const Chunks& chunks, int chunk, int64_t c, int64_t S, const Samples& samples, bool descending)
      : end(chunks.end(chunk)) {
    const int rows = static_cast<int>(end - chunks.begin(chunk)), tiles = (rows + kTile - 1) / kTile;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    count = warp < tiles ? (tiles - warp + warps - 1) / warps : 0;
    const int before = (descending ? tiles - 1 - warp : warp) * kTile;
    step = (descending ? -warps : warps) * kTile;
    const int64_t length = samples.length, origin = samples.one ? chunks.begin(chunk) : 0;
    const int64_t row = chunks.begin(chunk) - origin + before, n = row / length;
    start = {0, rows - before, static_cast<uint32_t>(row - n * length),
             c * S + origin + row + n * (samples.stride - length)};
    const int64_t step_n = step < 0 ? -((length - 1 - step) / length) : step / length;  // rounded down
    step_s = static_cast<uint32_t>(step - step_n * length);
    step_first = step + step_n * (samples.stride - length);
  }

  FN_DEVICE int64_t row(const Tile& tile) const { return end - tile.left; }
  FN_DEVICE void advance(Tile& next, const Samples& samples) const {
    ++next.visit;
    next.left -= step;
    next.s += step_s;
    next.first += step_first;
    if (next.s >= samples.length) {
      next.s -= samples.length;
      next.first += samples.stride - samples.length;
    }
  }

  // read(u, tile) for u < Ahead, then f(tile) and move() for each of these in a loop that is not unrolled: f is long,
  // and finds what was read for its tile at u = 0, since move() shifts everything by one.
  template <int Ahead, class Read, class F, class Move>
  FN_DEVICE void each(const Samples& samples, Read read, F f, Move move) const {
    Tile tile = start;
    if constexpr (Ahead == 1) {  // no second place to keep
      for (; tile.visit < count; advance(tile, samples)) {
        read(0, tile);
        f(tile);
      }
    } else {
      Tile ahead = start;
      while (tile.visit < count) {
#pragma unroll
        for (int u = 0; u < Ahead; ++u) {
          if (ahead.visit < count) read(u, ahead);
          advance(ahead, samples);
        }
#pragma unroll 1
        for (int u = 0; u < Ahead; ++u) {
          if (tile.visit < count) f(tile);
          advance(tile, samples);
          move();
        }
      }
    }
  }

  // read(u, tile) for u < Ahead, then f(u, tile) for the same, until all are visited: so many loads are in flight at
  // once.
  template <int Ahead, class Read, class F>
  FN_DEVICE void each(const Samples& samples, Read read, F f) const {
    Tile next = start;
    while (next.visit < count) {
      Tile tile[Ahead];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        tile[u] = next;
        if (next.visit < count) read(u, tile[u]);
        advance(next, samples);
      }
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if (tile[u].visit < count) f(u, tile[u]);
      }
    }
  }
};

template <class T, int V>
using Fragment = Pack<T, V>[kFragment / V];

// g(j, at, there) for the vectors of the thread's fragment: whether they are there, and at which element.
template <int V, class Tile, class G>
FN_DEVICE void each_vector(const Tile& tile, const Samples& samples, G g) {
  if (tile.plain(samples)) {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) g(j, tile.first + row_in_tile<V>(j), true);
  } else {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = row_in_tile<V>(j);
      g(j, tile.first + i + tile.samples_on(samples, i) * (samples.stride - samples.length), tile.there(i));
    }
  }
}

// Rows that are not there read as zeros.
template <int V, class T, class Tile>
FN_DEVICE void read(const T* p, const Tile& tile, const Samples& samples, Fragment<T, V>& to) {
  each_vector<V>(tile, samples, [&](int j, int64_t at, bool there) { to[j] = there ? load<V>(p + at) : Pack<T, V>{}; });
}
template <int V, class T, class Tile>
FN_DEVICE void write(T* p, const Tile& tile, const Samples& samples, const Fragment<T, V>& from) {
  each_vector<V>(tile, samples, [&](int j, int64_t at, bool there) {
    if (there) store<V>(p + at, from[j]);
  });
}

template <int V, class T, class A>
FN_DEVICE void widen_fragment(const Fragment<T, V>& from, A (&to)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) to[i] = widen(from[i / V], i % V);
}
template <int V, class T, class A>
FN_DEVICE void narrow_fragment(const A (&from)[kFragment], Fragment<T, V>& to) {
#pragma unroll
  for (int j = 0; j < kFragment / V; ++j) to[j] = narrow<T, V>(from + j * V);
}

// ---- noise --------------------------------------------------------------------------------------------------------
// The decisions of a tile's fragments. First each thread makes a Philox call, for 8 of the tile's rows or samples;
// then the fragments fetch their bits from the threads that drew them.
struct Draws {
  uint32_t byte;
  bool live;
  bool per_sample;
  int skipped = 0;  // samples of the first call that lie before the tile

  FN_DEVICE explicit Draws(uint32_t saved) : byte(saved), live(true), per_sample(false) {}
  template <class A>
  FN_DEVICE Draws(const Stages<A>& stages, Seed seed, const Samples& samples, int64_t row, int64_t c)
      : byte(stages.draw == Draw::all_dropped ? 0 : kKeepAll),
        live(stages.draw == Draw::each_row || stages.draw == Draw::each_sample),
        per_sample(stages.draw == Draw::each_sample) {
    if (!live) return;
    byte = math::keep8(seed, call(samples, row), static_cast<uint32_t>(c), stages.threshold);
  }
  // Without decisions, for the places of multipliers.
  FN_DEVICE explicit Draws(Draw draw) : byte(0), live(true), per_sample(draw == Draw::each_sample) {}

  // The Philox call that this thread makes.
  FN_DEVICE uint64_t call(const Samples& samples, int64_t row) {
    uint64_t first = row;
    if (per_sample) {
      first = samples.one ? 0 : row / samples.length;
      skipped = first % math::kRowsPerCall;
    }
    return first / math::kRowsPerCall + lane();
  }

  // Bit i for element i of the fragment. All threads of the warp arrive.
  template <int V>
  FN_DEVICE uint32_t fragment(const Samples& samples, const Tile& tile) const {
    if (!live || (V == kFragment && !per_sample)) return byte;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      int i = row_in_tile<V>(j);
      if (per_sample) {
        i = (skipped + tile.samples_on(samples, i)) % kTile;
      }
      const uint32_t drawn = shuffle(byte, i / math::kRowsPerCall) >> (i % math::kRowsPerCall);
      const uint32_t own = per_sample ? (drawn & 1u) * ((1u << V) - 1u) : drawn & ((1u << V) - 1u);
      bits |= own << (j * V);
    }
    return bits;
  }

  // m[i] for element i of the fragment, of what each thread has drawn. All threads of the warp arrive.
  template <int V, class A>
  FN_DEVICE void fragment(const Samples& samples, const Tile& tile, const float (&drawn)[math::kRowsPerCall],
                          A (&m)[kFragment]) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = row_in_tile<V>(j);
      if (per_sample) {
        const int own = (skipped + tile.samples_on(samples, i)) % kTile;
        float value = 0;
#pragma unroll
        for (int from = 0; from < math::kRowsPerCall; ++from) {
          const float offered = shuffle(drawn[from], own / math::kRowsPerCall);
          if (own % math::kRowsPerCall == from) value = offered;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) m[j * V + v] = value;
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float value = drawn[v];
#pragma unroll
          for (int from = 0; V < kFragment && from < math::kRowsPerCall; from += V) {
            const float offered = shuffle(drawn[from + v], i / math::kRowsPerCall);
            if (i % math::kRowsPerCall == from) value = offered;
          }
          m[j * V + v] = value;
        }
      }
    }
  }
};

// Decisions: those of the thread's Philox call, and of its fragment. All ones where the noise makes none.
struct Drawn {
  uint32_t byte, keep;
};

// The multipliers of a tile's fragment.
template <int V, class A>
FN_DEVICE Drawn draw_fragment(const Program<A>& q, Seed seed, const Samples& samples, const Tile& tile, int64_t row,
                              int64_t c, A (&m)[kFragment]) {
  if (q.one_channel) c = 0;
  if (q.noise == Noise::constant) {
    multipliers(q, kKeepAll, m);
    return {kKeepAll, kKeepAll};
  }
  Draws draws(q.draw);
  float drawn[math::kRowsPerCall] = {};
  const uint64_t call = draws.call(samples, row);
  draws.byte = draw_call(q, seed, call, static_cast<uint32_t>(c), drawn);
  if (q.noise != Noise::bernoulli) {
    draws.template fragment<V>(samples, tile, drawn, m);
    return {kKeepAll, kKeepAll};
  }
  const uint32_t keep = draws.template fragment<V>(samples, tile);
  multipliers(q, keep, m);
  return {draws.byte, keep};
}

// The inverse of Draws::fragment: from the bits of a fragment to those of the 8 rows of the thread's Philox call.
template <int V>
FN_DEVICE uint32_t byte_of_fragments(uint32_t bits) {
  if (V == kFragment) return bits;
  constexpr int kVectors = kFragment / V;
  uint32_t byte = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = lane() * kVectors + i;
    byte |= (shuffle(bits, vector % kWarp) >> (vector / kWarp * V) & ((1u << V) - 1u)) << (i * V);
  }
  return byte;
}

// A channel's bytes of a saved mask (C, ceil(rows / 8)), one for each Philox call: those of a chunk that ends before
// the row `end`. Tiles begin at multiples of 8 rows, so a tile's first byte lies as far before the last one as it has
// bytes left.
template <class Byte>
struct SavedBytes {
  Byte* own;  // the thread's, if a tile began at the end
  FN_DEVICE SavedBytes(Byte* mask, int64_t rows, int64_t c, int64_t end)
      : own(mask + c * ((rows + 7) / 8) + (end + 7) / 8 + lane()) {}
  FN_DEVICE Byte* at(const Tile& tile) const { return own - ((tile.left + 7) >> 3); }
  FN_DEVICE bool there(const Tile& tile) const { return lane() * math::kRowsPerCall < tile.left; }
};

}  // namespace fusednorm::cuda

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
FN_HOST_DEVICE int tiles_of(int64_t rows) { return static_cast<int>((rows + kTile - 1) / kTile); }

template <class T>
constexpr int kVector = 16 / sizeof(T);  // values of one access

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

// Up to here numerators may be 8 times as large.
constexpr int kMostReciprocal = 1 << 14;

// The shape's S is below 2^31, or N is 1.
inline Samples samples_of(const Shape& shape) {
  const int64_t S = shape.S, gap = (shape.C - 1) * S;
  if (shape.N == 1) return {INT32_MAX, gap, 0, true};
  const uint32_t reciprocal = S < kMostReciprocal ? static_cast<uint32_t>(((int64_t{1} << 32) + S - 1) / S) : 0;
  return {static_cast<int>(S), gap, reciprocal, false};
}

// A warp's visit to a tile.
struct Tile {
  int visit;      // the how manieth
  int left;       // rows of the chunk from its first one on
  int room;       // rows of the sample, likewise
  int64_t first;  // where the thread's first row is, in elements, if it is in that sample

  // How many samples further than the first row the row i lies. Exact for up to 511 rows.
  FN_DEVICE int samples_on(const Samples& samples, int i) const {
    if (samples.length >= kTile) return i >= room;
    if (samples.length == 1) return i;  // whose reciprocal does not fit 32 bits
    return multiply_high(samples.length - room + i, samples.reciprocal);
  }
  FN_DEVICE bool there(int i) const { return i < left; }
  FN_DEVICE bool full() const { return left >= kTile; }
  // Of the thread's fragment, whether element i is in a row that counts, and any of a vector.
  FN_DEVICE bool counts(int) const { return true; }
  template <int V>
  FN_DEVICE bool any_counts(int) const {
    return true;
  }
  // All rows are there, and in one sample: no bounds, no samples to find.
  FN_DEVICE bool plain() const { return (left < room ? left : room) >= kTile; }
};

// One whose first rows, perhaps, belong to the group before, and with rows that do not count. These are read as zeros,
// too, but written.
struct CutTile : Tile {
  int skip;
  uint32_t counting;  // bits of the thread's fragment
  FN_DEVICE CutTile(const Tile& tile, int64_t row, int64_t first, uint32_t counting)
      : Tile(tile), skip(row < first ? static_cast<int>(first - row) : 0), counting(counting) {}
  FN_DEVICE bool there(int i) const { return i >= skip && i < left; }
  FN_DEVICE bool counts(int i) const { return counting >> i & 1u; }
  template <int V>
  FN_DEVICE bool any_counts(int vector) const {
    return counting >> vector * V & ((1u << V) - 1u);
  }
  FN_DEVICE bool full() const { return skip == 0 && counting == kKeepAll && Tile::full(); }
  FN_DEVICE bool plain() const { return skip == 0 && Tile::plain(); }
};

// Which tiles of its chunk of channel c a warp visits.
struct Visits {
  Tile start;
  int step, step_s;         // rows between visits, perhaps negative, and without whole samples
  int64_t step_first, end;  // elements between visits; the chunk's last row + 1
  int64_t end_call;         // the thread's Philox call, if a tile began at the end
  int count;

  // The thread's rows begin `offset` behind those of the warp. `descending` reads first what a pass before has read
  // last, and finds it in the L2 cache.
  template <class Chunks>
  FN_DEVICE Visits(const Chunks& chunks, int chunk, int64_t c, int64_t S, const Samples& samples, int offset,
                   bool descending)
      : end(chunks.end(chunk)), end_call((end + 7) / 8 + lane()) {
    const int rows = static_cast<int>(end - chunks.begin(chunk)), tiles = (rows + kTile - 1) / kTile;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    count = warp < tiles ? (tiles - warp + warps - 1) / warps : 0;
    const int before = (descending ? tiles - 1 - warp : warp) * kTile;
    step = (descending ? -warps : warps) * kTile;
    const int64_t length = samples.length, origin = samples.one ? chunks.begin(chunk) : 0;
    const int64_t row = chunks.begin(chunk) - origin + before, n = row / length;
    start = {0, rows - before, static_cast<int>((n + 1) * length - row),
             c * S + origin + row + n * samples.gap + offset};
    const uint32_t further = step < 0 ? samples.length - 1u - step : step;
    const int64_t samples_further = further / samples.length, step_n = step < 0 ? -samples_further : samples_further;
    step_s = static_cast<int>(step - step_n * length);
    step_first = step + step_n * samples.gap;
  }

  FN_DEVICE int64_t row(const Tile& tile) const { return end - tile.left; }
  // The Philox call of the thread's rows; tiles begin at multiples of 8.
  FN_DEVICE int64_t call(const Tile& tile) const { return end_call - ((tile.left + 7) >> 3); }
  FN_DEVICE void advance(Tile& next, const Samples& samples) const {
    ++next.visit;
    next.left -= step;
    next.room -= step_s;
    next.first += step_first;
    if (next.room <= 0) {
      next.room += samples.length;
      next.first += samples.gap;
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
    if constexpr (Ahead == 1) {
      for (; next.visit < count; advance(next, samples)) {
        read(0, next);
        f(0, next);
      }
    } else {
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
  }
};

template <class T, int V>
using Fragment = Pack<T, V>[kFragment / V];

// g(j, at, there) for the vectors of the thread's fragment: whether they are there, and at which element.
template <int V, class Tile, class G>
FN_DEVICE void each_vector(const Tile& tile, const Samples& samples, G g) {
  if (tile.plain()) {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) g(j, tile.first + j * kWarp * V, true);
  } else {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = row_in_tile<V>(j);
      g(j, tile.first + j * kWarp * V + tile.samples_on(samples, i) * samples.gap, tile.there(i));
    }
  }
}

// Rows that are not there read as zeros.
template <int V, class T, class Tile>
FN_DEVICE void read(const T* p, const Tile& tile, const Samples& samples, Fragment<T, V>& to) {
  each_vector<V>(tile, samples, [&](int j, int64_t at, bool there) {
    to[j] = there && tile.template any_counts<V>(j) ? load<V>(p + at) : Pack<T, V>{};
  });
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

// Zeros where rows do not count.
template <int V, class T>
FN_DEVICE void blank(const CutTile& tile, Fragment<T, V>& of) {
  if (tile.counting == kKeepAll) return;
  opmath_t<T> v[kFragment];
  widen_fragment<V>(of, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = tile.counts(i) ? v[i] : opmath_t<T>(0);
  narrow_fragment<V>(v, of);
}

// ---- noise --------------------------------------------------------------------------------------------------------
// First each thread makes a Philox call, for 8 of the tile's rows or samples; then the fragments fetch their decisions,
// or multipliers, from the threads that drew them. All threads of the warp arrive.

// Rows: bit i for element i of the fragment.
template <int V>
FN_DEVICE uint32_t row_bits(uint32_t byte) {
  if (V == kFragment) return byte;
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kFragment / V; ++j) {
    const int i = row_in_tile<V>(j);
    const uint32_t drawn = shuffle(byte, i / math::kRowsPerCall) >> (i % math::kRowsPerCall);
    bits |= (drawn & ((1u << V) - 1u)) << (j * V);
  }
  return bits;
}
// m[i] for element i of the fragment.
template <int V, class A>
FN_DEVICE void row_values(const float (&drawn)[math::kRowsPerCall], A (&m)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    const int row = row_in_tile<V>(i / V);
    float value = drawn[i % V];
#pragma unroll
    for (int from = 0; V < kFragment && from < math::kRowsPerCall; from += V) {
      const float offered = shuffle(drawn[from + i % V], row / math::kRowsPerCall);
      if (row % math::kRowsPerCall == from) value = offered;
    }
    m[i] = value;
  }
}

// Samples: the tile's first one may be any of the 8 of the first call.
struct SampleDraws {
  uint64_t call;  // the thread's
  int skipped;    // samples of the first call that lie before the tile
  FN_DEVICE SampleDraws(const Samples& samples, const Visits& visits, const Tile& tile, bool per_sample = true) {
    if (per_sample) {
      const uint64_t first = samples.one ? 0 : visits.row(tile) / samples.length;
      call = first / math::kRowsPerCall + lane();
      skipped = first % math::kRowsPerCall;
    } else {
      call = visits.call(tile);
      skipped = 0;
    }
  }
  // Where the draw of element j * V of the fragment is among those of the warp.
  template <int V>
  FN_DEVICE int place(const Samples& samples, const Tile& tile, int j) const {
    return (skipped + tile.samples_on(samples, row_in_tile<V>(j))) % kTile;
  }
  template <int V>
  FN_DEVICE uint32_t bits(const Samples& samples, const Tile& tile, uint32_t byte) const {
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = place<V>(samples, tile, j);
      const uint32_t drawn = shuffle(byte, i / math::kRowsPerCall) >> (i % math::kRowsPerCall);
      bits |= (drawn & 1u) * ((1u << V) - 1u) << (j * V);
    }
    return bits;
  }
  template <int V, class A>
  FN_DEVICE void values(const Samples& samples, const Tile& tile, const float (&drawn)[math::kRowsPerCall],
                        A (&m)[kFragment]) const {
#pragma unroll
    for (int j = 0; j < kFragment / V; ++j) {
      const int i = place<V>(samples, tile, j);
      float value = 0;
#pragma unroll
      for (int from = 0; from < math::kRowsPerCall; ++from) {
        const float offered = shuffle(drawn[from], i / math::kRowsPerCall);
        if (i % math::kRowsPerCall == from) value = offered;
      }
#pragma unroll
      for (int v = 0; v < V; ++v) m[j * V + v] = value;
    }
  }
};

// Decisions: those of the thread's Philox call, and of its fragment. All ones where the noise makes none.
struct Drawn {
  uint32_t byte, keep;
};

template <int V, class A>
FN_DEVICE Drawn draw_fragment(const Stages<A>& q, Seed seed, const Samples& samples, const Visits& visits,
                              const Tile& tile, int64_t channel) {
  const uint32_t c = static_cast<uint32_t>(channel);
  if (q.draw == Draw::each_row) {
    const uint32_t byte = math::keep8(seed, visits.call(tile), c, q.threshold);
    return {byte, row_bits<V>(byte)};
  }
  if (q.draw == Draw::each_sample) {
    const SampleDraws draws(samples, visits, tile);
    const uint32_t byte = math::keep8(seed, draws.call, c, q.threshold);
    return {byte, draws.bits<V>(samples, tile, byte)};
  }
  const uint32_t all = q.draw == Draw::all_dropped ? 0 : kKeepAll;
  return {all, all};
}

// The multipliers of a tile's fragment.
template <int V, class A>
FN_DEVICE Drawn draw_fragment(const Program<A>& q, Seed seed, const Samples& samples, const Visits& visits,
                              const Tile& tile, int64_t channel, A (&m)[kFragment]) {
  const uint32_t c = q.one_channel ? 0 : static_cast<uint32_t>(channel);
  if (q.noise == Noise::constant) {
    multipliers(q, kKeepAll, m);
    return {kKeepAll, kKeepAll};
  }
  float drawn[math::kRowsPerCall] = {};
  const bool per_sample = q.draw == Draw::each_sample;
  const SampleDraws draws(samples, visits, tile, per_sample);
  const uint32_t byte = draw_call(q, seed, draws.call, c, drawn);
  if (q.noise != Noise::bernoulli) {
    per_sample ? draws.values<V>(samples, tile, drawn, m) : row_values<V>(drawn, m);
    return {kKeepAll, kKeepAll};
  }
  const uint32_t keep = per_sample ? draws.bits<V>(samples, tile, byte) : row_bits<V>(byte);
  multipliers(q, keep, m);
  return {byte, keep};
}

// The inverse of row_bits: from the bits of a fragment to those of the 8 rows of the thread's Philox call.
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

// A channel's bytes of a saved mask (C, ceil(rows / 8)), one for each Philox call.
struct SavedBytes {
  uint8_t* bytes;
  int first;  // the thread's first row, in a tile; beyond all of them without a mask
  FN_DEVICE SavedBytes(const uint8_t* mask, int64_t rows, int64_t c)
      : bytes(const_cast<uint8_t*>(mask) + c * ((rows + 7) / 8)),
        first(kept(mask ? lane() * math::kRowsPerCall : INT32_MAX)) {}
  FN_DEVICE uint32_t get(const Visits& visits, const Tile& tile) const {
    return tile.there(first) ? bytes[visits.call(tile)] : 0;
  }
  FN_DEVICE void put(const Visits& visits, const Tile& tile, uint32_t byte) const {
    if (tile.there(first)) bytes[visits.call(tile)] = static_cast<uint8_t>(byte);
  }
};

}  // namespace fusednorm::cuda

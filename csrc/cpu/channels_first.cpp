// Channels-first: the values of a channel are N pieces of S contiguous ones. Tiles are cut so that they stand in one
// piece of memory; only where pieces are short does a tile span several (in rows r = n*S + s) and go through a buffer.
// Noise is drawn for consecutive rows, so it costs the same either way.
//
// One thread takes a channel (or a few adjacent ones, when S is small, to read longer stretches) through both passes,
// the second one backwards: what the first pass read last is still in cache. With fewer channels than keep all threads
// busy, the tiles are shared instead, pass by pass.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "drivers.h"

namespace fusednorm::cpu {
namespace {

constexpr int64_t kTile = 4096;         // values, at most: they stay in the first-level cache
constexpr int64_t kStretch = 26000;     // bytes: adjacent channels are taken together until they are this long
constexpr int64_t kAhead = 1024;        // bytes to prefetch ahead where pieces are short
constexpr int64_t kResident = 2 << 20;  // bytes: or until the group holds this much

void set_bits(uint32_t* words, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t first = begin % 32, n = std::min<int64_t>(32 - first, end - begin);
    words[begin / 32] |= (n == 32 ? ~0u : (1u << n) - 1) << first;
    begin += n;
  }
}

template <class T>
class Channels {
 public:
  explicit Channels(const Call& call) : shape_(call.shape), chain_(call.chain), seed_(math::split_seed(call.seed)) {
    const PieceLayout pieces = piece_layout(shape_);
    length_ = pieces.length;
    tiles_per_piece_ = (length_ + kTile - 1) / kTile;
    tile_ = padded((length_ + tiles_per_piece_ - 1) / tiles_per_piece_);
    tiles_per_piece_ = (length_ + tile_ - 1) / tile_;
    tiles_ = pieces.count * tiles_per_piece_;
    in_place_ = length_ == shape_.S || whole();
  }

  int64_t pieces() const { return tiles_ / tiles_per_piece_; }
  int64_t tiles_per_piece() const { return tiles_per_piece_; }
  int64_t tiles() const { return tiles_; }
  int64_t rows(int64_t tile) const { return std::min(tile_, length_ - tile % tiles_per_piece_ * tile_); }
  int64_t group() const {
    const int64_t piece = shape_.S * static_cast<int64_t>(sizeof(T));
    return whole() ? 1 : std::clamp<int64_t>(std::min(kStretch / piece, kResident / (piece * shape_.N)), 1, 64);
  }
  // The tile in one piece: where it stands, or in buffer.
  const T* load(const T* base, int64_t c, int64_t tile, T* buffer) const {
    if (in_place_) return base + place(c, first_row(tile));
    for_pieces(c, tile, [&](int64_t at, int64_t memory, int64_t n) {
      // Short pieces far apart defeat the processor's prefetching; those of the next channels lie just behind.
      for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(base + memory + kAhead / sizeof(T) + i);
      std::copy_n(base + memory, n, buffer + at);
    });
    return buffer;
  }
  // Where to write the tile; store() then brings it to its place.
  T* target(T* base, int64_t c, int64_t tile, T* buffer) const {
    return in_place_ ? base + place(c, first_row(tile)) : buffer;
  }
  void store(T* base, int64_t c, int64_t tile, const T* from) const {
    if (in_place_) return;
    for_pieces(c, tile, [&](int64_t at, int64_t memory, int64_t n) { std::copy_n(from + at, n, base + memory); });
  }

  // The tile's keep bits, or null where everything is treated alike. The buffer holds kTile / 32 + 1 words.
  const uint32_t* draw(int64_t c, int64_t tile, uint32_t* buffer) const {
    const int64_t first = first_row(tile), n = rows(tile);
    if (!chain_.draws()) return nullptr;
    if (chain_.granularity == Granularity::element) {
      const int64_t shift = first % math::kRowsPerCall, words = words_of(n + shift);
      keep_run(c, first / math::kRowsPerCall, buffer, words);
      if (shift) {  // a piece may begin inside a group of rows
        for (int64_t i = 0; i + 1 < words; ++i) buffer[i] = buffer[i] >> shift | buffer[i + 1] << (32 - shift);
        buffer[words - 1] >>= shift;
      }
      return buffer;
    }
    std::fill_n(buffer, words_of(n), 0u);
    int64_t drawn = -1;
    uint32_t bits = 0;  // of 32 consecutive n
    for (int64_t i = 0; i < n;) {
      const int64_t sample = (first + i) / shape_.S, end = std::min(n, (sample + 1) * shape_.S - first);
      if (sample / 32 != drawn) keep_run(c, (drawn = sample / 32) * 32 / math::kRowsPerCall, &bits, 1);
      if (bits >> (sample % 32) & 1) set_bits(buffer, i, end);
      i = end;
    }
    return buffer;
  }

  // The tile's words of a saved mask.
  int64_t mask_offset(int64_t c, int64_t tile) const {
    const int64_t words = words_of(length_);
    return (c * pieces() + tile / tiles_per_piece_) * words + tile % tiles_per_piece_ * tile_ / 32;
  }

 private:
  bool whole() const { return shape_.N == 1 || shape_.C == 1; }
  int64_t first_row(int64_t tile) const { return tile / tiles_per_piece_ * length_ + tile % tiles_per_piece_ * tile_; }
  int64_t place(int64_t c, int64_t r) const {
    return whole() ? c * shape_.rows() + r : (r / shape_.S * shape_.C + c) * shape_.S + r % shape_.S;
  }
  void keep_run(int64_t c, int64_t group, uint32_t* out, int64_t words) const {
    kernels().keep_run(seed_.low, seed_.high, static_cast<uint32_t>(c), group, chain_.threshold, out, words);
  }

  // f(position in the tile, position in memory, length) for every contiguous piece of the tile.
  template <class F>
  void for_pieces(int64_t c, int64_t tile, const F& f) const {
    const int64_t begin = first_row(tile), end = begin + rows(tile);
    for (int64_t r = begin; r < end;) {
      const int64_t n = whole() ? end - r : std::min(end - r, shape_.S - r % shape_.S);
      f(r - begin, place(c, r), n);
      r += n;
    }
  }

  Shape shape_;
  Chain chain_;
  math::Seed seed_;
  int64_t length_;  // of a piece; a piece that is not contiguous in memory spans the channel
  int64_t tile_, tiles_per_piece_, tiles_;
  bool in_place_;
};

struct Step {
  int64_t c, tile;
};

// Two passes over every channel: gather(step) makes the partial result of a tile, finish(c, partials) merges them,
// emit(step) is the second pass. It goes back from piece to piece, but forward within one, where the processor
// prefetches.
template <class Partial, class Gather, class Finish, class Emit>
void two_passes(const Shape& shape, int64_t pieces, int64_t tiles_per_piece, int64_t group, bool gathers,
                const Gather& gather, const Finish& finish, const Emit& emit) {
  const int64_t groups = (shape.C + group - 1) / group, threads = at::get_num_threads(),
                tiles = pieces * tiles_per_piece;
  const bool serial = shape.C * shape.rows() < kSerial;
  if (serial || groups % threads == 0 || groups >= 8 * threads) {
    for_tasks(groups, serial, false, [&](int64_t i) {
      const int64_t first = i * group, last = std::min(first + group, shape.C);
      std::vector<Partial> partials(gathers ? (last - first) * tiles : 0);
      const auto for_steps = [&](int64_t piece, const auto& f) {
        for (int64_t c = first; c < last; ++c) {
          for (int64_t tile = piece * tiles_per_piece; tile < (piece + 1) * tiles_per_piece; ++tile) f(Step{c, tile});
        }
      };
      for (int64_t piece = 0; gathers && piece < pieces; ++piece) {
        for_steps(piece, [&](Step at) { partials[(at.c - first) * tiles + at.tile] = gather(at); });
      }
      for (int64_t c = first; c < last; ++c) finish(c, partials.data() + (gathers ? (c - first) * tiles : 0));
      for (int64_t piece = pieces - 1; piece >= 0; --piece) for_steps(piece, emit);
    });
    return;
  }
  const int64_t steps = shape.C * tiles;
  const auto step = [&](int64_t k) { return Step{k / tiles, k % tiles}; };
  std::vector<Partial> partials(gathers ? steps : 0);
  if (gathers) for_tasks(steps, false, false, [&](int64_t k) { partials[k] = gather(step(k)); });
  for (int64_t c = 0; c < shape.C; ++c) finish(c, partials.data() + (gathers ? c * tiles : 0));
  for_tasks(steps, false, false, [&](int64_t k) { emit(step(k)); });
}

struct GradientSums {
  double dz, dz_xmu;
};

template <class A>
struct Coefficients {
  std::vector<A> a, b, c;
  explicit Coefficients(int64_t channels) : a(channels), b(channels), c(channels) {}
};

}  // namespace

template <class T>
void forward_channels_first(const Call& call, const ForwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Channels<T> channels(call);
  const int64_t tiles = channels.tiles();
  ChannelVectors<A> vectors(call.shape.C);
  const auto gather = [&](Step at) {
    alignas(64) T buffer[kTile];
    math::Moments<double> m{static_cast<double>(channels.rows(at.tile)), 0, 0};
    kernels_for<T>().moments_run(channels.load(p.x, at.c, at.tile, buffer), channels.rows(at.tile), &m.mean, &m.m2);
    return m;
  };
  const auto finish = [&](int64_t c, const math::Moments<double>* partials) {
    math::Moments<double> m{0, 0, 0};
    for (int64_t tile = 0; call.training && tile < tiles; ++tile) m = math::merge(m, partials[tile]);
    finish_statistics(call, p, c, m.mean, m.m2, vectors);
  };
  const auto emit = [&](Step at) {
    alignas(64) T in[kTile], out[kTile];
    uint32_t bits[kTile / 32 + 1];
    Apply<T> q{};
    q.rows = 1;
    q.cols = channels.rows(at.tile);
    q.x = channels.load(p.x, at.c, at.tile, in);
    q.y = channels.target(p.y, at.c, at.tile, out);
    q.affine = vectors.at(at.c);
    std::copy_n(call.chain.parameters, 2, q.activation);
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = channels.draw(at.c, at.tile, bits);
    q.save = p.mask ? p.mask + channels.mask_offset(at.c, at.tile) : nullptr;
    kernels_for<T>().apply[kRun][call.chain.activation](q);
    channels.store(p.y, at.c, at.tile, q.y);
  };
  two_passes<math::Moments<double>>(call.shape, channels.pieces(), channels.tiles_per_piece(), channels.group(),
                                    call.training, gather, finish, emit);
}

template <class T>
void backward_channels_first(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Channels<T> channels(call);
  const int64_t tiles = channels.tiles();
  ChannelVectors<A> vectors(call.shape.C);
  for (int64_t c = 0; c < call.shape.C; ++c) load_statistics(p, c, vectors);
  Coefficients<A> coefficients(call.shape.C);
  const auto arguments = [&](Step at, T* x, T* g, uint32_t* bits) {
    Backward<T> q{};
    q.rows = 1;
    q.cols = channels.rows(at.tile);
    q.x = channels.load(p.x, at.c, at.tile, x);
    q.g = channels.load(p.g, at.c, at.tile, g);
    q.affine = vectors.at(at.c);
    std::copy_n(call.chain.parameters, 2, q.activation);
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = p.mask ? p.mask + channels.mask_offset(at.c, at.tile) : channels.draw(at.c, at.tile, bits);
    q.keep_is_saved = p.mask != nullptr;
    return q;
  };
  const auto gather = [&](Step at) {
    alignas(64) T x[kTile], g[kTile];
    uint32_t bits[kTile / 32 + 1];
    GradientSums sums{0, 0};
    Backward<T> q = arguments(at, x, g, bits);
    q.sum_dz = &sums.dz;
    q.sum_dz_xmu = &sums.dz_xmu;
    kernels_for<T>().gradient_sums[kRun][call.chain.activation](q);
    return sums;
  };
  const bool gathers = p.grad_weight != nullptr;
  const auto finish = [&](int64_t c, const GradientSums* partials) {
    GradientSums sums{0, 0};
    for (int64_t tile = 0; gathers && tile < tiles; ++tile) {
      sums.dz += partials[tile].dz;
      sums.dz_xmu += partials[tile].dz_xmu;
    }
    const math::InputGradient<double> k = finish_gradient(call, p, c, sums.dz, sums.dz_xmu, vectors.scale[c]);
    coefficients.a[c] = static_cast<A>(k.a);
    coefficients.b[c] = static_cast<A>(k.b);
    coefficients.c[c] = static_cast<A>(k.c);
  };
  const auto emit = [&](Step at) {
    if (!p.dx) return;
    alignas(64) T x[kTile], g[kTile], out[kTile];
    uint32_t bits[kTile / 32 + 1];
    Backward<T> q = arguments(at, x, g, bits);
    q.dx = channels.target(p.dx, at.c, at.tile, out);
    q.a = &coefficients.a[at.c];
    q.b = &coefficients.b[at.c];
    q.c = &coefficients.c[at.c];
    kernels_for<T>().input_gradient[kRun][call.chain.activation](q);
    channels.store(p.dx, at.c, at.tile, q.dx);
  };
  two_passes<GradientSums>(call.shape, channels.pieces(), channels.tiles_per_piece(), channels.group(), gathers, gather,
                           finish, emit);
}

template <class T>
T one_in_storage() {
  if constexpr (std::is_same_v<T, BFloat16>) return {0x3f80};
  if constexpr (std::is_same_v<T, Float16>) return {0x3c00};
  if constexpr (std::is_floating_point_v<T>) return 1;
}

// The forward of ones: identity statistics, no activation.
template <class T>
void noise(const Call& call, T* m) {
  using A = opmath_t<T>;
  const Channels<T> channels(call);
  const A zero = 0, one = 1;
  const std::vector<T> ones(kTile, one_in_storage<T>());
  for_tasks(call.shape.C * channels.tiles(), call.shape.C * call.shape.rows() < kSerial, false, [&](int64_t i) {
    const Step at{i / channels.tiles(), i % channels.tiles()};
    alignas(64) T out[kTile];
    uint32_t bits[kTile / 32 + 1];
    Apply<T> q{};
    q.rows = 1;
    q.cols = channels.rows(at.tile);
    q.x = ones.data();
    q.y = channels.target(m, at.c, at.tile, out);
    q.affine = {&zero, &one, &zero};
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = channels.draw(at.c, at.tile, bits);
    kernels_for<T>().apply[kRun][0](q);
    channels.store(m, at.c, at.tile, q.y);
  });
}

#define FN_INSTANTIATE(T)                                                            \
  template void forward_channels_first<T>(const Call&, const ForwardPointers<T>&);   \
  template void backward_channels_first<T>(const Call&, const BackwardPointers<T>&); \
  template void noise<T>(const Call&, T*);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(BFloat16)
FN_INSTANTIATE(Float16)

}  // namespace fusednorm::cpu

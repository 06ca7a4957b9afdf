// Channels-first: the values of a channel are N pieces of S contiguous ones. A channel is cut into tiles of kTile
// consecutive rows r = n*S + s, so that its noise is drawn without waste whatever S is; a tile that crosses pieces, or is
// not stored in opmath type, goes through a small buffer.
//
// One thread takes a channel (or a few adjacent ones, when S is so small that they share cache lines) through both
// passes, the second one backwards: what the first pass read last is still in cache. With fewer channels than keep all
// threads busy, the tiles are shared instead, pass by pass.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "drivers.h"

namespace fusednorm::cpu {
namespace {

constexpr int64_t kTile = 1024;

template <class T>
class Channels {
 public:
  using A = opmath_t<T>;

  explicit Channels(const Call& call)
      : shape_(call.shape), chain_(call.chain), seed_(call.seed), rows_(shape_.rows()), whole_(shape_.N == 1 || shape_.C == 1) {}

  int64_t tiles() const { return (rows_ + kTile - 1) / kTile; }
  int64_t tile_rows(int64_t tile) const { return std::min(kTile, rows_ - tile * kTile); }

  // Adjacent channels that share a cache line of each piece are taken together.
  int64_t group() const {
    const int64_t bytes = shape_.S * static_cast<int64_t>(sizeof(T));
    return std::clamp<int64_t>(bytes == 0 || whole_ ? 1 : 256 / bytes, 1, 64);
  }

  // The tile in opmath type: in place where it already stands so, else in buffer.
  const A* load(const T* base, int64_t c, int64_t tile, A* buffer) const {
    if (const T* p = direct(base, c, tile)) return reinterpret_cast<const A*>(p);
    for_pieces(c, tile, [&](int64_t at, int64_t memory, int64_t n) { widen(base + memory, buffer + at, n); });
    return buffer;
  }
  // Where to write the tile; store() then brings it to its place.
  A* target(T* base, int64_t c, int64_t tile, A* buffer) const {
    T* p = const_cast<T*>(direct(base, c, tile));
    return p ? reinterpret_cast<A*>(p) : buffer;
  }
  void store(T* base, int64_t c, int64_t tile, const A* from) const {
    if (direct(base, c, tile)) return;
    for_pieces(c, tile, [&](int64_t at, int64_t memory, int64_t n) { narrow(from + at, base + memory, n); });
  }

  // The tile's keep bits, or null where everything is treated alike.
  const uint32_t* draw(int64_t c, int64_t tile, uint32_t* buffer) const {
    if (chain_.noise == Noise::element) {
      kernels().keep_run(seed_.low, seed_.high, static_cast<uint32_t>(c), tile * kTile / math::kRowsPerCall,
                         chain_.threshold, buffer, words_of(tile_rows(tile)));
      return buffer;
    }
    if (chain_.noise != Noise::channel) return nullptr;
    std::fill_n(buffer, kTile / 32, 0u);
    int64_t drawn = -1;
    uint32_t bits = 0;  // of 32 consecutive n
    for_pieces(c, tile, [&](int64_t at, int64_t memory, int64_t count) {
      for (int64_t end = at + count; at < end;) {  // a piece of memory may hold several n, when the channel is whole
        const int64_t r = tile * kTile + at, n = r / shape_.S;
        const int64_t length = std::min(end - at, (n + 1) * shape_.S - r);
        if (n / 32 != drawn) {
          drawn = n / 32;
          kernels().keep_run(seed_.low, seed_.high, static_cast<uint32_t>(c), drawn * 32 / math::kRowsPerCall,
                             chain_.threshold, &bits, 1);
        }
        if (bits >> (n % 32) & 1) {
          for (int64_t i = at; i < at + length; ++i) buffer[i / 32] |= 1u << (i % 32);
        }
        at += length;
      }
      (void)memory;
    });
    return buffer;
  }

 private:
  int64_t offset(int64_t c, int64_t r) const { return whole_ ? c * rows_ + r : (r / shape_.S * shape_.C + c) * shape_.S + r % shape_.S; }

  const T* direct(const T* base, int64_t c, int64_t tile) const {
    if constexpr (std::is_same_v<T, A>) {
      const int64_t r = tile * kTile;
      if (whole_ || r / shape_.S == (r + tile_rows(tile) - 1) / shape_.S) return base + offset(c, r);
    }
    return nullptr;
  }

  // f(position in the tile, position in memory, length) for every contiguous piece of the tile.
  template <class F>
  void for_pieces(int64_t c, int64_t tile, const F& f) const {
    const int64_t begin = tile * kTile, end = begin + tile_rows(tile);
    for (int64_t r = begin; r < end;) {
      const int64_t n = whole_ ? end - r : std::min(end - r, shape_.S - r % shape_.S);
      f(r - begin, offset(c, r), n);
      r += n;
    }
  }

  Shape shape_;
  Chain chain_;
  math::Seed seed_;
  int64_t rows_;
  bool whole_;  // a channel is one contiguous run
};

// Two passes over every channel: gather(c, tile, partial) makes the partial result of each tile, finish(c, partials,
// count) merges them, emit(c, tile) is the second pass.
template <class Partial, class Gather, class Finish, class Emit>
void two_passes(const Shape& shape, int64_t tiles, int64_t group, bool gathers, const Gather& gather,
                const Finish& finish, const Emit& emit) {
  const int64_t groups = (shape.C + group - 1) / group, threads = at::get_num_threads();
  const bool serial = shape.C * shape.rows() < kSerial;
  if (serial || groups % threads == 0 || groups >= 8 * threads) {
    for_tasks(groups, serial, false, [&](int64_t i) {
      const int64_t first = i * group, last = std::min(first + group, shape.C);
      std::vector<Partial> partials(gathers ? (last - first) * tiles : 0);
      if (gathers) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          for (int64_t c = first; c < last; ++c) partials[(c - first) * tiles + tile] = gather(c, tile);
        }
      }
      for (int64_t c = first; c < last; ++c) finish(c, partials.data() + (gathers ? (c - first) * tiles : 0));
      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        for (int64_t c = first; c < last; ++c) emit(c, tile);
      }
    });
    return;
  }
  std::vector<Partial> partials(gathers ? shape.C * tiles : 0);
  if (gathers) {
    for_tasks(shape.C * tiles, false, false, [&](int64_t i) { partials[i] = gather(i / tiles, i % tiles); });
  }
  for (int64_t c = 0; c < shape.C; ++c) finish(c, partials.data() + (gathers ? c * tiles : 0));
  for_tasks(shape.C * tiles, false, true, [&](int64_t i) { emit(i / tiles, i % tiles); });
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
  const int64_t tiles = channels.tiles(), mask_words = words_of(call.shape.rows());
  ChannelVectors<A> vectors(call.shape.C);
  const auto gather = [&](int64_t c, int64_t tile) {
    alignas(64) A buffer[kTile];
    math::Moments<double> m{static_cast<double>(channels.tile_rows(tile)), 0, 0};
    kernels_for<A>().moments_run(channels.load(p.x, c, tile, buffer), channels.tile_rows(tile), &m.mean, &m.m2);
    return m;
  };
  const auto finish = [&](int64_t c, const math::Moments<double>* partials) {
    math::Moments<double> m{0, 0, 0};
    for (int64_t tile = 0; call.training && tile < tiles; ++tile) m = math::merge(m, partials[tile]);
    finish_statistics(call, p, c, m.mean, m.m2, vectors);
  };
  const auto emit = [&](int64_t c, int64_t tile) {
    alignas(64) A in[kTile], out[kTile];
    uint32_t bits[kTile / 32];
    Apply<A> q{};
    q.rows = 1;
    q.cols = channels.tile_rows(tile);
    q.x = channels.load(p.x, c, tile, in);
    q.y = channels.target(p.y, c, tile, out);
    q.affine = vectors.at(c);
    std::copy_n(call.chain.parameters.begin(), 2, q.activation);
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = channels.draw(c, tile, bits);
    q.save = p.mask ? p.mask + c * mask_words + tile * kTile / 32 : nullptr;
    kernels_for<A>().apply[kRun][call.chain.activation](q);
    channels.store(p.y, c, tile, q.y);
  };
  two_passes<math::Moments<double>>(call.shape, tiles, channels.group(), call.training, gather, finish, emit);
}

template <class T>
void backward_channels_first(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Channels<T> channels(call);
  const int64_t tiles = channels.tiles(), mask_words = words_of(call.shape.rows());
  ChannelVectors<A> vectors(call.shape.C);
  for (int64_t c = 0; c < call.shape.C; ++c) load_statistics(p, c, vectors);
  Coefficients<A> coefficients(call.shape.C);
  const auto arguments = [&](int64_t c, int64_t tile, A* x, A* g, uint32_t* bits) {
    Backward<A> q{};
    q.rows = 1;
    q.cols = channels.tile_rows(tile);
    q.x = channels.load(p.x, c, tile, x);
    q.g = channels.load(p.g, c, tile, g);
    q.affine = vectors.at(c);
    std::copy_n(call.chain.parameters.begin(), 2, q.activation);
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = p.mask ? p.mask + c * mask_words + tile * kTile / 32 : channels.draw(c, tile, bits);
    q.keep_is_saved = p.mask != nullptr;
    return q;
  };
  const auto gather = [&](int64_t c, int64_t tile) {
    alignas(64) A x[kTile], g[kTile];
    uint32_t bits[kTile / 32];
    GradientSums sums{0, 0};
    Backward<A> q = arguments(c, tile, x, g, bits);
    q.sum_dz = &sums.dz;
    q.sum_dz_xmu = &sums.dz_xmu;
    kernels_for<A>().gradient_sums[kRun][call.chain.activation](q);
    return sums;
  };
  const bool gathers = p.grad_weight != nullptr;
  const auto finish = [&](int64_t c, const GradientSums* partials) {
    GradientSums sums{0, 0};
    for (int64_t tile = 0; gathers && tile < tiles; ++tile) {
      sums.dz += partials[tile].dz;
      sums.dz_xmu += partials[tile].dz_xmu;
    }
    const math::InputGradient k = finish_gradient(call, p, c, sums.dz, sums.dz_xmu, vectors.scale[c]);
    coefficients.a[c] = static_cast<A>(k.a);
    coefficients.b[c] = static_cast<A>(k.b);
    coefficients.c[c] = static_cast<A>(k.c);
  };
  const auto emit = [&](int64_t c, int64_t tile) {
    if (!p.dx) return;
    alignas(64) A x[kTile], g[kTile], out[kTile];
    uint32_t bits[kTile / 32];
    Backward<A> q = arguments(c, tile, x, g, bits);
    q.dx = channels.target(p.dx, c, tile, out);
    q.a = &coefficients.a[c];
    q.b = &coefficients.b[c];
    q.c = &coefficients.c[c];
    kernels_for<A>().input_gradient[kRun][call.chain.activation](q);
    channels.store(p.dx, c, tile, q.dx);
  };
  two_passes<GradientSums>(call.shape, tiles, channels.group(), gathers, gather, finish, emit);
}

// The forward of ones: identity statistics, no activation.
template <class T>
void noise(const Call& call, T* m) {
  using A = opmath_t<T>;
  const Channels<T> channels(call);
  const int64_t tiles = channels.tiles();
  const A zero = 0, one = 1;
  std::vector<A> ones(kTile, one);
  for_tasks(call.shape.C * tiles, call.shape.C * call.shape.rows() < kSerial, false, [&](int64_t i) {
    const int64_t c = i / tiles, tile = i % tiles;
    alignas(64) A out[kTile];
    uint32_t bits[kTile / 32];
    Apply<A> q{};
    q.rows = 1;
    q.cols = channels.tile_rows(tile);
    q.x = ones.data();
    q.y = channels.target(m, c, tile, out);
    q.affine = {&zero, &one, &zero};
    q.multiplier = static_cast<A>(call.chain.multiplier);
    q.keep = channels.draw(c, tile, bits);
    kernels_for<A>().apply[kRun][0](q);
    channels.store(m, c, tile, q.y);
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

// Channels-first: the values of a channel are N pieces of S contiguous ones. Tiles are cut so that they stand in one
// piece of memory; only where pieces are short and noise is drawn (columns.cpp has them without it) does a tile span
// several (in rows r = n*S + s) and go through a buffer. Noise is drawn for consecutive rows, so it costs the same
// either way.
//
// One thread takes a channel (or a few adjacent ones, when S is small, to read longer stretches) through both passes,
// the second one backwards: what the first pass read last is still in cache. With fewer channels than keep all threads
// busy, the tiles are shared instead, pass by pass.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "drivers.h"
#include "stages.h"
#include "tile_noise.h"

namespace fusednorm::cpu {
namespace {

constexpr int64_t kStretch = 26000;     // bytes: adjacent channels are taken together until they are this long
constexpr int64_t kAhead = 1024;        // bytes to prefetch ahead where pieces are short
constexpr int64_t kResident = 1 << 20;  // bytes: or until the group holds this much

struct Step {
  int64_t c, piece, part;  // of the piece
};

template <class T>
class Channels {
 public:
  Channels(const Call& call, int64_t largest)  // tile
      : shape_(call.shape), noise_(call.chain, call.seed, call.shape.S, call.first_row), gaps_(call.gaps) {
    const PieceLayout pieces = piece_layout(shape_);
    length_ = pieces.length;
    tile_ = even_share(length_, largest, 32);
    tiles_per_piece_ = (length_ + tile_ - 1) / tile_;
    tiles_ = pieces.count * tiles_per_piece_;
    in_place_ = length_ == shape_.S || whole();
    outgrows_ = in_place_ && outgrows_caches(call, sizeof(T));
    for (int64_t i = 0; gaps_ && i < tiles_; ++i) {
      const Step at{0, i / tiles_per_piece_, i % tiles_per_piece_};
      const int64_t first = first_row(at), last = gaps_->last(first, first + all_rows(at));
      counted_.push_back({last - first, gaps_->count(first, last)});
    }
  }

  // The i-th of all tiles: piece by piece, of all channels.
  Step in_memory_order(int64_t i) const {
    const int64_t piece = i / (shape_.C * tiles_per_piece_), within = i % tiles_per_piece_;
    return {i / tiles_per_piece_ % shape_.C, piece, within};
  }
  int64_t pieces() const { return tiles_ / tiles_per_piece_; }
  int64_t tiles_per_piece() const { return tiles_per_piece_; }
  int64_t tiles() const { return tiles_; }
  bool outgrows() const { return outgrows_; }                                             // the caches, in one piece
  int64_t ld() const { return in_place_ ? length_ : 0; }                                  // of pieces
  int64_t tile(Step at) const { return at.piece * tiles_per_piece_ + at.part; }           // of its channel
  int64_t rows(Step at) const { return gaps_ ? counted_[tile(at)].rows : all_rows(at); }  // up to the last that counts
  int64_t counting(Step at) const { return gaps_ ? counted_[tile(at)].counting : all_rows(at); }
  // Channels that a thread takes together; down to half as many, so that all threads have as many groups.
  int64_t group() const {
    const int64_t piece = shape_.S * static_cast<int64_t>(sizeof(T)), threads = at::get_num_threads();
    const int64_t most =
        whole() ? 1 : std::clamp<int64_t>(std::min(kStretch / piece, kResident / (piece * shape_.N)), 1, 64);
    for (int64_t group = most; 2 * group >= most; --group) {
      if ((shape_.C + group - 1) / group % threads == 0) return even_share(shape_.C, group, 1);
    }
    return most;
  }
  // The tile in one piece: where it stands, or in buffer.
  const T* load(const T* base, Step at, T* buffer) const {
    if (in_place_) return base + place(at);
    for_pieces(at, rows(at), [&](int64_t to, int64_t memory, int64_t n) {
      // Short pieces far apart defeat the processor's prefetching; those of the next channels lie just behind.
      for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(base + memory + kAhead / sizeof(T) + i);
      std::copy_n(base + memory, n, buffer + to);
    });
    return buffer;
  }
  // The same, with zeros where rows do not count.
  const T* load_counting(const T* base, Step at, T* buffer) const {
    const T* loaded = load(base, at, buffer);
    if (counting(at) == rows(at)) return loaded;
    if (loaded != buffer) std::copy_n(loaded, rows(at), buffer);
    blank(buffer, at, rows(at), false);
    return buffer;
  }
  // Those of the tile's values that count: where they stand, or in buffer.
  template <class E>
  const E* pack(const E* values, Step at, E* buffer) const {
    const int64_t n = rows(at);
    if (counting(at) == n) return values;
    E* to = buffer;
    const int64_t first = first_row(at);
    gaps_->for_stretches(first, first + n, true,
                         [&](int64_t row, int64_t rows) { to = std::copy_n(values + row - first, rows, to); });
    return buffer;
  }
  // From a tile to what is fetched meanwhile; 0: nothing.
  int64_t distance(Step at, Step soon) const {
    return outgrows_ && soon.c < shape_.C && soon.piece < pieces() ? place(soon) - place(at) : 0;
  }
  // Where to write the tile; store() then brings it to its place, with zeros where rows do not count.
  T* target(T* base, Step at, T* buffer) const { return in_place_ ? base + place(at) : buffer; }
  void store(T* base, Step at, T* from) const {
    if (counting(at) < all_rows(at)) blank(from, at, all_rows(at), outgrows_);
    if (in_place_) return;
    for_pieces(at, all_rows(at),
               [&](int64_t at, int64_t memory, int64_t n) { std::copy_n(from + at, n, base + memory); });
  }

  // Where the tile stands in these, of which some may be null.
  Ahead ahead(Step at, std::initializer_list<const T*> streams) const {
    Ahead ahead(1, rows(at));
    for (const T* base : streams) {
      if (base && in_place_) ahead.add(base + place(at), 0);
    }
    return ahead;
  }
  Draws draw(Step at, DrawBuffer& buffer, const Ahead& ahead) const {
    return noise_.run(at.c, first_row(at), rows(at), buffer, ahead);
  }

  // The tile's words of a saved mask.
  int64_t mask_offset(Step at) const { return (at.c * pieces() + at.piece) * words_of(length_) + at.part * tile_ / 32; }

 private:
  int64_t all_rows(Step at) const { return std::min(tile_, length_ - at.part * tile_); }
  void blank(T* tile, Step at, int64_t n, bool past) const {  // past the caches, where that is worth a kernel
    const int64_t first = first_row(at);
    gaps_->for_stretches(first, first + n, false, [&](int64_t row, int64_t rows) {
      T* const to = tile + row - first;
      const auto line = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(to) & 63) / sizeof(T));  // ends there
      if (past && rows >= 64 + line) {
        std::fill_n(to, line, T());
        multiply<T>({nullptr, 0}, {to + line, 0, 0, true}, 0, 1, rows - line, {});
      } else {
        std::fill_n(to, rows, T());
      }
    });
  }
  bool whole() const { return shape_.N == 1 || shape_.C == 1; }
  int64_t first_row(Step at) const { return at.piece * length_ + at.part * tile_; }
  int64_t place(Step at) const {  // in one piece of memory
    return ((whole() ? 0 : at.piece * shape_.C) + at.c) * length_ + at.part * tile_;
  }
  // f(position in the tile, position in memory, length) for every contiguous piece of the tile's first rows.
  template <class F>
  void for_pieces(Step tile, int64_t rows, const F& f) const {
    const int64_t begin = first_row(tile), end = begin + rows;
    for (int64_t r = begin; r < end;) {
      const int64_t s = r % shape_.S, n = std::min(end - r, shape_.S - s);
      f(r - begin, (r / shape_.S * shape_.C + tile.c) * shape_.S + s, n);
      r += n;
    }
  }

  Shape shape_;
  TileNoise noise_;
  const Gaps* gaps_;
  struct Counted {
    int64_t rows, counting;
  };
  std::vector<Counted> counted_;  // of a channel's tiles, where rows do not count
  int64_t length_;                // of a piece; a piece that is not contiguous in memory spans the channel
  int64_t tile_, tiles_per_piece_, tiles_;
  bool in_place_, outgrows_;
};

// Two passes over every channel: gather(step, soon) makes the partial result of a tile, finish(c, partials) merges
// them, emit(step, soon) is the second pass. It goes back from piece to piece, but forward within one, where the
// processor prefetches. `soon` is read next, or a little later: a second pass reads caches and leaves memory to the
// next channels.
template <class Partial, class T, class Gather, class Finish, class Emit>
void two_passes(const Shape& shape, const Channels<T>& channels, bool gathers, const Gather& gather,
                const Finish& finish, const Emit& emit) {
  const int64_t group = channels.group(), groups = (shape.C + group - 1) / group, threads = at::get_num_threads(),
                tiles = channels.tiles(), parts = channels.tiles_per_piece(), pieces = channels.pieces();
  const bool serial = shape.C * shape.rows() < kSerial;
  const auto behind = [&](Step at) {
    return at.part + 1 < parts ? Step{at.c, at.piece, at.part + 1} : Step{at.c, at.piece + 1, 0};
  };
  if (serial || groups % threads == 0 || groups >= 8 * threads) {
    for_tasks(groups, serial, false, [&](int64_t i) {
      const int64_t first = i * group, last = std::min(first + group, shape.C);
      std::vector<Partial> partials(gathers ? (last - first) * tiles : 0);
      const auto for_steps = [&](int64_t piece, const auto& f) {
        for (int64_t c = first; c < last; ++c) {
          for (int64_t part = 0; part < parts; ++part) f(Step{c, piece, part});
        }
      };
      for (int64_t piece = 0; gathers && piece < pieces; ++piece) {
        for_steps(piece,
                  [&](Step at) { partials[(at.c - first) * tiles + channels.tile(at)] = gather(at, behind(at)); });
      }
      for (int64_t c = first; c < last; ++c) finish(c, partials.data() + (gathers ? (c - first) * tiles : 0));
      for (int64_t piece = pieces - 1; piece >= 0; --piece) {
        for_steps(piece, [&](Step at) { emit(at, Step{at.c + group, pieces - 1 - piece, at.part}); });
      }
    });
    return;
  }
  const int64_t steps = shape.C * tiles;
  const auto step = [&](int64_t k) { return Step{k / tiles, k % tiles / parts, k % parts}; };
  std::vector<Partial> partials(gathers ? steps : 0);
  if (gathers) for_tasks(steps, false, false, [&](int64_t k) { partials[k] = gather(step(k), behind(step(k))); });
  for (int64_t c = 0; c < shape.C; ++c) finish(c, partials.data() + (gathers ? c * tiles : 0));
  for_tasks(steps, false, false, [&](int64_t k) { emit(step(k), behind(step(k))); });
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
void forward_runs(const Call& call, const ForwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Plan plan(call.chain, false, p.mask != nullptr, call.training && p.y && std::is_same_v<T, A>),
      second = plan.second();
  const Channels<T> channels(call, plan.tile_elements(kTile));
  const bool past = channels.outgrows() && !plan.once;
  const int64_t tiles = channels.tiles();
  ChannelVectors<A> vectors(call.shape.C);
  const bool before = call.chain.before[0] != Stage::none, noisy = call.chain.before_has(Stage::drop);
  const bool keeps_noise = p.mask && plan.saves_at < 0;  // drawn in the first pass, read in the second
  const auto tile_of = [&](Step at, const Draws& draws) {
    return Tile<T>{kRun,    1, channels.rows(at), vectors.at(at.c), p.act_weight ? p.act_weight + at.c : nullptr, draws,
                   nullptr, 0};
  };
  const auto draw = [&](Step at, DrawBuffer& buffer, std::initializer_list<const T*> streams) {
    const Draws draws = channels.draw(at, buffer, plan.staged ? channels.ahead(at, streams) : Ahead());
    if (keeps_noise) {
      std::copy_n(draws.keep, words_of(channels.rows(at)), p.mask + channels.mask_offset(at));
    }
    return draws;
  };
  const auto gather = [&](Step at, Step soon) {
    alignas(64) T buffer[kTile], out[kTile];
    const T* x = channels.load(p.x, at, buffer);
    const int64_t rows = channels.rows(at), n = channels.counting(at);
    const double count = static_cast<double>(n);
    Statistics s{{count, 0, 0}, {count, 0, 0}};
    if (n == 0) return s;
    if (!before) {
      kernels_for<T>().moments_run(channels.pack(x, at, out), n, channels.distance(at, soon), &s.u.mean, &s.u.m2);
      return s;
    }
    alignas(64) A packed[kStageElements];
    DrawBuffer drawn;
    Workspace<A> workspace;
    const Tile<T> tile = tile_of(at, noisy ? draw(at, drawn, {p.x, plan.once ? p.y : nullptr}) : Draws{});
    Stages<T> stages(plan, tile, workspace);
    const View<const A> u = stages.ahead({x, 0});
    kernels_for<A>().moments_run(channels.pack(u.p, at, packed), n, 0, &s.u.mean, &s.u.m2);
    if constexpr (std::is_same_v<T, A>) {
      if (plan.once) {
        T* y = channels.target(p.y, at, out);
        std::copy_n(u.p, rows, y);
        channels.store(p.y, at, y);
      }
    }
    if (p.clean_mean) {
      const A* clean = channels.pack(stages.ahead({x, 0}, false).p, at, packed);
      kernels_for<A>().moments_run(clean, n, 0, &s.clean.mean, &s.clean.m2);
    }
    return s;
  };
  const auto finish = [&](int64_t c, const Statistics* partials) {
    Statistics s{};
    for (int64_t tile = 0; call.training && tile < tiles; ++tile) {
      s.u = math::merge(s.u, partials[tile].u);
      if (p.clean_mean) s.clean = math::merge(s.clean, partials[tile].clean);
    }
    finish_statistics(call, p, c, s, vectors);
  };
  const auto emit = [&](Step at, Step soon) {
    if (!p.y) return;
    alignas(64) T in[kTile], more[kTile], out[kTile];
    DrawBuffer drawn;
    Workspace<A> workspace;
    T* y = channels.target(p.y, at, out);
    if (channels.rows(at) == 0) return channels.store(p.y, at, y);
    uint32_t* mask = p.mask ? p.mask + channels.mask_offset(at) : nullptr;
    Draws draws{mask, 0, nullptr, 0};
    if (!(keeps_noise && call.training)) {
      draws = second.drops() ? draw(at, drawn, {p.x, p.residual, past ? nullptr : p.y}) : Draws{};
    }
    const Tile<T> tile = tile_of(at, draws);
    const T* residual = p.residual ? channels.load(p.residual, at, more) : nullptr;
    const int64_t ahead = channels.distance(at, soon);
    Stages<T>(second, tile, workspace)
        .forward({channels.load(plan.once ? p.y : p.x, at, in), 0, ahead}, {residual, 0, ahead},
                 {y, channels.ld(), 0, past}, mask, 0);
    channels.store(p.y, at, y);
  };
  two_passes<Statistics>(call.shape, channels, call.training, gather, finish, emit);
}

template <class T>
void backward_runs(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const bool gathers = cpu::gathers(p);
  const Plan plan(call.chain, true, p.mask != nullptr, gathers && p.dx && std::is_same_v<T, A>), second = plan.second();
  const Channels<T> channels(call, plan.tile_elements(kTile));
  const bool past = channels.outgrows() && !plan.once;
  const int64_t tiles = channels.tiles();
  ChannelVectors<A> vectors(call.shape.C);
  for (int64_t c = 0; c < call.shape.C; ++c) load_statistics(p, c, vectors);
  Coefficients<A> coefficients(call.shape.C);
  std::vector<double> weight_sums(p.grad_act_weight ? call.shape.C * tiles : 0);
  struct Inputs {
    View<const T> x, residual, g;
  };
  struct Buffers {
    alignas(64) T x[kTile], residual[kTile], g[kTile], dx[kTile], grad_residual[kTile];
    DrawBuffer drawn;
    Workspace<A> workspace;
  };
  const auto inputs = [&](Step at, const T* g, int64_t ahead, Buffers& b) {
    return Inputs{{channels.load_counting(p.x, at, b.x), 0, ahead},
                  {p.residual ? channels.load_counting(p.residual, at, b.residual) : nullptr, 0, ahead},
                  {channels.load_counting(g, at, b.g), 0, ahead}};
  };
  const auto tile_of = [&](Step at, const Plan& pass, std::initializer_list<const T*> streams, Buffers& b) {
    const uint32_t* mask = p.mask ? p.mask + channels.mask_offset(at) : nullptr;
    Draws draws{plan.mask_is_noise() ? mask : nullptr, 0, nullptr, 0};
    if (pass.drops() && !plan.mask_is_noise()) {
      draws = channels.draw(at, b.drawn, plan.staged ? channels.ahead(at, streams) : Ahead());
    }
    return Tile<T>{kRun, 1, channels.rows(at), vectors.at(at.c), p.act_weight ? p.act_weight + at.c : nullptr, draws,
                   mask, 0};
  };
  const auto outputs = [&](Step at, const Plan& pass, Buffers& b) {
    const auto target = [&](T* base, T* buffer) {
      return View<T>{base ? channels.target(base, at, buffer) : nullptr, channels.ld(), 0, past};
    };
    Gradients<T> to{};
    to.dx = target(p.dx, b.dx);
    if (&pass == &plan || !plan.once) to.residual = target(p.grad_residual, b.grad_residual);
    if (p.grad_act_weight) to.act_weight = &weight_sums[at.c * tiles + channels.tile(at)];
    to.a = &coefficients.a[at.c];
    to.b = call.training ? &coefficients.b[at.c] : nullptr;
    to.c = &coefficients.c[at.c];
    return to;
  };
  const auto store = [&](Step at, const Gradients<T>& to) {
    if (to.dx.p) channels.store(p.dx, at, to.dx.p);
    if (to.residual.p) channels.store(p.grad_residual, at, to.residual.p);
  };
  const auto gather = [&](Step at, Step soon) {
    Buffers b;
    const Gradients<T> to = plan.once ? outputs(at, plan, b) : Gradients<T>{};
    GradientSums sums{0, 0};
    if (channels.rows(at) == 0) return store(at, to), sums;
    const Inputs in = inputs(at, p.g, channels.distance(at, soon), b);
    const Tile<T> tile = tile_of(at, plan, {p.x, p.g, p.residual}, b);
    Stages<T>(plan, tile, b.workspace).gradient_sums(in.x, in.residual, in.g, &sums.dz, &sums.dz_xmu, to);
    store(at, to);
    return sums;
  };
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
  const auto emit = [&](Step at, Step soon) {
    if (!emits(p)) return;
    Buffers b;
    const Gradients<T> to = outputs(at, second, b);
    if (channels.rows(at) == 0) return store(at, to);
    const Inputs in = inputs(at, plan.once ? p.dx : p.g, channels.distance(at, soon), b);
    const Tile<T> tile = tile_of(at, second, {p.x, plan.once ? nullptr : p.g, p.residual, past ? nullptr : p.dx}, b);
    Stages<T>(second, tile, b.workspace).gradient(in.x, in.residual, in.g, to);
    store(at, to);
  };
  two_passes<GradientSums>(call.shape, channels, gathers, gather, finish, emit);
  for (int64_t c = 0; p.grad_act_weight && c < call.shape.C; ++c) {
    p.grad_act_weight[c] = std::accumulate(&weight_sums[c * tiles], &weight_sums[c * tiles] + tiles, 0.0);
  }
}

template <class T>
void noise_runs(const Call& call, const T* x, T* y) {
  const Channels<T> channels(call, kStageElements);
  const bool past = channels.outgrows();
  for_tasks(call.shape.C * channels.tiles(), call.shape.C * call.shape.rows() < kSerial, false, [&](int64_t i) {
    const Step at = channels.in_memory_order(i);
    alignas(64) T in[kTile], out[kTile];
    DrawBuffer drawn;
    const T* from = x ? channels.load(x, at, in) : nullptr;
    T* to = channels.target(y, at, out);
    multiply<T>({from, 0}, {to, channels.ld(), 0, past}, call.chain.multiplier, 1, channels.rows(at),
                channels.draw(at, drawn, channels.ahead(at, {x, past ? nullptr : y})));
    channels.store(y, at, to);
  });
}

#define FN_INSTANTIATE(T)                                                  \
  template void forward_runs<T>(const Call&, const ForwardPointers<T>&);   \
  template void backward_runs<T>(const Call&, const BackwardPointers<T>&); \
  template void noise_runs<T>(const Call&, const T*, T*);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(BFloat16)
FN_INSTANTIATE(Float16)

}  // namespace fusednorm::cpu

// Tensors as a matrix whose columns belong to channels: channels-last, N*S rows with a column per channel (a 2-D input
// is one), and channels-first with short rows, N rows with S adjacent columns per channel. There each per-channel
// vector is repeated S times, and sums are folded over S at the end: nothing is gathered from short pieces. Where
// channels-last has few channels, several rows are one, and the vectors repeated as a whole.
//
// The matrix is cut into panels, chunks of rows times blocks of columns, and a panel into tiles of a few rows. The
// first pass leaves each panel's partial sums, which are merged chunk by chunk; the second one visits the panels
// backwards, so that those read last are still in cache. Noise comes in groups of 8 rows, hence tiles of whole groups.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "drivers.h"
#include "stages.h"
#include "tile_noise.h"

namespace fusednorm::cpu {
namespace {

// Elements of a panel, roughly: large ones leave few partial sums, and there are to be some for all threads.
constexpr int64_t kPanelElements = 1 << 18, kShortPanelElements = 1 << 15, kLeastPanelElements = 1 << 13;
constexpr int64_t kPanels = 8;

struct Panel {
  int64_t block, chunk;
};

class Matrix {
 public:
  struct Tile {
    int64_t row, rows;
  };

  Matrix(const Call& call, bool staged, int64_t element_bytes)
      : noise_(call.chain, call.seed, call.shape.S, call.first_row),
        gaps_(call.gaps),
        channels_(call.shape.C),
        repeat_(call.shape.channels_last ? 1 : call.shape.S),
        cycle_(few_channels(call) ? std::min(kShortRow / channels_, call.shape.rows()) : 1),
        rows_(call.shape.rows() / repeat_ / cycle_),
        rest_(call.shape.rows() % cycle_),
        outgrows_(outgrows_caches(call, element_bytes)) {
    const int64_t elements = !staged ? kFusedElements : repeat_ > 1 ? kStageElements : kStageMatrix;
    if (repeat_ > 1) {
      block_ = channels_of_block(call.shape);
      tile_rows_ = std::clamp<int64_t>(elements / padded(block_ * repeat_), 1, kMaxTileRows);
    } else if (cycle_ > 1) {
      block_ = channels_;
      tile_rows_ = std::clamp<int64_t>(elements / (channels_ * cycle_), 1, kMaxTileRows);
    } else {
      const int64_t largest = staged ? kStageColumns : kBlockColumns;
      block_ = even_share(channels_, largest, 32);
      tile_rows_ = std::clamp<int64_t>(elements / block_ / 8 * 8, 8, kMaxTileRows);
    }
    blocks_ = (channels_ + block_ - 1) / block_;
    const int64_t panel =
        std::clamp(ld() * rows_ / kPanels, kLeastPanelElements, repeats() ? kShortPanelElements : kPanelElements);
    const int64_t most = std::max<int64_t>(panel / (block_ * repeat_ * cycle_) / kMaxTileRows, 1) * kMaxTileRows;
    chunk_ = even_share(rows_, most, kMaxTileRows);
    chunks_ = (rows_ + chunk_ - 1) / chunk_ + (rest_ > 0);
    const int64_t threads = at::get_num_threads();
    shares_blocks_ = serial() || blocks_ % threads == 0 || blocks_ >= 4 * threads;
    by_block_ = repeat_ > 1 && shares_blocks_ && !outgrows_caches(rows_ * block_ * repeat_ * element_bytes, true);
  }

  int64_t blocks() const { return blocks_; }
  int64_t chunks() const { return chunks_; }
  int64_t repeat() const { return repeat_; }
  int64_t cycle() const { return cycle_; }
  bool repeats() const { return repeat_ * cycle_ > 1; }
  // What is left of the last row of several is a chunk of its own.
  bool is_rest(int64_t chunk) const { return rest_ > 0 && chunk == chunks_ - 1; }
  int64_t chunk_rows(int64_t chunk) const { return is_rest(chunk) ? 1 : std::min(chunk_, rows_ - chunk * chunk_); }
  int64_t chunk_values(int64_t chunk) const {  // of a channel, those that count
    if (gaps_) return gaps_->count(chunk * chunk_, chunk * chunk_ + chunk_rows(chunk));
    return chunk_rows(chunk) * repeat_ * (is_rest(chunk) ? rest_ : cycle_);
  }
  int64_t first_channel(int64_t block) const { return block * block_; }
  int64_t channels(int64_t block) const { return std::min(block_, channels_ - block * block_); }
  int64_t columns(Panel at) const { return channels(at.block) * repeat_ * (is_rest(at.chunk) ? rest_ : cycle_); }

  // Of rows that count.
  template <class F>
  void for_tiles(int64_t chunk, const F& f) const {
    for (int64_t row = is_rest(chunk) ? rows_ : chunk * chunk_, end = row + chunk_rows(chunk); row < end;
         row += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, end - row);
      if (!gaps_) {
        f(Tile{row, rows});
      } else {
        gaps_->for_stretches(row, row + rows, true, [&](int64_t first, int64_t n) { f(Tile{first, n}); });
      }
    }
  }
  // Zeros in a panel where rows do not count; y: or null.
  template <class T>
  void blank(T* y, Panel at) const {
    if (!gaps_ || !y) return;
    const int64_t row = at.chunk * chunk_;
    gaps_->for_stretches(row, row + chunk_rows(at.chunk), false, [&](int64_t first, int64_t n) {
      for (int64_t r = first; r < first + n; ++r) std::fill_n(y + offset(at.block, {r, 1}), columns(at), T());
    });
  }

  int64_t ld() const { return channels_ * repeat_ * cycle_; }
  bool outgrows() const { return outgrows_; }
  // From a tile to what is fetched meanwhile; 0: nothing. Where a thread takes a block through both passes, the second
  // one finds it in the caches, and leaves memory to the next block.
  int64_t ahead(int64_t block, const Tile& t, bool second) const {
    if (!outgrows_) return 0;
    if (second && by_block_) return block + 1 < blocks_ ? block_ * repeat_ : 0;
    return t.row + tile_rows_ < rows_ ? tile_rows_ * ld() : 0;
  }
  int64_t offset(int64_t block, const Tile& t) const { return t.row * ld() + block * block_ * repeat_; }

  // Where partial results of a panel stand: vectors that kernels may read and write 8 at a time.
  int64_t stride() const { return (block_ + 7) / 8 * 8; }
  int64_t partial(Panel at) const { return (at.chunk * blocks_ + at.block) * stride(); }
  int64_t partials() const { return chunks_ * blocks_ * stride(); }

  // Where the tile stands in these, of which some may be null.
  template <class T>
  Ahead ahead(Panel at, const Tile& t, std::initializer_list<const T*> streams) const {
    Ahead ahead(t.rows, columns(at));
    for (const T* base : streams) {
      if (base) ahead.add(base + offset(at.block, t), ld());
    }
    return ahead;
  }
  Draws draw(Panel at, const Tile& t, DrawBuffer& buffer, const Ahead& ahead) const {
    return noise_.columns(t.row, first_channel(at.block), t.rows, columns(at), buffer, ahead);
  }

  // The tile's place in a saved mask, in which every block begins with a word of its own.
  int64_t mask_ld() const {
    return (blocks_ - 1) * words_of(block_ * repeat_) + words_of(channels(blocks_ - 1) * repeat_);
  }
  int64_t mask_offset(int64_t block, const Tile& t) const {
    return t.row * mask_ld() + block * words_of(block_ * repeat_);
  }

  // gather(panel), finish(block) and emit(panel) for all of them. Where there are blocks enough for all threads, a
  // thread takes a block through one pass; through both with short rows, if the block stays in the caches.
  template <class Gather, class Finish, class Emit>
  void two_passes(bool gathers, const Gather& gather, const Finish& finish, const Emit& emit) const {
    if (gathers ? by_block_ : shares_blocks_) {
      for_tasks(blocks_, serial(), false, [&](int64_t block) {
        for (int64_t chunk = 0; gathers && chunk < chunks_; ++chunk) gather(Panel{block, chunk});
        finish(block);
        for (int64_t chunk = chunks_ - 1; chunk >= 0; --chunk) emit(Panel{block, chunk});
      });
      return;
    }
    if (gathers) for_panels(false, gather);
    for_tasks(blocks_, channels_ * chunks_ < kSerial, false, finish);
    for_panels(true, emit);
  }
  template <class F>
  void for_panels(bool descending, const F& f) const {  // as they stand in memory
    for_tasks(blocks_ * chunks_, serial(), descending, [&](int64_t i) { f(Panel{i % blocks_, i / blocks_}); });
  }

 private:
  // Too few to fill vectors. Nothing is drawn, and so (worth_saving) no mask saved.
  static bool few_channels(const Call& call) {
    const Shape& s = call.shape;
    return s.channels_last && s.C % 32 != 0 && s.C <= kShortRow / 4 && !call.chain.draws() && !call.gaps;
  }
  bool serial() const { return ld() * rows_ < kSerial; }

  TileNoise noise_;
  const Gaps* gaps_;
  int64_t channels_, repeat_, cycle_, rows_, rest_, blocks_, block_, tile_rows_, chunk_, chunks_;
  bool outgrows_, shares_blocks_, by_block_;
};

// Per-channel vectors as the columns of a block have them: where they stand, or repeated.
template <class A>
class Columns {
 public:
  Columns(const Matrix& matrix, int64_t block) : matrix_(matrix), block_(block) {}
  const A* operator()(const std::vector<A>& vector) {
    if (vector.empty()) return nullptr;
    const A* from = vector.data() + matrix_.first_channel(block_);
    if (!matrix_.repeats()) return from;
    A* const to = repeated_[used_++];
    A* end = to;
    if (matrix_.cycle() > 1) {
      for (int64_t i = 0; i < matrix_.cycle(); ++i) end = std::copy_n(from, matrix_.channels(block_), end);
    } else {
      for (int64_t c = 0; c < matrix_.channels(block_); ++c, end += matrix_.repeat()) {
        // In steps of one length, which are a few instructions; the next channel overwrites what is too much.
        for (int64_t i = 0; i < matrix_.repeat(); i += kStep) std::fill_n(end + i, kStep, from[c]);
      }
    }
    std::fill(end, to + padded(end - to), A(0));
    return to;
  }
  Affine<A> operator()(const ChannelVectors<A>& v) { return {(*this)(v.mean), (*this)(v.scale), (*this)(v.shift)}; }

 private:
  const Matrix& matrix_;
  int64_t block_;
  static constexpr int kStep = 16;
  int used_ = 0;
  alignas(64) A repeated_[7][kShortColumns + 32];
};

// Two values per channel and panel.
struct Partials {
  std::vector<double> first, second;
  Partials(bool wanted, const Matrix& matrix)
      : first(wanted ? matrix.partials() : 0), second(wanted ? matrix.partials() : 0) {}
};

// Sums for each column of a panel, which go to their channels' place when that panel is done.
class Folded {
 public:
  explicit Folded(const Matrix& matrix, Panel at) : matrix_(matrix), at_(at) {}
  // Where kernels add to the columns of the panel.
  double* columns(std::vector<double>& channels) {
    if (!matrix_.repeats()) return channels.data() + matrix_.partial(at_);
    double* const to = columns_[used_];
    std::fill_n(to, padded(matrix_.columns(at_)), 0.0);
    into_[used_++] = channels.data() + matrix_.partial(at_);
    return to;
  }
  void fold_sums() {
    for (int i = 0; i < used_; ++i) {
      if (matrix_.cycle() > 1) {
        for_columns([&](int64_t c, int64_t j) { into_[i][c] += columns_[i][j]; });
        continue;
      }
      kernels().fold_sums(columns_[i], matrix_.repeat(), matrix_.channels(at_.block), into_[i]);
    }
  }
  // Columns come in pairs, of means and sums of squared deviations.
  void fold_moments() {
    const double rows = static_cast<double>(matrix_.chunk_rows(at_.chunk));
    for (int i = 0; i < used_; i += 2) {
      if (matrix_.cycle() > 1) {
        double *const mean = into_[i], *const m2 = into_[i + 1];
        const double share = 1.0 / static_cast<double>(matrix_.columns(at_) / matrix_.channels(0));
        for_columns([&](int64_t c, int64_t j) { mean[c] += share * columns_[i][j]; });
        for_columns([&](int64_t c, int64_t j) {
          const double d = columns_[i][j] - mean[c];
          m2[c] += columns_[i + 1][j] + rows * d * d;
        });
        continue;
      }
      kernels().fold_moments(rows, columns_[i], columns_[i + 1], matrix_.repeat(), matrix_.channels(at_.block),
                             into_[i], into_[i + 1]);
    }
  }

 private:
  // f(channel, column) where all channels lie side by side, several times.
  template <class F>
  void for_columns(const F& f) const {
    const int64_t channels = matrix_.channels(0);
    for (int64_t first = 0; first < matrix_.columns(at_); first += channels) {
      for (int64_t c = 0; c < channels; ++c) f(c, first + c);
    }
  }

  const Matrix& matrix_;
  Panel at_;
  int used_ = 0;
  double* into_[4];
  alignas(64) double columns_[4][kShortColumns + 8];  // read 8 at a time
};

}  // namespace

template <class T>
void forward_columns(const Call& call, const ForwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Plan plan(call.chain, false, p.mask != nullptr, call.training && p.y && std::is_same_v<T, A>),
      second = plan.second();
  const Matrix matrix(call, plan.staged, sizeof(T));
  const int64_t C = call.shape.C, ld = matrix.ld();
  Partials partials(call.training, matrix), clean(p.clean_mean, matrix);
  ChannelVectors<A> vectors(C);
  const std::vector<A> act_weight = padded_copy(p.act_weight, C);
  const bool before = call.chain.before[0] != Stage::none, noisy = call.chain.before_has(Stage::drop);
  const bool keeps_noise = p.mask && plan.saves_at < 0;  // drawn in the first pass, read in the second
  const bool past = matrix.outgrows() && !plan.once;
  const auto draw = [&](Panel panel, const Matrix::Tile& t, DrawBuffer& buffer,
                        std::initializer_list<const T*> streams) {
    const Draws draws = matrix.draw(panel, t, buffer, plan.staged ? matrix.ahead(panel, t, streams) : Ahead());
    for (int64_t row = 0; keeps_noise && row < t.rows; ++row) {
      std::copy_n(draws.keep + row * draws.ldkeep, words_of(matrix.columns(panel)),
                  p.mask + matrix.mask_offset(panel.block, t) + row * matrix.mask_ld());
    }
    return draws;
  };
  const auto gather = [&](Panel panel) {
    const int64_t block = panel.block, columns = matrix.columns(panel);
    Columns<A> repeat(matrix, block);
    Folded sums(matrix, panel);
    DrawBuffer drawn;
    Workspace<A> workspace;
    Tile<T> tile{kColumns, 0, columns, {}, before ? repeat(act_weight) : nullptr, {}};
    struct {
      double *mean, *m2;
    } u{sums.columns(partials.first), sums.columns(partials.second)}, clean_u{};
    if (p.clean_mean) clean_u = {sums.columns(clean.first), sums.columns(clean.second)};
    int64_t count = 0;
    matrix.for_tiles(panel.chunk, [&](const Matrix::Tile& t) {
      const auto merge = [&](auto values, const auto& into) {
        using E = std::remove_const_t<std::remove_pointer_t<decltype(values.p)>>;
        kernels_for<E>().moments_columns(values.p, t.rows, columns, values.ld, values.ahead, count, into.mean, into.m2);
      };
      const int64_t at = matrix.offset(block, t);
      const View<const T> x{p.x + at, ld, matrix.ahead(block, t, false)};
      if (before) {
        tile.rows = t.rows;
        tile.draws = noisy ? draw(panel, t, drawn, {p.x, plan.once ? p.y : nullptr}) : Draws{};
        Stages<T> stages(plan, tile, workspace);
        const View<const A> values = stages.ahead(x);
        merge(values, u);
        if constexpr (std::is_same_v<T, A>) {
          for (int64_t row = 0; plan.once && row < t.rows; ++row) {
            std::copy_n(values.p + row * values.ld, columns, p.y + at + row * ld);
          }
        }
        if (p.clean_mean) merge(stages.ahead(x, false), clean_u);
      } else {
        merge(x, u);
      }
      count += t.rows;
    });
    sums.fold_moments();
  };
  const auto finish = [&](int64_t block) {
    const int64_t first = matrix.first_channel(block), at = matrix.partial({block, 0});
    const auto merge = [&](Partials& all) {  // into the first chunk's
      double count = matrix.chunk_values(0);
      for (int64_t chunk = 1; chunk < matrix.chunks(); ++chunk) {
        const double values = matrix.chunk_values(chunk);
        if (values == 0) continue;
        const int64_t from = matrix.partial({block, chunk});
        kernels().merge_moments(count, &all.first[at], &all.second[at], values, &all.first[from], &all.second[from],
                                matrix.stride());
        count += values;
      }
    };
    if (call.training) merge(partials);
    if (p.clean_mean) merge(clean);
    for (int64_t i = 0; i < matrix.channels(block); ++i) {
      Statistics s{};
      if (call.training) s.u = {0, partials.first[at + i], partials.second[at + i]};
      if (p.clean_mean) s.clean = {0, clean.first[at + i], clean.second[at + i]};
      finish_statistics(call, p, first + i, s, vectors);
    }
  };
  const auto emit = [&](Panel panel) {
    if (!p.y) return;
    const int64_t block = panel.block;
    Columns<A> repeat(matrix, block);
    DrawBuffer drawn;
    Workspace<A> workspace;
    Tile<T> tile{kColumns, 0, matrix.columns(panel), repeat(vectors), repeat(act_weight), {}, nullptr, 0};
    matrix.for_tiles(panel.chunk, [&](const Matrix::Tile& t) {
      const int64_t at = matrix.offset(block, t);
      uint32_t* mask = p.mask ? p.mask + matrix.mask_offset(block, t) : nullptr;
      tile.rows = t.rows;
      tile.draws = {mask, matrix.mask_ld(), nullptr, 0};
      if (!(keeps_noise && call.training)) {
        tile.draws = second.drops() ? draw(panel, t, drawn, {p.x, p.residual, past ? nullptr : p.y}) : Draws{};
      }
      const int64_t ahead = matrix.ahead(block, t, call.training);
      Stages<T>(second, tile, workspace)
          .forward({(plan.once ? p.y : p.x) + at, ld, ahead}, {p.residual ? p.residual + at : nullptr, ld, ahead},
                   {p.y + at, ld, 0, past}, mask, matrix.mask_ld());
    });
    matrix.blank(p.y, panel);
  };
  matrix.two_passes(call.training, gather, finish, emit);
}

template <class T>
void backward_columns(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const bool gathers = cpu::gathers(p);
  const Plan plan(call.chain, true, p.mask != nullptr, gathers && p.dx && std::is_same_v<T, A>), second = plan.second();
  const Matrix matrix(call, plan.staged, sizeof(T));
  const int64_t C = call.shape.C, ld = matrix.ld();
  Partials partials(gathers, matrix);
  ChannelVectors<A> vectors(C);
  for (int64_t c = 0; c < C; ++c) load_statistics(p, c, vectors);
  const std::vector<A> act_weight = padded_copy(p.act_weight, C);
  std::vector<A> a(padded(C)), b(call.training ? padded(C) : 0), c_(padded(C));
  std::vector<double> weight_sums(p.grad_act_weight ? matrix.partials() : 0);
  const bool past = matrix.outgrows() && !plan.once;

  struct Place {  // in memory
    int64_t at, ahead;
  };
  const auto view = [&](auto* base, Place place) {
    return View<std::remove_pointer_t<decltype(base)>>{base ? base + place.at : nullptr, ld, place.ahead, past};
  };
  // f(tile, place, results) for the tiles of a panel in a pass.
  const auto for_tiles = [&](Panel panel, const Plan& pass, std::initializer_list<const T*> streams, Folded& sums,
                             const auto& f) {
    const int64_t block = panel.block;
    Columns<A> repeat(matrix, block);
    DrawBuffer drawn;
    Tile<T> tile{kColumns, 0,       matrix.columns(panel), repeat(vectors), repeat(act_weight),
                 {},       nullptr, matrix.mask_ld()};
    Gradients<T> to{};
    if (p.grad_act_weight) to.act_weight = sums.columns(weight_sums);
    to.a = repeat(a);
    to.b = repeat(b);
    to.c = repeat(c_);
    matrix.for_tiles(panel.chunk, [&](const Matrix::Tile& t) {
      const Place place{matrix.offset(block, t), matrix.ahead(block, t, gathers && &pass == &second)};
      const uint32_t* mask = p.mask ? p.mask + matrix.mask_offset(block, t) : nullptr;
      tile.rows = t.rows;
      tile.mask = mask;
      tile.draws = {plan.mask_is_noise() ? mask : nullptr, matrix.mask_ld(), nullptr, 0};
      if (pass.drops() && !plan.mask_is_noise()) {
        tile.draws = matrix.draw(panel, t, drawn, plan.staged ? matrix.ahead(panel, t, streams) : Ahead());
      }
      to.dx = view(p.dx, place);
      to.residual = view(&pass == &plan || !plan.once ? p.grad_residual : nullptr, place);
      f(tile, place, to);
    });
    sums.fold_sums();
  };
  const auto gather = [&](Panel panel) {
    Workspace<A> workspace;
    Folded sums(matrix, panel);
    double *const dz = sums.columns(partials.first), *const dz_xmu = sums.columns(partials.second);
    for_tiles(panel, plan, {p.x, p.g, p.residual}, sums, [&](const Tile<T>& tile, Place at, const Gradients<T>& to) {
      Stages<T>(plan, tile, workspace)
          .gradient_sums(view(p.x, at), view(p.residual, at), view(p.g, at), dz, dz_xmu,
                         plan.once ? to : Gradients<T>{});
    });
  };
  const auto finish = [&](int64_t block) {
    const int64_t first = matrix.first_channel(block);
    for (int64_t i = 0; i < matrix.channels(block); ++i) {
      double dz = 0, dz_xmu = 0;
      for (int64_t chunk = 0; gathers && chunk < matrix.chunks(); ++chunk) {
        dz += partials.first[matrix.partial({block, chunk}) + i];
        dz_xmu += partials.second[matrix.partial({block, chunk}) + i];
      }
      const int64_t c = first + i;
      const math::InputGradient<double> k = finish_gradient(call, p, c, dz, dz_xmu, vectors.scale[c]);
      a[c] = static_cast<A>(k.a);
      if (call.training) b[c] = static_cast<A>(k.b);
      c_[c] = static_cast<A>(k.c);
    }
  };
  const auto emit = [&](Panel panel) {
    if (!emits(p)) return;
    Workspace<A> workspace;
    Folded sums(matrix, panel);
    for_tiles(panel, second, {p.x, plan.once ? nullptr : p.g, p.residual, past ? nullptr : p.dx}, sums,
              [&](const Tile<T>& tile, Place at, const Gradients<T>& to) {
                Stages<T>(second, tile, workspace)
                    .gradient(view(p.x, at), view(p.residual, at),
                              view(plan.once ? static_cast<const T*>(p.dx) : p.g, at), to);
              });
    matrix.blank(p.dx, panel);
    matrix.blank(p.grad_residual, panel);
  };
  matrix.two_passes(gathers, gather, finish, emit);
  for (int64_t c = 0; p.grad_act_weight && c < C; ++c) p.grad_act_weight[c] = 0;
  for (int64_t block = 0; p.grad_act_weight && block < matrix.blocks(); ++block) {
    for (int64_t chunk = 0; chunk < matrix.chunks(); ++chunk) {
      for (int64_t i = 0; i < matrix.channels(block); ++i) {
        p.grad_act_weight[matrix.first_channel(block) + i] += weight_sums[matrix.partial({block, chunk}) + i];
      }
    }
  }
}

template <class T>
void noise_columns(const Call& call, const T* x, T* y) {
  const Matrix matrix(call, true, sizeof(T));
  const bool past = matrix.outgrows();
  matrix.for_panels(false, [&](Panel panel) {
    DrawBuffer drawn;
    matrix.for_tiles(panel.chunk, [&](const Matrix::Tile& t) {
      const int64_t at = matrix.offset(panel.block, t);
      multiply<T>({x ? x + at : nullptr, matrix.ld()}, {y + at, matrix.ld(), 0, past}, call.chain.multiplier, t.rows,
                  matrix.columns(panel), matrix.draw(panel, t, drawn, Ahead()));
    });
  });
}

#define FN_INSTANTIATE(T)                                                     \
  template void forward_columns<T>(const Call&, const ForwardPointers<T>&);   \
  template void backward_columns<T>(const Call&, const BackwardPointers<T>&); \
  template void noise_columns<T>(const Call&, const T*, T*);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(BFloat16)
FN_INSTANTIATE(Float16)

}  // namespace fusednorm::cpu

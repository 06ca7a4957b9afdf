// Channels-last: a matrix of R = N*S rows and C columns, a column per channel (a 2-D input is one). It is cut into
// panels: chunks of rows times blocks of columns, a panel into tiles of a few rows. The first pass leaves each panel's
// partial sums, which are merged chunk by chunk; the second pass visits the panels backwards, so that those read last
// are still in cache. Noise comes in groups of 8 rows, hence tiles of whole groups.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "drivers.h"
#include "stages.h"
#include "tile_noise.h"

namespace fusednorm::cpu {
namespace {

constexpr int64_t kPanelElements = 1 << 18;  // of a panel, roughly

class Matrix {
 public:
  struct Tile {
    int64_t row, column, rows, columns;
  };

  Matrix(const Call& call, bool staged)
      : noise_(call.chain, call.seed, call.shape.S, call.first_row), rows_(call.shape.rows()), columns_(call.shape.C) {
    const int64_t largest = staged ? kStageColumns : kBlockColumns;
    blocks_ = (columns_ + largest - 1) / largest;
    block_ = padded((columns_ + blocks_ - 1) / blocks_);
    blocks_ = (columns_ + block_ - 1) / block_;
    tile_rows_ = std::clamp<int64_t>((staged ? kStageMatrix : kFusedElements) / block_ / 8 * 8, 8, kMaxTileRows);
    chunk_ = std::max<int64_t>(kPanelElements / block_ / kMaxTileRows * kMaxTileRows, kMaxTileRows);
    chunks_ = (rows_ + chunk_ - 1) / chunk_;
  }

  int64_t chunks() const { return chunks_; }
  int64_t panels() const { return chunks_ * blocks_; }
  int64_t chunk_of(int64_t panel) const { return panel / blocks_; }
  int64_t rows_before(int64_t panel, int64_t row) const { return row - chunk_of(panel) * chunk_; }
  int64_t chunk_rows(int64_t chunk) const { return std::min(chunk_, rows_ - chunk * chunk_); }

  template <class F>
  void for_tiles(int64_t panel, const F& f) const {
    const int64_t chunk = chunk_of(panel), column = panel % blocks_ * block_;
    const int64_t rows = chunk_rows(chunk);
    for (int64_t row = 0; row < rows; row += tile_rows_) {
      f(Tile{chunk * chunk_ + row, column, std::min(tile_rows_, rows - row), std::min(block_, columns_ - column)});
    }
  }

  int64_t ld() const { return columns_; }
  int64_t offset(const Tile& t) const { return t.row * columns_ + t.column; }

  // Where the tile stands in these, of which some may be null.
  template <class T>
  Ahead ahead(const Tile& t, std::initializer_list<const T*> streams) const {
    Ahead ahead(t.rows, t.columns);
    for (const T* base : streams) {
      if (base) ahead.add(base + offset(t), ld());
    }
    return ahead;
  }
  Draws draw(const Tile& t, DrawBuffer& buffer, const Ahead& ahead) const {
    return noise_.columns(t.row, t.column, t.rows, t.columns, buffer, ahead);
  }

  // The tile's place in a saved mask.
  int64_t mask_ld() const { return words_of(columns_); }
  int64_t mask_offset(const Tile& t) const { return t.row * mask_ld() + t.column / 32; }

 private:
  TileNoise noise_;
  int64_t rows_, columns_, blocks_, block_, tile_rows_, chunk_, chunks_;
};

// Two values per channel and chunk, in vectors padded for the kernels.
struct Partials {
  int64_t ld;
  std::vector<double> first, second;
  Partials(int64_t chunks, int64_t channels) : ld(padded(channels)), first(chunks * ld), second(chunks * ld) {}
};

// f(first, last) for ranges of channels (multiples of 32); a channel costs `work` steps.
template <class F>
void for_channels(int64_t channels, int64_t work, const F& f) {
  constexpr int64_t step = 256;
  for_tasks((channels + step - 1) / step, channels * work < kSerial, false,
            [&](int64_t i) { f(i * step, std::min(channels, (i + 1) * step)); });
}

}  // namespace

template <class T>
void forward_channels_last(const Call& call, const ForwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Plan plan(call.chain, false, p.mask != nullptr, call.training && std::is_same_v<T, A>), second = plan.second();
  const Matrix matrix(call, plan.staged);
  const int64_t C = call.shape.C, ld = matrix.ld();
  const bool serial = C * call.shape.rows() < kSerial;
  Partials partials(call.training ? matrix.chunks() : 0, C), clean(p.clean_mean ? matrix.chunks() : 0, C);
  ChannelVectors<A> vectors(C);
  const std::vector<A> act_weight = padded_copy(p.act_weight, C);
  const bool before = call.chain.before[0] != Stage::none, noisy = call.chain.before_has(Stage::drop);
  const bool keeps_noise = p.mask && plan.saves_at < 0;  // drawn in the first pass, read in the second
  const auto tile_of = [&](const Matrix::Tile& t, const Draws& draws) {
    return Tile<T>{
        kColumns, t.rows, t.columns, vectors.at(t.column), act_weight.empty() ? nullptr : act_weight.data() + t.column,
        draws};
  };
  const auto draw = [&](const Matrix::Tile& t, DrawBuffer& buffer, std::initializer_list<const T*> streams) {
    const Draws draws = matrix.draw(t, buffer, plan.staged ? matrix.ahead(t, streams) : Ahead());
    for (int64_t row = 0; keeps_noise && row < t.rows; ++row) {
      std::copy_n(draws.keep + row * draws.ldkeep, words_of(t.columns),
                  p.mask + matrix.mask_offset(t) + row * matrix.mask_ld());
    }
    return draws;
  };
  if (call.training) {
    for_tasks(matrix.panels(), serial, false, [&](int64_t panel) {
      const int64_t at = matrix.chunk_of(panel) * partials.ld;
      DrawBuffer drawn;
      Workspace<A> workspace;
      matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
        const auto merge = [&](auto u, Partials& into) {
          using E = std::remove_const_t<std::remove_pointer_t<decltype(u.p)>>;
          kernels_for<E>().moments_columns(u.p, t.rows, t.columns, u.ld, matrix.rows_before(panel, t.row),
                                           into.first.data() + at + t.column, into.second.data() + at + t.column);
        };
        const View<const T> x{p.x + matrix.offset(t), ld};
        if (!before) return merge(x, partials);
        const Tile<T> tile = tile_of(t, noisy ? draw(t, drawn, {p.x, plan.once ? p.y : nullptr}) : Draws{});
        Stages<T> stages(plan, tile, workspace);
        const View<const A> u = stages.ahead(x);
        merge(u, partials);
        if constexpr (std::is_same_v<T, A>) {
          for (int64_t row = 0; plan.once && row < t.rows; ++row) {
            std::copy_n(u.p + row * u.ld, t.columns, p.y + matrix.offset(t) + row * ld);
          }
        }
        if (p.clean_mean) merge(stages.ahead(x, false), clean);
      });
    });
  }
  for_channels(C, matrix.chunks(), [&](int64_t begin, int64_t end) {
    const auto merge = [&](Partials& all) {  // into the first chunk's
      double *mean = all.first.data(), *m2 = all.second.data();
      double count = matrix.chunk_rows(0);
      for (int64_t chunk = 1; chunk < matrix.chunks(); ++chunk) {
        const double rows = matrix.chunk_rows(chunk);
        const int64_t at = chunk * all.ld + begin;
        kernels().merge_moments(count, mean + begin, m2 + begin, rows, mean + at, m2 + at, end - begin);
        count += rows;
      }
    };
    if (call.training) merge(partials);
    if (p.clean_mean) merge(clean);
    for (int64_t c = begin; c < end; ++c) {
      Statistics s{};
      if (call.training) s.u = {0, partials.first[c], partials.second[c]};
      if (p.clean_mean) s.clean = {0, clean.first[c], clean.second[c]};
      finish_statistics(call, p, c, s, vectors);
    }
  });
  for_tasks(matrix.panels(), serial, true, [&](int64_t panel) {
    DrawBuffer drawn;
    Workspace<A> workspace;
    matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
      const int64_t at = matrix.offset(t);
      uint32_t* mask = p.mask ? p.mask + matrix.mask_offset(t) : nullptr;
      Draws draws{mask, matrix.mask_ld(), nullptr, 0};
      if (!(keeps_noise && call.training)) draws = second.drops() ? draw(t, drawn, {p.x, p.residual, p.y}) : Draws{};
      const Tile<T> tile = tile_of(t, draws);
      Stages<T>(second, tile, workspace)
          .forward({(plan.once ? p.y : p.x) + at, ld}, {p.residual ? p.residual + at : nullptr, ld}, {p.y + at, ld},
                   mask, matrix.mask_ld());
    });
  });
}

template <class T>
void backward_channels_last(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const bool serial = call.shape.C * call.shape.rows() < kSerial, gathers = p.grad_weight != nullptr;
  const Plan plan(call.chain, true, p.mask != nullptr, gathers && p.dx && std::is_same_v<T, A>), second = plan.second();
  const Matrix matrix(call, plan.staged);
  const int64_t C = call.shape.C, ld = matrix.ld();
  Partials partials(gathers ? matrix.chunks() : 0, C);
  ChannelVectors<A> vectors(C);
  for (int64_t c = 0; c < C; ++c) load_statistics(p, c, vectors);
  const std::vector<A> act_weight = padded_copy(p.act_weight, C);
  const auto tile_of = [&](const Matrix::Tile& t, const Plan& pass, std::initializer_list<const T*> streams,
                           DrawBuffer& drawn) {
    const uint32_t* mask = p.mask ? p.mask + matrix.mask_offset(t) : nullptr;
    const Ahead ahead = plan.staged ? matrix.ahead(t, streams) : Ahead();
    Draws draws{plan.mask_is_noise() ? mask : nullptr, matrix.mask_ld(), nullptr, 0};
    if (pass.drops() && !plan.mask_is_noise()) {
      draws = matrix.draw(t, drawn, ahead);
    } else {
      ahead.fetch();
    }
    return Tile<T>{kColumns,
                   t.rows,
                   t.columns,
                   vectors.at(t.column),
                   act_weight.empty() ? nullptr : act_weight.data() + t.column,
                   draws,
                   mask,
                   matrix.mask_ld()};
  };
  const auto at = [&](auto* base, const Matrix::Tile& t) {
    return View<std::remove_pointer_t<decltype(base)>>{base ? base + matrix.offset(t) : nullptr, ld};
  };
  std::vector<A> a(padded(C)), b(padded(C)), c_(padded(C));
  std::vector<double> weight_sums(p.grad_act_weight ? matrix.chunks() * padded(C) : 0);
  const auto outputs = [&](const Matrix::Tile& t, int64_t chunk, const Plan& pass) {
    Gradients<T> to{};
    to.dx = at(p.dx, t);
    if (&pass == &plan || !plan.once) to.residual = at(p.grad_residual, t);
    if (p.grad_act_weight) to.act_weight = weight_sums.data() + chunk * padded(C) + t.column;
    to.a = a.data() + t.column;
    to.b = call.training ? b.data() + t.column : nullptr;
    to.c = c_.data() + t.column;
    return to;
  };
  if (gathers) {
    for_tasks(matrix.panels(), serial, false, [&](int64_t panel) {
      DrawBuffer drawn;
      Workspace<A> workspace;
      const int64_t chunk = matrix.chunk_of(panel), into = chunk * partials.ld;
      matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
        const Tile<T> tile = tile_of(t, plan, {p.x, p.g, p.residual}, drawn);
        Stages<T>(plan, tile, workspace)
            .gradient_sums(at(p.x, t), at(p.residual, t), at(p.g, t), partials.first.data() + into + t.column,
                           partials.second.data() + into + t.column,
                           plan.once ? outputs(t, chunk, plan) : Gradients<T>{});
      });
    });
  }
  for_channels(C, matrix.chunks(), [&](int64_t begin, int64_t end) {
    double *dz = partials.first.data(), *dz_xmu = partials.second.data();
    for (int64_t chunk = 1; gathers && chunk < matrix.chunks(); ++chunk) {
      for (int64_t c = begin; c < end; ++c) {
        dz[c] += dz[chunk * partials.ld + c];
        dz_xmu[c] += dz_xmu[chunk * partials.ld + c];
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      const math::InputGradient<double> k =
          finish_gradient(call, p, c, gathers ? dz[c] : 0, gathers ? dz_xmu[c] : 0, vectors.scale[c]);
      a[c] = static_cast<A>(k.a);
      b[c] = static_cast<A>(k.b);
      c_[c] = static_cast<A>(k.c);
    }
  });
  if (!emits(p)) return;
  for_tasks(matrix.panels(), serial, true, [&](int64_t panel) {
    DrawBuffer drawn;
    Workspace<A> workspace;
    matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
      const Tile<T> tile = tile_of(t, second, {p.x, plan.once ? nullptr : p.g, p.residual, p.dx}, drawn);
      Stages<T>(second, tile, workspace)
          .gradient(at(p.x, t), at(p.residual, t), at(plan.once ? static_cast<const T*>(p.dx) : p.g, t),
                    outputs(t, matrix.chunk_of(panel), second));
    });
  });
  for (int64_t c = 0; p.grad_act_weight && c < C; ++c) {
    p.grad_act_weight[c] = 0;
    for (int64_t chunk = 0; chunk < matrix.chunks(); ++chunk) {
      p.grad_act_weight[c] += weight_sums[chunk * padded(C) + c];
    }
  }
}

template <class T>
void noise_channels_last(const Call& call, const T* x, T* y) {
  const Matrix matrix(call, true);
  for_tasks(matrix.panels(), call.shape.C * call.shape.rows() < kSerial, false, [&](int64_t panel) {
    DrawBuffer drawn;
    matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
      const int64_t at = matrix.offset(t);
      multiply<T>({x ? x + at : nullptr, matrix.ld()}, {y + at, matrix.ld()}, call.chain.multiplier, t.rows, t.columns,
                  matrix.draw(t, drawn, Ahead()));
    });
  });
}

#define FN_INSTANTIATE(T)                                                           \
  template void forward_channels_last<T>(const Call&, const ForwardPointers<T>&);   \
  template void backward_channels_last<T>(const Call&, const BackwardPointers<T>&); \
  template void noise_channels_last<T>(const Call&, const T*, T*);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(BFloat16)
FN_INSTANTIATE(Float16)

}  // namespace fusednorm::cpu

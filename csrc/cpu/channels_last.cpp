// Channels-last: a matrix of R = N*S rows and C columns, a column per channel (a 2-D input is one). It is cut into
// panels: chunks of rows times blocks of columns, a panel into tiles of a few rows. The first pass leaves each panel's
// partial sums, which are merged chunk by chunk; the second pass visits the panels backwards, so that those read last
// are still in cache. Noise comes in groups of 8 rows, hence tiles of whole groups.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "drivers.h"

namespace fusednorm::cpu {
namespace {

constexpr int64_t kBlockColumns = 1024;      // of a block, at most
constexpr int64_t kPanelElements = 1 << 18;  // of a panel, roughly
constexpr int64_t kTileElements = 8192;      // of a tile, roughly

class Matrix {
 public:
  struct Tile {
    int64_t row, column, rows, columns;
  };

  explicit Matrix(const Call& call)
      : shape_(call.shape),
        chain_(call.chain),
        seed_(math::split_seed(call.seed)),
        rows_(shape_.rows()),
        columns_(shape_.C) {
    blocks_ = (columns_ + kBlockColumns - 1) / kBlockColumns;
    block_ = padded((columns_ + blocks_ - 1) / blocks_);
    blocks_ = (columns_ + block_ - 1) / block_;
    tile_rows_ = std::clamp<int64_t>(kTileElements / block_ / 8 * 8, 8, kMaxTileRows);
    chunk_ = std::max<int64_t>(kPanelElements / block_ / kMaxTileRows * kMaxTileRows, kMaxTileRows);
    chunks_ = (rows_ + chunk_ - 1) / chunk_;
  }

  int64_t chunks() const { return chunks_; }
  int64_t panels() const { return chunks_ * blocks_; }
  int64_t chunk_of(int64_t panel) const { return panel / blocks_; }
  int64_t rows_before(int64_t panel, int64_t row) const { return row - chunk_of(panel) * chunk_; }
  int64_t chunk_rows(int64_t chunk) const { return std::min(chunk_, rows_ - chunk * chunk_); }
  int64_t bits_size() const { return tile_rows_ * block_ / 32; }

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

  // The tile's keep bits (rows ld words apart), or null where everything is treated alike.
  const uint32_t* draw(const Tile& t, uint32_t* buffer, int64_t& ld) const {
    ld = words_of(t.columns);
    const auto groups = [&](int64_t group, uint32_t* to) {
      kernels().keep_columns(seed_.low, seed_.high, static_cast<uint32_t>(t.column), group, chain_.threshold, to, ld,
                             ld);
    };
    if (!chain_.draws()) return nullptr;
    if (chain_.granularity == Granularity::element) {
      for (int64_t i = 0; i < t.rows; i += math::kRowsPerCall)
        groups((t.row + i) / math::kRowsPerCall, buffer + i * ld);
      return buffer;
    }
    uint32_t drawn[math::kRowsPerCall * kBlockColumns / 32];
    int64_t group = -1;
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t n = (t.row + i) / shape_.S;
      if (n / math::kRowsPerCall != group) groups(group = n / math::kRowsPerCall, drawn);
      std::copy_n(drawn + n % math::kRowsPerCall * ld, ld, buffer + i * ld);
    }
    return buffer;
  }

  // The tile's place in a saved mask.
  int64_t mask_ld() const { return words_of(columns_); }
  int64_t mask_offset(const Tile& t) const { return t.row * mask_ld() + t.column / 32; }

 private:
  Shape shape_;
  Chain chain_;
  math::Seed seed_;
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
  const Matrix matrix(call);
  const int64_t C = call.shape.C;
  const bool serial = C * call.shape.rows() < kSerial;
  Partials partials(call.training ? matrix.chunks() : 0, C);
  ChannelVectors<A> vectors(C);
  if (call.training) {
    for_tasks(matrix.panels(), serial, false, [&](int64_t panel) {
      const int64_t at = matrix.chunk_of(panel) * partials.ld;
      matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
        kernels_for<T>().moments_columns(p.x + matrix.offset(t), t.rows, t.columns, matrix.ld(),
                                         matrix.rows_before(panel, t.row), partials.first.data() + at + t.column,
                                         partials.second.data() + at + t.column);
      });
    });
  }
  for_channels(C, matrix.chunks(), [&](int64_t begin, int64_t end) {
    double *mean = partials.first.data(), *m2 = partials.second.data();  // of the first chunk, and then of all
    double count = matrix.chunk_rows(0);
    for (int64_t chunk = 1; call.training && chunk < matrix.chunks(); ++chunk) {
      const double rows = matrix.chunk_rows(chunk);
      const int64_t at = chunk * partials.ld + begin;
      kernels().merge_moments(count, mean + begin, m2 + begin, rows, mean + at, m2 + at, end - begin);
      count += rows;
    }
    for (int64_t c = begin; c < end; ++c) {
      finish_statistics(call, p, c, call.training ? mean[c] : 0, call.training ? m2[c] : 0, vectors);
    }
  });
  for_tasks(matrix.panels(), serial, true, [&](int64_t panel) {
    std::vector<uint32_t> bits(matrix.bits_size());
    matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
      Apply<T> q{};
      q.rows = t.rows;
      q.cols = t.columns;
      q.x = p.x + matrix.offset(t);
      q.y = p.y + matrix.offset(t);
      q.ldx = q.ldy = matrix.ld();
      q.affine = vectors.at(t.column);
      std::copy_n(call.chain.parameters, 2, q.activation);
      q.multiplier = static_cast<A>(call.chain.multiplier);
      q.keep = matrix.draw(t, bits.data(), q.ldkeep);
      q.save = p.mask ? p.mask + matrix.mask_offset(t) : nullptr;
      q.ldsave = matrix.mask_ld();
      kernels_for<T>().apply[kColumns][call.chain.activation](q);
    });
  });
}

template <class T>
void backward_channels_last(const Call& call, const BackwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Matrix matrix(call);
  const int64_t C = call.shape.C;
  const bool serial = C * call.shape.rows() < kSerial, gathers = p.grad_weight != nullptr;
  Partials partials(gathers ? matrix.chunks() : 0, C);
  ChannelVectors<A> vectors(C);
  for (int64_t c = 0; c < C; ++c) load_statistics(p, c, vectors);
  const auto arguments = [&](const Matrix::Tile& t, std::vector<uint32_t>& bits) {
    Backward<T> q{};
    q.rows = t.rows;
    q.cols = t.columns;
    q.x = p.x + matrix.offset(t);
    q.g = p.g + matrix.offset(t);
    q.ldx = q.ldg = matrix.ld();
    q.affine = vectors.at(t.column);
    std::copy_n(call.chain.parameters, 2, q.activation);
    q.multiplier = static_cast<A>(call.chain.multiplier);
    if (p.mask) {
      q.keep = p.mask + matrix.mask_offset(t);
      q.ldkeep = matrix.mask_ld();
    } else {
      q.keep = matrix.draw(t, bits.data(), q.ldkeep);
    }
    q.keep_is_saved = p.mask != nullptr;
    return q;
  };
  const int64_t bits_size = p.mask ? 0 : matrix.bits_size();
  if (gathers) {
    for_tasks(matrix.panels(), serial, false, [&](int64_t panel) {
      std::vector<uint32_t> bits(bits_size);
      const int64_t at = matrix.chunk_of(panel) * partials.ld;
      matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
        Backward<T> q = arguments(t, bits);
        q.sum_dz = partials.first.data() + at + t.column;
        q.sum_dz_xmu = partials.second.data() + at + t.column;
        kernels_for<T>().gradient_sums[kColumns][call.chain.activation](q);
      });
    });
  }
  std::vector<A> a(padded(C)), b(padded(C)), c_(padded(C));
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
  if (!p.dx) return;
  for_tasks(matrix.panels(), serial, true, [&](int64_t panel) {
    std::vector<uint32_t> bits(bits_size);
    matrix.for_tiles(panel, [&](const Matrix::Tile& t) {
      Backward<T> q = arguments(t, bits);
      q.dx = p.dx + matrix.offset(t);
      q.lddx = matrix.ld();
      q.a = a.data() + t.column;
      q.b = b.data() + t.column;
      q.c = c_.data() + t.column;
      kernels_for<T>().input_gradient[kColumns][call.chain.activation](q);
    });
  });
}

#define FN_INSTANTIATE(T)                                                         \
  template void forward_channels_last<T>(const Call&, const ForwardPointers<T>&); \
  template void backward_channels_last<T>(const Call&, const BackwardPointers<T>&);
FN_INSTANTIATE(float)
FN_INSTANTIATE(double)
FN_INSTANTIATE(BFloat16)
FN_INSTANTIATE(Float16)

}  // namespace fusednorm::cpu

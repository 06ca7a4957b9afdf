// The noise of a tile, for both drivers: keep bits or float multipliers, of elements, of channels or of samples.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../call.h"
#include "../math/noise.h"
#include "kernels.h"

namespace fusednorm::cpu {

constexpr int64_t kFusedElements = 8192;  // of a tile, at most, that is worked on where it stands
// Of a tile whose stages go through buffers, at most: they share the first-level cache. In runs sums cost more the
// shorter these are.
constexpr int64_t kStageElements = 2048;
constexpr int64_t kStageMatrix = 1024;   // the same, of columns
constexpr int64_t kStageColumns = 128;   // a group of 8 rows has to fit
constexpr int64_t kBlockColumns = 1024;  // of any tile

constexpr int64_t kFetchedDraws = 256;  // between two fetches (Ahead)

constexpr int64_t words_of(int64_t bits) { return (bits + 31) / 32; }

// Rows ld apart. Neither pointer: one multiplier for all.
struct Draws {
  const uint32_t* keep;
  int64_t ldkeep;
  const float* m;
  int64_t ldm;
};

// Where the draws of a tile are kept, and between tiles those that several tiles share.
struct DrawBuffer {
  uint32_t bits[2 * kFusedElements / 32];  // whole groups of 8 rows, and one more where the first is not aligned
  float m[2 * kStageElements + kRunDraws];
  uint32_t shared_bits[math::kRowsPerCall * kBlockColumns / 32];
  float shared_m[math::kRowsPerCall * kStageColumns];
  int64_t shared_group = -1, shared_channel = -1;
};

// The streams that a tile goes through. They are fetched while its noise is drawn, which takes time and no memory;
// where it is drawn per channel or sample, before the tile's first stage. For tiles that go through stages, and for
// noise alone channels-first; elsewhere kernels fetch what is read soon, or the processor does.
class Ahead {
 public:
  Ahead() = default;
  Ahead(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {}

  // Rows ld apart.
  template <class T>
  void add(const T* p, int64_t ld) {
    constexpr int64_t size = sizeof(T);
    streams_[count_++] = {reinterpret_cast<const char*>(p), ld * size, size};
  }
  // What of rows and columns [begin, end) is in the tile. Inlined: g++ drops calls of a function that only prefetches.
  FN_INLINE void fetch(int64_t row, int64_t end_row, int64_t begin, int64_t end) const {
    end_row = std::min(end_row, rows_);
    end = std::min(end, cols_);
    for (; row < end_row; ++row) {
      for (int i = 0; i < count_; ++i) {
        const Stream& s = streams_[i];
        const char* p = s.p + row * s.ld;
        for (int64_t at = begin * s.size; at < end * s.size; at += 64) __builtin_prefetch(p + at, 0, 2);
      }
    }
  }
  bool empty() const { return count_ == 0; }
  FN_INLINE void fetch() const { fetch(0, rows_, 0, cols_); }

 private:
  struct Stream {
    const char* p;
    int64_t ld, size;
  };
  Stream streams_[4];
  int64_t rows_ = 0, cols_ = 0;
  int count_ = 0;
};

inline void set_bits(uint32_t* words, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t first = begin % 32, n = std::min<int64_t>(32 - first, end - begin);
    words[begin / 32] |= (n == 32 ? ~0u : (1u << n) - 1) << first;
    begin += n;
  }
}

class TileNoise {
 public:
  // Rows are counted from `first_row` of the whole batch.
  TileNoise(const Chain& chain, int64_t seed, int64_t S, int64_t first_row)
      : chain_(chain), seed_(seed), S_(S), first_row_(first_row) {
    if (S == 1 && chain.granularity == Granularity::channel) chain_.granularity = Granularity::element;
  }

  // Rows [row, row + n) of channel c.
  Draws run(int64_t c, int64_t row, int64_t n, DrawBuffer& b, const Ahead& ahead) const {
    if (!chain_.draws() || chain_.granularity != Granularity::element) ahead.fetch();
    if (!chain_.draws()) return {};
    const int64_t channel = chain_.granularity == Granularity::sample ? 0 : c, first = first_row_ + row;
    if (chain_.granularity == Granularity::element) {
      const int64_t shift = first % math::kRowsPerCall, group = first / math::kRowsPerCall;
      const bool bits = chain_.noise == Noise::bernoulli;
      const int64_t words = words_of(n + shift);
      const int64_t step = ahead.empty() ? n + shift : kFetchedDraws;
      for (int64_t i = 0; i < n + shift; i += step) {
        const int64_t end = std::min(i + step, n + shift), at = group + i / math::kRowsPerCall;
        ahead.fetch(0, 1, i, end);
        bits ? keep_run(channel, at, b.bits + i / 32, words_of(end - i))
             : multipliers_run(channel, at, b.m + i, end - i);
      }
      if (!bits) return {nullptr, 0, b.m + shift, 0};
      if (shift) {  // a piece may begin inside a group of rows
        for (int64_t i = 0; i + 1 < words; ++i) b.bits[i] = b.bits[i] >> shift | b.bits[i + 1] << (32 - shift);
        b.bits[words - 1] >>= shift;
      }
      return {b.bits, 0, nullptr, 0};
    }
    int64_t drawn = -1;
    if (chain_.noise != Noise::bernoulli) {
      for (int64_t i = 0; i < n;) {
        const int64_t sample = (first + i) / S_, end = std::min(n, (sample + 1) * S_ - first);
        if (sample / kRunDraws != drawn) {
          drawn = sample / kRunDraws;
          multipliers_run(channel, drawn * (kRunDraws / math::kRowsPerCall), b.shared_m,
                          std::min<int64_t>((first + n - 1) / S_ - drawn * kRunDraws + 1, kRunDraws));
        }
        std::fill(b.m + i, b.m + end, b.shared_m[sample % kRunDraws]);
        i = end;
      }
      return {nullptr, 0, b.m, 0};
    }
    std::fill_n(b.bits, words_of(n), 0u);
    uint32_t bits = 0;  // of 32 consecutive samples
    for (int64_t i = 0; i < n;) {
      const int64_t sample = (first + i) / S_, end = std::min(n, (sample + 1) * S_ - first);
      if (sample / 32 != drawn) keep_run(channel, (drawn = sample / 32) * 32 / math::kRowsPerCall, &bits, 1);
      if (bits >> (sample % 32) & 1) set_bits(b.bits, i, end);
      i = end;
    }
    return {b.bits, 0, nullptr, 0};
  }

  // Rows [row, row + rows) of channels [c, c + cols).
  Draws columns(int64_t row, int64_t c, int64_t rows, int64_t cols, DrawBuffer& b, const Ahead& ahead) const {
    if (!chain_.draws() || chain_.granularity != Granularity::element) ahead.fetch();
    if (!chain_.draws()) return {};
    const int64_t words = words_of(cols), ld = words * 32, first = first_row_ + row;
    const bool bits = chain_.noise == Noise::bernoulli;
    if (chain_.granularity == Granularity::element) {
      const int64_t shift = first % math::kRowsPerCall;
      for (int64_t i = 0; i < rows + shift; i += math::kRowsPerCall) {
        const int64_t group = (first - shift + i) / math::kRowsPerCall;
        ahead.fetch(i, i + math::kRowsPerCall, 0, cols);
        bits ? keep_columns(c, group, b.bits + i * words, words) : multipliers_columns(c, group, b.m + i * ld, ld);
      }
      return bits ? Draws{b.bits + shift * words, words, nullptr, 0} : Draws{nullptr, 0, b.m + shift * ld, ld};
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t sample = (first + i) / S_, within = sample % math::kRowsPerCall;
      share(sample / math::kRowsPerCall, c, words, b);
      if (i == 0 && (first + rows - 1) / S_ == sample) {  // one row serves all
        return bits ? Draws{b.shared_bits + within * words, 0, nullptr, 0}
                    : Draws{nullptr, 0, b.shared_m + within * ld, 0};
      }
      if (bits) {
        std::copy_n(b.shared_bits + within * words, words, b.bits + i * words);
      } else {
        std::copy_n(b.shared_m + within * ld, ld, b.m + i * ld);
      }
    }
    return bits ? Draws{b.bits, words, nullptr, 0} : Draws{nullptr, 0, b.m, ld};
  }

 private:
  // The 8 rows of a group of samples.
  void share(int64_t group, int64_t c, int64_t words, DrawBuffer& b) const {
    if (b.shared_group == group && b.shared_channel == c) return;
    b.shared_group = group;
    b.shared_channel = c;
    const bool bits = chain_.noise == Noise::bernoulli;
    if (chain_.granularity == Granularity::channel) {
      bits ? keep_columns(c, group, b.shared_bits, words) : multipliers_columns(c, group, b.shared_m, words * 32);
      return;
    }
    uint32_t keep;
    float m[kRunDraws];
    bits ? keep_run(0, group, &keep, 1) : multipliers_run(0, group, m, math::kRowsPerCall);
    for (int64_t i = 0; i < math::kRowsPerCall; ++i) {
      if (bits) {
        std::fill_n(b.shared_bits + i * words, words, keep >> i & 1 ? ~0u : 0u);
      } else {
        std::fill_n(b.shared_m + i * words * 32, words * 32, m[i]);
      }
    }
  }

  uint32_t low() const { return math::split_seed(seed_).low; }
  uint32_t high() const { return math::split_seed(seed_).high; }
  int kind() const { return chain_.noise == Noise::gaussian; }
  bool settled() const { return chain_.threshold == kAllKept || chain_.threshold == 0; }
  uint32_t all() const { return chain_.threshold == 0 ? 0 : ~0u; }
  void keep_run(int64_t c, int64_t group, uint32_t* out, int64_t words) const {
    if (settled()) return void(std::fill_n(out, words, all()));
    kernels().keep_run(low(), high(), static_cast<uint32_t>(c), group, chain_.threshold, out, words);
  }
  void keep_columns(int64_t c, int64_t group, uint32_t* out, int64_t words) const {
    if (settled()) return void(std::fill_n(out, math::kRowsPerCall * words, all()));
    kernels().keep_columns(low(), high(), static_cast<uint32_t>(c), group, chain_.threshold, out, words, words);
  }
  void multipliers_run(int64_t c, int64_t group, float* out, int64_t n) const {
    kernels().multipliers_run[kind()](low(), high(), static_cast<uint32_t>(c), group, chain_.strength, out, n);
  }
  void multipliers_columns(int64_t c, int64_t group, float* out, int64_t ld) const {
    kernels().multipliers_columns[kind()](low(), high(), static_cast<uint32_t>(c), group, chain_.strength, out, ld, ld);
  }

  Chain chain_;
  int64_t seed_;
  int64_t S_, first_row_;
};

}  // namespace fusednorm::cpu

// Rows of a batch that do not count: padding, mostly. They are left out of sums over a channel, and zero in results.
//
// What is behind the last row of a tile that counts is not worked on, so that a batch of padded samples takes the time
// of its values. Where rows within a tile do not count, it is worked on as if they did, on zeros where that would show.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fusednorm::cpu {

class Gaps {
 public:
  // rows: whether each counts.
  Gaps(const bool* rows, int64_t n) : words_((n + 63) / 64) {
    for (int64_t r = 0; r < n; ++r) words_[r / 64] |= static_cast<uint64_t>(rows[r]) << (r % 64);
  }

  // Of rows [begin, end): how many count; where those end that do.
  int64_t count(int64_t begin, int64_t end) const {
    int64_t n = 0;
    for_words(begin, end, [&](uint64_t word, int64_t) { n += __builtin_popcountll(word); });
    return n;
  }
  int64_t last(int64_t begin, int64_t end) const {
    int64_t last = begin;
    for_words(begin, end, [&](uint64_t word, int64_t at) {
      if (word) last = at + 64 - __builtin_clzll(word);
    });
    return last;
  }
  // f(first, n) for each stretch of rows [begin, end) that count, or that do not.
  template <class F>
  void for_stretches(int64_t begin, int64_t end, bool counting, const F& f) const {
    const auto next = [&](int64_t row, bool value) {  // from `row` on
      while (row < end) {
        const uint64_t word = (value ? words_[row / 64] : ~words_[row / 64]) >> (row % 64);
        if (word) return std::min(row + __builtin_ctzll(word), end);
        row = (row / 64 + 1) * 64;
      }
      return end;
    };
    for (int64_t row = next(begin, counting); row < end;) {
      const int64_t behind = next(row, !counting);
      f(row, behind - row);
      row = next(behind, counting);
    }
  }

 private:
  // f(bits of rows [at, at + 64) that are in [begin, end), at)
  template <class F>
  void for_words(int64_t begin, int64_t end, const F& f) const {
    for (int64_t at = begin / 64 * 64; at < end; at += 64) {
      uint64_t word = words_[at / 64];
      if (at < begin) word &= ~uint64_t{0} << (begin - at);
      if (end - at < 64) word &= (uint64_t{1} << (end - at)) - 1;
      f(word, at);
    }
  }

  std::vector<uint64_t> words_;
};

}  // namespace fusednorm::cpu

// Draws by Philox: keep bits and multipliers of a run, or of the 8 rows of a group over columns.

#if defined(__SSE2__)
// Lane order of the counters of one vector, such that the words come out of the unpacking below in natural order.
FN_INLINE Word lane_counters() {
#if FN_VECTOR_BYTES == 64
  return Word(Word::Raw{0, 4, 1, 5, 2, 6, 3, 7});
#elif FN_VECTOR_BYTES == 32
  return Word(Word::Raw{0, 1, 2, 3});
#else
  return Word(Word::Raw{0, 1});
#endif
}

// Keep bits of Word::width consecutive counters: 8 draws each, counter after counter.
FN_INLINE uint64_t keep_of_counters(const Word (&x)[4], uint32_t threshold) {
  const Word::Raw first = interleave(x[0], x[1]), second = interleave(x[2], x[3]);  // draws 0-3 and 4-7 of each counter
#if FN_VECTOR_BYTES == 64
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const uint64_t low = _mm512_cmplt_epu16_mask(_mm512_unpacklo_epi64((__m512i)first, (__m512i)second), t);
  const uint64_t high = _mm512_cmplt_epu16_mask(_mm512_unpackhi_epi64((__m512i)first, (__m512i)second), t);
  return low | high << 32;
#elif FN_VECTOR_BYTES == 32
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold - 1)), zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi64((__m256i)first, (__m256i)second);
  const __m256i high = _mm256_unpackhi_epi64((__m256i)first, (__m256i)second);
  // draw < threshold as a saturating draw - (threshold - 1) == 0: there is no unsigned compare
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(
      _mm256_cmpeq_epi16(_mm256_subs_epu16(low, t), zero), _mm256_cmpeq_epi16(_mm256_subs_epu16(high, t), zero))));
#else
  const __m128i t = _mm_set1_epi16(static_cast<int16_t>(threshold - 1)), zero = _mm_setzero_si128();
  const __m128i low = _mm_unpacklo_epi64((__m128i)first, (__m128i)second);
  const __m128i high = _mm_unpackhi_epi64((__m128i)first, (__m128i)second);
  return static_cast<uint32_t>(_mm_movemask_epi8(
      _mm_packs_epi16(_mm_cmpeq_epi16(_mm_subs_epu16(low, t), zero), _mm_cmpeq_epi16(_mm_subs_epu16(high, t), zero))));
#endif
}

// 128 draws at a time at every width: 16 counters, several vectors in flight to hide the multiplier's latency.
FN_INLINE void keep_128(Seed seed, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out) {
  constexpr int n = 16 / Word::width, flight = n < 4 ? n : 4;
  for (int first = 0; first < n; first += flight) {
    Word x[flight][4];
    FN_UNROLL for (int i = 0; i < flight; ++i) {
      // Adding the lanes to the full 64-bit group and splitting afterwards carries into the high word.
      const Word::Raw g = lane_counters().raw + (group + (first + i) * Word::width);
      x[i][0] = Word(g);
      x[i][1] = Word(c);
      x[i][2] = Word(g >> 32);
      x[i][3] = Word(0u);
    }
    FN_UNROLL for (int i = 0; i < flight; ++i) math::philox4x32<math::kPhiloxRounds>(x[i], seed);
    FN_UNROLL for (int i = 0; i < flight; ++i) {
      const uint64_t bits = keep_of_counters(x[i], threshold);
      memcpy(reinterpret_cast<char*>(out) + (first + i) * Word::width, &bits, Word::width);
    }
  }
}

void keep_run(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out,
              int64_t words) {
  int64_t i = 0;
  for (; i + 4 <= words; i += 4) keep_128({key_low, key_high}, c, group + 4 * i, threshold, out + i);
  if (i < words) {
    uint32_t rest[4];
    keep_128({key_low, key_high}, c, group + 4 * i, threshold, rest);
    for (int64_t j = 0; i + j < words; ++j) out[i + j] = rest[j];
  }
}

// 32-bit lanes of `w` (two draws each), one per channel: bits of the even and of the odd row.
FN_INLINE void keep_of_word(Word::Raw w, uint32_t threshold, uint32_t& even, uint32_t& odd) {
#if FN_VECTOR_BYTES == 64
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold << 16));
  even = _mm512_cmplt_epu32_mask(_mm512_slli_epi32((__m512i)w, 16), t);
  odd = _mm512_cmplt_epu32_mask((__m512i)w, t);
#elif FN_VECTOR_BYTES == 32
  const __m256i t = _mm256_set1_epi32(static_cast<int>(threshold)), low = _mm256_set1_epi32(0xffff);
  even = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(t, _mm256_and_si256((__m256i)w, low))));
  odd = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(t, _mm256_srli_epi32((__m256i)w, 16))));
#else
  const __m128i t = _mm_set1_epi32(static_cast<int>(threshold)), low = _mm_set1_epi32(0xffff);
  even = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(t, _mm_and_si128((__m128i)w, low))));
  odd = _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(t, _mm_srli_epi32((__m128i)w, 16))));
#endif
}

FN_INLINE Word even_lanes() {
  Word::Raw r{};
  for (int i = 0; i < Word::width; ++i) r[i] = 2 * i;
  return Word(r);
}

void keep_columns(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out,
                  int64_t words, int64_t ld) {
  const math::Counter base = math::counter(group, 0);
  constexpr int channels = 2 * Word::width, pairs = 2;  // two pairs of vectors in flight
  for (int64_t word = 0; word < words; ++word) {
    uint32_t rows[math::kRowsPerCall] = {};
    for (int first = 0; first < kBlock; first += channels * pairs) {
      constexpr int n = 2 * pairs;
      Word x[n][4];
      FN_UNROLL for (int i = 0; i < n; ++i) {
        x[i][0] = Word(base.word[0]);
        x[i][1] = Word(even_lanes().raw + (c + kBlock * word + first + (i / 2) * channels + i % 2));
        x[i][2] = Word(base.word[2]);
        x[i][3] = Word(0u);
      }
      FN_UNROLL for (int i = 0; i < n; ++i) math::philox4x32<math::kPhiloxRounds>(x[i], Seed{key_low, key_high});
      FN_UNROLL for (int pair = 0; pair < pairs; ++pair) {
        FN_UNROLL for (int k = 0; k < 4; ++k) {
          uint32_t even, odd;
          keep_of_word(interleave(x[2 * pair][k], x[2 * pair + 1][k]), threshold, even, odd);
          rows[2 * k] |= even << (first + pair * channels);
          rows[2 * k + 1] |= odd << (first + pair * channels);
        }
      }
    }
    for (int i = 0; i < math::kRowsPerCall; ++i) out[i * ld + word] = rows[i];
  }
}

// The counters of rows [8*group, ...) of channel c: Word::width of them, consecutive.
FN_INLINE void run_counters(Word (&x)[4], uint32_t c, uint64_t group) {
  const Word::Raw g = lane_counters().raw + group;
  x[0] = Word(g);
  x[1] = Word(c);
  x[2] = Word(g >> 32);
  x[3] = Word(0u);
}

void uniform_run(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float beta, float* out, int64_t n) {
  constexpr int flight = 2;  // vectors of counters
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += flight * 8 * Word::width) {
    Word x[flight][4];
    FN_UNROLL for (int j = 0; j < flight; ++j) run_counters(x[j], c, group + i / 8 + j * Word::width);
    FN_UNROLL for (int j = 0; j < flight; ++j) math::philox4x32<math::kPhiloxRounds>(x[j], Seed{key_low, key_high});
    FN_UNROLL for (int j = 0; j < flight; ++j) {
      V draws[4];
      draws_of_words(interleave(x[j][0], x[j][1]), interleave(x[j][2], x[j][3]), draws);
      FN_UNROLL for (int k = 0; k < 4; ++k) {
        math::uniform_multiplier(draws[k], V(beta)).store(out + i + (4 * j + k) * V::width);
      }
    }
  }
}

// A lane serves 4 rows: half a group of 8, the stage says which. Lanes are dealt to halves such that the transposition
// within 128 bits leaves natural order.
FN_INLINE void half_group_counters(Word (&x)[4], uint32_t c, uint64_t group, int odd) {
  constexpr int blocks = Vec<float>::width / 4;
  Word::Raw half{};
  for (int j = 0; j < Word::width; ++j) {
    const int lane = 2 * j + odd;
    half[j] = blocks * (lane % 4) + lane / 4;  // folds to a constant
  }
  const Word::Raw g = (half >> 1) + group;
  x[0] = Word(g);
  x[1] = Word(c);
  x[2] = Word(g >> 32);
  x[3] = Word(half & 1);
}

// Words x[0..3] of even and odd lanes: the multipliers of 4 rows.
FN_INLINE void gaussian_of_words(const Word (&even)[4], const Word (&odd)[4], float sigma, Vec<float> (&m)[4]) {
  using V = Vec<float>;
  _Pragma("GCC unroll 1") for (int k = 0; k < 4; k += 2) {
    math::gaussian_multipliers(words_as_floats(interleave(even[k], odd[k])),
                               words_as_floats(interleave(even[k + 1], odd[k + 1])), V(sigma), m[k], m[k + 1]);
  }
}

void gaussian_run(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float sigma, float* out, int64_t n) {
  constexpr int flight = 2;
  using V = Vec<float>;
  for (int64_t i = 0; i < n; i += flight * 4 * V::width) {
    Word x[2 * flight][4];
    FN_UNROLL for (int j = 0; j < 2 * flight; ++j) {
      half_group_counters(x[j], c, group + i / 8 + j / 2 * (V::width / 2), j % 2);
    }
    FN_UNROLL for (int j = 0; j < 2 * flight; ++j) math::philox4x32<math::kPhiloxRounds>(x[j], Seed{key_low, key_high});
    for (int j = 0; j < flight; ++j) {
      V m[4];
      gaussian_of_words(x[2 * j], x[2 * j + 1], sigma, m);
      transpose4(m);
      FN_UNROLL for (int k = 0; k < 4; ++k) m[k].store(out + i + (4 * j + k) * V::width);
    }
  }
}

// The counters of even (odd) ones of 2 * Word::width channels from c.
FN_INLINE void column_counters(Word (&x)[4], uint32_t c, int odd, uint64_t group, uint32_t stage) {
  const math::Counter base = math::counter(group, 0, stage);
  x[0] = Word(base.word[0]);
  x[1] = Word(even_lanes().raw + (c + odd));
  x[2] = Word(base.word[2]);
  x[3] = Word(base.word[3]);
}

void uniform_columns(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float beta, float* out,
                     int64_t cols, int64_t ld) {
  constexpr int pairs = 2;
  using V = Vec<float>;
  for (int64_t i = 0; i < cols; i += pairs * V::width) {
    Word x[2 * pairs][4];
    FN_UNROLL for (int j = 0; j < 2 * pairs; ++j) column_counters(x[j], c + i + j / 2 * V::width, j % 2, group, 0);
    FN_UNROLL for (int j = 0; j < 2 * pairs; ++j) math::philox4x32<math::kPhiloxRounds>(x[j], Seed{key_low, key_high});
    FN_UNROLL for (int pair = 0; pair < pairs; ++pair) {
      FN_UNROLL for (int k = 0; k < 4; ++k) {
        const Word::Raw w = interleave(x[2 * pair][k], x[2 * pair + 1][k]);
        float* to = out + 2 * k * ld + i + pair * V::width;
        math::uniform_multiplier(low_draws(w), V(beta)).store(to);
        math::uniform_multiplier(high_draws(w), V(beta)).store(to + ld);
      }
    }
  }
}

void gaussian_columns(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float sigma, float* out,
                      int64_t cols, int64_t ld) {
  using V = Vec<float>;
  for (int64_t i = 0; i < cols; i += V::width) {
    Word x[4][4];  // even and odd channels at both stages
    FN_UNROLL for (int j = 0; j < 4; ++j) column_counters(x[j], c + i, j % 2, group, j / 2);
    FN_UNROLL for (int j = 0; j < 4; ++j) math::philox4x32<math::kPhiloxRounds>(x[j], Seed{key_low, key_high});
    for (int stage = 0; stage < 2; ++stage) {
      V m[4];
      gaussian_of_words(x[2 * stage], x[2 * stage + 1], sigma, m);
      FN_UNROLL for (int k = 0; k < 4; ++k) m[k].store(out + (4 * stage + k) * ld + i);
    }
  }
}
#else  // no fast wide multiply: one counter at a time
using Word = uint32_t;
FN_INLINE Word lane_counters() { return 0; }

FN_INLINE uint32_t keep_group(Seed seed, uint32_t c, uint64_t group, uint32_t threshold) {
  math::Counter x = math::counter(group, c);
  math::philox4x32<math::kPhiloxRounds>(x.word, seed);
  uint32_t bits = 0;
  for (int i = 0; i < math::kRowsPerCall; ++i) {
    bits |= static_cast<uint32_t>(((x.word[i / 2] >> (16 * (i % 2))) & 0xffffu) < threshold) << i;
  }
  return bits;
}

void keep_run(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out,
              int64_t words) {
  for (int64_t i = 0; i < words; ++i) {
    out[i] = 0;
    for (int j = 0; j < 4; ++j) out[i] |= keep_group({key_low, key_high}, c, group + 4 * i + j, threshold) << (8 * j);
  }
}

void keep_columns(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, uint32_t threshold, uint32_t* out,
                  int64_t words, int64_t ld) {
  for (int64_t word = 0; word < words; ++word) {
    for (int i = 0; i < math::kRowsPerCall; ++i) out[i * ld + word] = 0;
    for (int j = 0; j < kBlock; ++j) {
      const uint32_t bits = keep_group({key_low, key_high}, c + kBlock * word + j, group, threshold);
      for (int i = 0; i < math::kRowsPerCall; ++i) out[i * ld + word] |= (bits >> i & 1u) << j;
    }
  }
}

template <void (*draw8)(Seed, uint64_t, uint32_t, float, float (&)[math::kRowsPerCall])>
void draw_run(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float strength, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += math::kRowsPerCall) {
    float m[math::kRowsPerCall];
    draw8({key_low, key_high}, group + i / math::kRowsPerCall, c, strength, m);
    memcpy(out + i, m, sizeof(m));
  }
}
template <void (*draw8)(Seed, uint64_t, uint32_t, float, float (&)[math::kRowsPerCall])>
void draw_columns(uint32_t key_low, uint32_t key_high, uint32_t c, uint64_t group, float strength, float* out,
                  int64_t cols, int64_t ld) {
  for (int64_t i = 0; i < cols; ++i) {
    float m[math::kRowsPerCall];
    draw8({key_low, key_high}, group, c + static_cast<uint32_t>(i), strength, m);
    for (int row = 0; row < math::kRowsPerCall; ++row) out[row * ld + i] = m[row];
  }
}
constexpr auto uniform_run = &draw_run<math::uniform8>;
constexpr auto gaussian_run = &draw_run<math::gaussian8>;
constexpr auto uniform_columns = &draw_columns<math::uniform8>;
constexpr auto gaussian_columns = &draw_columns<math::gaussian8>;
#endif

template <int Rounds>
int philox_lanes_of(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  constexpr int lanes = sizeof(Word) / sizeof(uint64_t) ? sizeof(Word) / sizeof(uint64_t) : 1;
  uint64_t first[lanes];
  for (int i = 0; i < lanes; ++i) first[i] = counter[0] + static_cast<uint32_t>(i);
  Word x[4] = {Word(), Word(counter[1]), Word(counter[2]), Word(counter[3])};
  memcpy(&x[0], first, sizeof(Word));
  math::philox4x32<Rounds>(x, Seed{key[0], key[1]});
  for (int k = 0; k < 4; ++k) {
    uint64_t words[lanes];
    memcpy(words, &x[k], sizeof(Word));
    for (int i = 0; i < lanes; ++i) out[4 * i + k] = static_cast<uint32_t>(words[i]);
  }
  return lanes;
}
int philox_lanes(int rounds, const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  return rounds == 10 ? philox_lanes_of<10>(counter, key, out) : philox_lanes_of<7>(counter, key, out);
}

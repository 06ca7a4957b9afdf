// Statistics: two passes over a tile that sits in the first-level cache. The first gives a centre near the mean, the
// second the deviations d from it. With them
//   mean = centre + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n
// (the corrected two-pass algorithm: Chan, Golub & LeVeque 1983), so the rounding of the first pass does no harm,
// neither a large mean nor an outlier anywhere. Nor does it that the first pass takes a part f of the values: they
// alone make m2 >= f*n*(centre - mean)^2, so what is subtracted is at most m2/f, and a quarter costs two bits at worst.
constexpr int64_t kPart = 4;

FN_INLINE double widen_one(double x) { return x; }
FN_INLINE float widen_one(float x) { return x; }

// f(v, values, present lanes or null for all) for every vector of n values. Two blocks are in flight: a sum waits some
// cycles for the one before. What stands `ahead` is fetched on the way.
template <class T, class F>
FN_INLINE void for_run(const T* x, int64_t n, int64_t ahead, F f) {
  using V = Vec<opmath_t<T>>;
  constexpr int vectors = kVectors<opmath_t<T>>;
  int64_t i = 0;
  for (; i + 2 * kBlock <= n; i += 2 * kBlock) {
    fetch_block(x + i, ahead);
    fetch_block(x + i + kBlock, ahead);
    FN_UNROLL for (int v = 0; v < 2 * vectors; ++v) f(v, V::load(x + i + v * V::width), nullptr);
  }
  for (; i < n; i += kBlock) {
    alignas(64) T rest[kBlock];
    copy_padded(x + i, rest, n - i);
    const uint32_t present = first_bits(n - i);
    FN_UNROLL for (int v = 0; v < vectors; ++v) f(v, V::load(rest + v * V::width), &present);
  }
}

template <class A>
FN_INLINE double sum_run(const Vec<A>* sums) {
  Total total;
  total.add(sums);
  total.add(sums + kVectors<A>);
  return total.sum();
}

template <class T>
void moments_run(const T* x, int64_t n, int64_t ahead, double* mean, double* m2) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const auto only = [](V u, int v, const uint32_t* present) FN_LAMBDA_INLINE {
    return present ? select(from_bits<A>(*present, v % kVectors<A>), u, V(0.0f)) : u;
  };
  V sums[2 * kVectors<A>]{}, deviations[2 * kVectors<A>]{}, squares[2 * kVectors<A>]{};
  const int64_t some = n < kPart * 2 * kBlock ? n : n / kPart / (2 * kBlock) * (2 * kBlock);
  for_run(x, some, 0,
          [&](int v, V u, const uint32_t* present) FN_LAMBDA_INLINE { sums[v] = sums[v] + only(u, v, present); });
  const A centre = static_cast<A>(sum_run(sums) / some);
  // The first pass waits for memory, this one would leave it idle.
  for_run(x, n, ahead, [&](int v, V u, const uint32_t* present) FN_LAMBDA_INLINE {
    const V d = only(u - V(centre), v, present);
    deviations[v] = deviations[v] + d;
    squares[v] = fma(d, d, squares[v]);
  });
  const double offset = sum_run(deviations) / n;
  *mean = centre + offset;
  *m2 = sum_run(squares) - n * offset * offset;
}

FN_INLINE void merge_lanes(double* mean, double* m2, double count, double rows, Vec<double> row_mean,
                           Vec<double> row_m2) {
  using V = Vec<double>;
  const math::Moments<V> merged =
      math::merge<V>({V(count), V::load(mean), V::load(m2)}, {V(rows), row_mean, row_m2}, V(rows / (count + rows)));
  merged.mean.store(mean);
  merged.m2.store(m2);
}
void merge_moments(double count, double* mean, double* m2, double rows, const double* row_mean, const double* row_m2,
                   int64_t cols) {
  using V = Vec<double>;
  for (int64_t i = 0; i < cols; i += V::width) {
    merge_lanes(mean + i, m2 + i, count, rows, V::load(row_mean + i), V::load(row_m2 + i));
  }
}

// Sum of f(values) over n of them, in 8 lanes at every level.
template <class F>
FN_INLINE double fold(const double* values, int64_t n, F f) {
  using V = Vec<double>;
  constexpr int lanes = 8, vectors = lanes / V::width;
  V sums[vectors]{};
  for (int64_t i = 0; i < n; i += lanes) {
    const uint32_t present = first_bits(n - i);
    FN_UNROLL for (int v = 0; v < vectors; ++v) {
      const V x = f(V::load(values + i + v * V::width));
      sums[v] = sums[v] + select(from_bits<double>(present, v), x, V(0.0));
    }
  }
  alignas(64) double all[lanes];
  for (int v = 0; v < vectors; ++v) sums[v].store(all + v * V::width);
  return ((all[0] + all[4]) + (all[2] + all[6])) + ((all[1] + all[5]) + (all[3] + all[7]));
}
void fold_moments(double rows, const double* mean, const double* m2, int64_t repeat, int64_t channels,
                  double* channel_mean, double* channel_m2) {
  using V = Vec<double>;
  for (int64_t c = 0; c < channels; ++c, mean += repeat, m2 += repeat) {
    const V centre(fold(mean, repeat, [](V x) FN_LAMBDA_INLINE { return x; }) / static_cast<double>(repeat));
    const double squares = fold(mean, repeat, [&](V x) FN_LAMBDA_INLINE { return (x - centre) * (x - centre); });
    channel_mean[c] = centre.raw[0];
    channel_m2[c] = fold(m2, repeat, [](V x) FN_LAMBDA_INLINE { return x; }) + rows * squares;
  }
}
void fold_sums(const double* columns, int64_t repeat, int64_t channels, double* sums) {
  using V = Vec<double>;
  for (int64_t c = 0; c < channels; ++c, columns += repeat) {
    sums[c] += fold(columns, repeat, [](V x) FN_LAMBDA_INLINE { return x; });
  }
}

FN_INLINE void merge_lanes(double* mean, double* m2, double count, double rows, Vec<double> centre,
                           Vec<double> deviations, Vec<double> squares) {
  const Vec<double> offset = deviations * Vec<double>(1.0 / rows);
  merge_lanes(mean, m2, count, rows, centre + offset, squares - Vec<double>(rows) * offset * offset);
}
FN_INLINE void merge_lanes(double* mean, double* m2, double count, double rows, Vec<float> centre,
                           Vec<float> deviations, Vec<float> squares) {
  const DoublePair c = widen(centre), d = widen(deviations), s = widen(squares);
  merge_lanes(mean, m2, count, rows, c.low, d.low, s.low);
  constexpr int half = Vec<double>::width;
  merge_lanes(mean + half, m2 + half, count, rows, c.high, d.high, s.high);
}

// `width` columns at a time: two blocks read whole cache lines' worth of neighbours from each row.
template <int width, class T>
FN_INLINE void moments_of_columns(const T* x, int64_t rows, int64_t ld, int64_t ahead, double count, double* mean,
                                  double* m2) {
  using V = Vec<opmath_t<T>>;
  constexpr int n = width / V::width;
  V centre[n]{}, deviations[n]{}, squares[n]{};
  const int64_t some = (rows + kPart - 1) / kPart;
  for (int64_t row = 0; row < some; ++row) {
    FN_UNROLL for (int v = 0; v < n; ++v) centre[v] = centre[v] + V::load(x + row * ld + v * V::width);
  }
  FN_UNROLL for (int v = 0; v < n; ++v) centre[v] = centre[v] * V(1.0 / some);
  for (int64_t row = 0; row < rows; ++row) {
    FN_UNROLL for (int i = 0; i < width; i += kBlock) fetch_block(x + row * ld + i, ahead);
    FN_UNROLL for (int v = 0; v < n; ++v) {
      const V d = V::load(x + row * ld + v * V::width) - centre[v];
      deviations[v] = deviations[v] + d;
      squares[v] = fma(d, d, squares[v]);
    }
  }
  for (int v = 0; v < n; ++v) {
    const int64_t j = v * V::width;
    merge_lanes(mean + j, m2 + j, count, static_cast<double>(rows), centre[v], deviations[v], squares[v]);
  }
}

template <class T>
void moments_columns(const T* x, int64_t rows, int64_t cols, int64_t ldx, int64_t ahead, double count, double* mean,
                     double* m2) {
  int64_t i = 0;
  for (; i + 2 * kBlock <= cols; i += 2 * kBlock) {
    moments_of_columns<2 * kBlock>(x + i, rows, ldx, ahead, count, mean + i, m2 + i);
  }
  for (; i < cols; i += kBlock) {
    if (cols - i >= kBlock) {
      moments_of_columns<kBlock>(x + i, rows, ldx, ahead, count, mean + i, m2 + i);
    } else {
      alignas(64) T rest[kMaxTileRows * kBlock];
      for (int64_t row = 0; row < rows; ++row) copy_padded(x + i + row * ldx, rest + row * kBlock, cols - i);
      moments_of_columns<kBlock>(rest, rows, kBlock, 0, count, mean + i, m2 + i);
    }
  }
}

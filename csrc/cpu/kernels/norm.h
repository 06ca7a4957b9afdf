// The norm with the activation and the noise in bits behind it: forward, and the two passes of backward.

// What a kernel does with bits. Where a derivative is a bit, too, most layers have none, and feel the instructions.
enum class Bits {
  none,   // everything is kept, nothing saved
  noise,  // what is kept
  saved,  // backward: what forward saved, the activation's derivative among it
};
template <class Arguments>
FN_INLINE bool keeps_everything(const Arguments& q) {
  return !q.keep && q.multiplier == 1;
}

// ---- forward: y = activation((x - mean) * scale + shift) * multiplier where kept
template <class T, class Activation, Span span, Bits kind>
FN_INLINE void apply_rows(const Apply<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const math::Parameters<A> parameters{q.activation[0], q.activation[1]};
  const V multiplier(q.multiplier);
  const bool noise = kind != Bits::none && (Activation::one_bit || !keeps_everything(q));
  Results<T> results(q.past, q.y, q.ldy, q.cols, !q.keep && !q.save && q.x != q.y);
  for (int64_t row = 0; row < q.rows; ++row) {
    const Channel<span, A> channel(q.affine, row);
    const uint32_t* bits = q.keep ? q.keep + row * q.ldkeep : nullptr;
    uint32_t* save = q.save ? q.save + row * q.ldsave : nullptr;
    results.to_row(q.y + row * q.ldy);
    for (int64_t done = 0; done < q.cols;) {
      const auto piece = results.piece(done);
      const int64_t i = piece.column;
      Block<T> in;
      const T* x = in.at(q.x + row * q.ldx + i, q.cols - i, q.ahead);
      const uint32_t keep = bits ? bits[i / kBlock] : ~0u;
      uint32_t saved = 0;
      V values[kVectors<A>];
      for_vectors<kUnrolled<A, Activation>, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const V z = channel.normalize(V::load(x + v * V::width), i + v * V::width);
        values[v] = Activation::value(z, parameters);
        if (noise) {
          const Mask<A> kept = from_bits<A>(keep, v);
          // A multiplication, not a selection: a dropped infinity is NaN, as in the unfused composition.
          values[v] = values[v] * select(kept, multiplier, V(0.0f));
          if constexpr (Activation::one_bit) {
            saved |= to_bits(both(kept, Activation::passes(z, parameters))) << (v * V::width);
          }
        }
      });
      results.store(values, done, piece);
      if (kind != Bits::none && save) save[i / kBlock] = Activation::one_bit ? saved : keep;
      done = piece.end;
    }
  }
}

template <class T, class Activation, Span span>
void apply(const Apply<T>& q) {
  if constexpr (Activation::one_bit) {
    if (keeps_everything(q) && !q.save) return apply_rows<T, Activation, span, Bits::none>(q);
  }
  apply_rows<T, Activation, span, Bits::noise>(q);
}

// ---- backward: dz = g * multiplier * activation'(z) where kept
// A gradient that is not finite gives 0 where its element was dropped.
template <class T, class Activation, Span span, Bits kind>
struct LocalGradient {
  using A = opmath_t<T>;
  math::Parameters<A> parameters;
  Channel<span, A> channel;
  Vec<A> multiplier;
  FN_INLINE explicit LocalGradient(const Backward<T>& q)
      : parameters{q.activation[0], q.activation[1]}, channel(q.affine, 0), multiplier(q.multiplier) {}

  template <class Index>
  FN_INLINE Vec<A> operator()(int64_t column, Vec<A> x, Vec<A> g, uint32_t keep, Index v) const {
    Vec<A> dz = kind == Bits::none ? g : g * multiplier;
    if constexpr (kind != Bits::saved) dz = Activation::gradient(channel.normalize(x, column), dz, parameters);
    if constexpr (kind == Bits::none) return dz;
    return select(from_bits<A>(keep, v), dz, Vec<A>(0.0f));
  }
};

// f(kind) for what the arguments say of bits.
template <class Activation, class T, class F>
FN_INLINE void for_bits(const Backward<T>& q, F f) {
  if constexpr (Activation::one_bit) {
    if (keeps_everything(q)) return f(std::integral_constant<Bits, Bits::none>{});
    if (q.keep_is_saved) return f(std::integral_constant<Bits, Bits::saved>{});
  }
  f(std::integral_constant<Bits, Bits::noise>{});
}

// Sums of one block's lanes in opmath type, moved to double before they have grown long: the sums cancel.
constexpr int kShortSum = 16;
template <class A>
struct Sums {
  Vec<A> dz[kVectors<A>], dz_xmu[kVectors<A>];
};

template <class T, class Activation, Span span, Bits kind>
FN_INLINE void sums_block(const LocalGradient<T, Activation, span, kind>& local, int64_t column, const T* x, const T* g,
                          uint32_t keep, Sums<opmath_t<T>>& sums) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  for_vectors<kUnrolled<A, Activation>, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
    const int64_t i = column + v * V::width;
    const V xv = V::load(x + v * V::width);
    const V dz = local(i, xv, V::load(g + v * V::width), keep, v);
    sums.dz[v] = sums.dz[v] + dz;
    // dz may be 0 because it was dropped while x is infinite: such an x has already made the statistics NaN.
    sums.dz_xmu[v] = fma(dz, xv - local.channel.mean[i], sums.dz_xmu[v]);
  });
}

template <class A>
FN_INLINE void add_sums(const Sums<A>& sums, double* dz, double* dz_xmu) {
  for (int v = 0; v < kVectors<A>; ++v) {
    add_lanes(dz + v * Vec<A>::width, sums.dz[v]);
    add_lanes(dz_xmu + v * Vec<A>::width, sums.dz_xmu[v]);
  }
}

template <class T, class Activation, Bits kind>
FN_INLINE void sums_run(const Backward<T>& q) {
  const LocalGradient<T, Activation, kRun, kind> local(q);
  Total dz, dz_xmu;
  for (int64_t first = 0; first < q.cols; first += kShortSum * kBlock) {
    Sums<opmath_t<T>> sums{};
    const int64_t last = q.cols - first < kShortSum * kBlock ? q.cols : first + kShortSum * kBlock;
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<T> in, gradient;
      const uint32_t keep = (q.keep ? q.keep[i / kBlock] : ~0u) & first_bits(rest);
      sums_block(local, 0, in.at(q.x + i, rest, q.aheadx), gradient.at(q.g + i, rest, q.aheadg), keep, sums);
    }
    dz.add(sums.dz);
    dz_xmu.add(sums.dz_xmu);
  }
  *q.sum_dz += dz.sum();
  *q.sum_dz_xmu += dz_xmu.sum();
}

template <class T, class Activation, Bits kind>
FN_INLINE void sums_columns(const Backward<T>& q) {
  const LocalGradient<T, Activation, kColumns, kind> local(q);
  for (int64_t first = 0; first < q.rows; first += kShortSum) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Sums<opmath_t<T>> sums{};
      for (int64_t row = first; row < q.rows && row < first + kShortSum; ++row) {
        Block<T> in, gradient;
        const uint32_t keep = (q.keep ? q.keep[row * q.ldkeep + i / kBlock] : ~0u) & first_bits(rest);
        const T* x = in.at(q.x + row * q.ldx + i, rest, q.aheadx);
        const T* g = gradient.at(q.g + row * q.ldg + i, rest, q.aheadg);
        sums_block(local, i, x, g, keep, sums);
      }
      add_sums(sums, q.sum_dz + i, q.sum_dz_xmu + i);  // padded to 32, like every per-channel vector
    }
  }
}

template <class T, class Activation, Span span>
void gradient_sums(const Backward<T>& q) {
  for_bits<Activation>(q, [&](auto kind) FN_LAMBDA_INLINE {
    if constexpr (span == kRun) sums_run<T, Activation, kind>(q);
    if constexpr (span == kColumns) sums_columns<T, Activation, kind>(q);
  });
}

template <class T, class Activation, Span span, Bits kind>
FN_INLINE void input_gradient_rows(const Backward<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const LocalGradient<T, Activation, span, kind> local(q);
  const bool depends_on_x = q.b != nullptr;
  const PerChannel<span, A> a(q.a, 0), b(depends_on_x ? q.b : q.a, 0), c(q.c, 0);
  Results<T> results(q.past, q.dx, q.lddx, q.cols, !q.keep && q.g != q.dx && q.x != q.dx);
  for (int64_t row = 0; row < q.rows; ++row) {
    const uint32_t* bits = q.keep ? q.keep + row * q.ldkeep : nullptr;
    results.to_row(q.dx + row * q.lddx);
    for (int64_t done = 0; done < q.cols;) {
      const auto piece = results.piece(done);
      const int64_t i = piece.column, rest = q.cols - i;
      Block<T> in, gradient;
      const T* x = in.at(q.x + row * q.ldx + i, rest, q.aheadx);
      const T* g = gradient.at(q.g + row * q.ldg + i, rest, q.aheadg);
      const uint32_t keep = bits ? bits[i / kBlock] : ~0u;
      V values[kVectors<A>];
      for_vectors<kUnrolled<A, Activation>, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const int64_t j = i + v * V::width;
        const V xv = V::load(x + v * V::width);
        const V dz = local(j, xv, V::load(g + v * V::width), keep, v);
        values[v] =
            depends_on_x ? math::apply_input_gradient(dz, xv - local.channel.mean[j], a[j], b[j], c[j]) : a[j] * dz;
      });
      results.store(values, done, piece);
      done = piece.end;
    }
  }
}

template <class T, class Activation, Span span>
void input_gradient(const Backward<T>& q) {
  for_bits<Activation>(q, [&](auto kind) FN_LAMBDA_INLINE { input_gradient_rows<T, Activation, span, kind>(q); });
}

// The other stages, elementwise over rows that may be far apart: additions, activations and noise that the norm's
// kernels do not take along, noise alone, and storage types to and from the opmath type.

// An activation's parameters: numbers, or for PReLU a vector of lanes.
template <class A, class Activation, Span span>
struct StageParameters {
  math::Parameters<A> numbers;
  FN_INLINE StageParameters(const Elementwise<A>& q, int64_t) : numbers{q.activation[0], q.activation[1]} {}
  FN_INLINE const math::Parameters<A>& operator[](int64_t) const { return numbers; }
};
template <class A, Span span>
struct StageParameters<A, math::Prelu, span> {
  PerChannel<span, A> slope;
  FN_INLINE StageParameters(const Elementwise<A>& q, int64_t row) : slope(q.act_weight, row) {}
  FN_INLINE math::Parameters<Vec<A>> operator[](int64_t column) const { return {slope[column], slope[column]}; }
};

// A block's factors: one for all, bits, or floats. What a kernel reads in its loops are values of its own: it would
// have to read arguments again behind every store.
enum FactorKind { kOne, kBits, kFloats };
template <class A, FactorKind kind>
struct Factor {
  const float* m;
  uint32_t keep;
  Vec<A> multiplier;
  template <class Arguments>
  FN_INLINE Factor(const Arguments& q, int64_t row, int64_t i, Block<float>& rest)
      : m(kind == kFloats ? rest.at(q.m + row * q.ldm + i, q.cols - i) : nullptr),
        keep(kind == kBits ? q.keep[row * q.ldkeep + i / kBlock] : ~0u),
        multiplier(q.multiplier) {}
  template <class Index>
  FN_INLINE Vec<A> operator[](Index v) const {
    if constexpr (kind == kFloats) return load_floats<A>(m + v * Vec<A>::width);
    if constexpr (kind == kBits) return select(from_bits<A>(keep, v), multiplier, Vec<A>(0.0f));
    return multiplier;
  }
  // A gradient that is not finite gives 0 where its element was dropped.
  template <class Index>
  FN_INLINE Vec<A> gradient(Vec<A> g, Index v) const {
    if constexpr (kind == kBits) return select(from_bits<A>(keep, v), g * multiplier, Vec<A>(0.0f));
    return g * (*this)[v];
  }
};
// f(kind) for the kind of factor in the arguments.
template <class Arguments, class F>
FN_INLINE void for_factor(const Arguments& q, F f) {
  if (q.m) {
    f(std::integral_constant<FactorKind, kFloats>{});
  } else if (q.keep) {
    f(std::integral_constant<FactorKind, kBits>{});
  } else {
    f(std::integral_constant<FactorKind, kOne>{});
  }
}

template <class A, class Activation, Span span, FactorKind kind>
FN_INLINE void stage_value_rows(const Elementwise<A>& q) {
  using V = Vec<A>;
  const bool first = q.factor_first;
  Results<A> results(q.past, q.y, q.ldy, q.cols, kind == kOne && !q.save && q.x != q.y);
  for (int64_t row = 0; row < q.rows; ++row) {
    const StageParameters<A, Activation, span> parameters(q, row);
    results.to_row(q.y + row * q.ldy);
    for (int64_t done = 0; done < q.cols;) {
      const auto piece = results.piece(done);
      const int64_t i = piece.column, rest = q.cols - i;
      Block<A> in, more;
      V values[kVectors<A>];
      const A* x = in.at(q.x + row * q.ldx + i, rest, q.ahead);
      const A* add = q.add ? more.at(q.add + row * q.ldadd + i, rest, q.aheadadd) : nullptr;
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      uint32_t saved = 0;
      for_vectors<kUnrolled<A, Activation>, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        V z = V::load(x + v * V::width);
        if (add) z = z + V::load(add + v * V::width);
        if (first) z = z * factor[v];
        const auto p = parameters[i + v * V::width];
        values[v] = Activation::value(z, p);
        if (!first) values[v] = values[v] * factor[v];
        if constexpr (Activation::one_bit) {
          saved |= to_bits(both(from_bits<A>(factor.keep, v), Activation::passes(z, p))) << (v * V::width);
        }
      });
      results.store(values, done, piece);
      if (q.save) q.save[row * q.ldsave + i / kBlock] = Activation::one_bit ? saved : factor.keep;
      done = piece.end;
    }
  }
}

template <class A, class Activation, Span span>
void stage_value(const Elementwise<A>& q) {
  for_factor(q, [&](auto kind) FN_LAMBDA_INLINE { stage_value_rows<A, Activation, span, kind>(q); });
}

template <class A, class Activation, Span span, FactorKind kind>
FN_INLINE void stage_gradient_rows(const Elementwise<A>& q) {
  using V = Vec<A>;
  const bool first = q.factor_first;
  Results<A> results(q.past, q.y, q.ldy, q.cols, kind == kOne && q.x != q.y && q.g != q.y);
  for (int64_t row = 0; row < q.rows; ++row) {
    const StageParameters<A, Activation, span> parameters(q, row);
    results.to_row(q.y + row * q.ldy);
    for (int64_t done = 0; done < q.cols;) {
      const auto piece = results.piece(done);
      const int64_t i = piece.column, rest = q.cols - i;
      Block<A> in, gradient;
      V values[kVectors<A>];
      const A* x = in.at(q.x + row * q.ldx + i, rest, q.ahead);
      const A* g = gradient.at(q.g + row * q.ldg + i, rest, q.aheadg);
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      for_vectors<kUnrolled<A, Activation>, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const V z = V::load(x + v * V::width), dy = factor.gradient(V::load(g + v * V::width), v);
        // The factor is linear: it does not matter on which side of the activation's gradient it comes.
        values[v] = Activation::gradient(first ? z * factor[v] : z, dy, parameters[i + v * V::width]);
      });
      results.store(values, done, piece);
      done = piece.end;
    }
  }
}

template <class A, class Activation, Span span>
void stage_gradient(const Elementwise<A>& q) {
  for_factor(q, [&](auto kind) FN_LAMBDA_INLINE { stage_gradient_rows<A, Activation, span, kind>(q); });
}

// Straight to double: these sums are rare.
template <class A, Span span>
void weight_sums(const Elementwise<A>& q) {
  using V = Vec<A>;
  Total total;
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      Block<A> in, gradient;
      const A* x = in.at(q.x + row * q.ldx + i, q.cols - i);
      const A* g = gradient.at(q.g + row * q.ldg + i, q.cols - i);
      V block[kVectors<A>];
      FN_UNROLL for (int v = 0; v < kVectors<A>; ++v) {
        block[v] = math::Prelu::weight_gradient(V::load(x + v * V::width), V::load(g + v * V::width));
      }
      if (span == kRun) total.add(block);
      for (int v = 0; span == kColumns && v < kVectors<A>; ++v) add_lanes(q.sum + i + v * V::width, block[v]);
    }
  }
  if (span == kRun) *q.sum += total.sum();
}

template <class T, FactorKind kind>
FN_INLINE void scale_rows(const Scale<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  Results<T> results(q.past, q.y, q.ldy, q.cols, kind == kOne && q.x != q.y);
  for (int64_t row = 0; row < q.rows; ++row) {
    results.to_row(q.y + row * q.ldy);
    for (int64_t done = 0; done < q.cols;) {
      const auto piece = results.piece(done);
      const int64_t i = piece.column;
      Block<T> in;
      V values[kVectors<A>];
      const T* x = q.x ? in.at(q.x + row * q.ldx + i, q.cols - i) : nullptr;
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      for_vectors<true, kVectors<A>>(
          [&](auto v) FN_LAMBDA_INLINE { values[v] = (x ? V::load(x + v * V::width) : V(1.0f)) * factor[v]; });
      results.store(values, done, piece);
      done = piece.end;
    }
  }
}

template <class T>
void scale(const Scale<T>& q) {
  for_factor(q, [&](auto kind) FN_LAMBDA_INLINE { scale_rows<T, kind>(q); });
}

template <class From, class To>
void convert(const From* x, int64_t ldx, int64_t ahead, To* y, int64_t ldy, int64_t rows, int64_t cols, bool past) {
  using A = opmath_t<To>;
  using V = Vec<A>;
  Results<To> results(past, y, ldy, cols, true);
  for (int64_t row = 0; row < rows; ++row) {
    results.to_row(y + row * ldy);
    for (int64_t done = 0; done < cols;) {
      const auto piece = results.piece(done);
      Block<From> in;
      const From* from = in.at(x + row * ldx + piece.column, cols - piece.column, ahead);
      V values[kVectors<A>];
      FN_UNROLL for (int v = 0; v < kVectors<A>; ++v) values[v] = V::load(from + v * V::width);
      results.store(values, done, piece);
      done = piece.end;
    }
  }
}

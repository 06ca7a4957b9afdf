// The kernels, once for every level. A kernel walks its tile in blocks of 32 columns, one word of bits each; a block is
// 32 / width vectors. The columns left over go through a padded copy, so there is no scalar code, and a value's bits do
// not depend on where in a tile it stood.

#include "../math/activations.h"
#include "../math/noise.h"
#include "../math/norm.h"

namespace fusednorm::cpu::FN_LEVEL {
namespace {

using math::Seed;
#include "simd.h"

}  // namespace
}  // namespace fusednorm::cpu::FN_LEVEL

namespace fusednorm::math {
namespace {
template <class A>
struct Lanes<cpu::FN_LEVEL::Vec<A>> {
  using element = A;
  using mask = cpu::FN_LEVEL::Mask<A>;
};
}  // namespace
}  // namespace fusednorm::math

namespace fusednorm::cpu::FN_LEVEL {
namespace {

constexpr int kBlock = 32;
template <class A>
constexpr int kVectors = kBlock / Vec<A>::width;  // of a block

#define FN_UNROLL _Pragma("GCC unroll 16")

// Runs f(v) for every vector of a block: unrolled, v a constant, where the body is a few instructions; a loop where it
// is an exponential, whose code would only grow.
template <class F, int... v>
FN_INLINE void for_each_of(std::integer_sequence<int, v...>, F f) {
  (f(Constant<v>{}), ...);
}
template <bool unrolled, int n, class F>
FN_INLINE void for_vectors(F f) {
  if constexpr (unrolled) {
    for_each_of(std::make_integer_sequence<int, n>{}, f);
  } else {
    _Pragma("GCC unroll 1") for (int v = 0; v < n; ++v) f(v);
  }
}

// A per-channel vector: one entry for the whole run, held in a register, or an entry per column.
template <Span span, class A>
struct PerChannel {
  Vec<A> value;
  FN_INLINE explicit PerChannel(const A* p) : value(p ? *p : A(0)) {}
  FN_INLINE Vec<A> operator[](int64_t) const { return value; }
};
template <class A>
struct PerChannel<kColumns, A> {
  const A* p;
  FN_INLINE explicit PerChannel(const A* pointer) : p(pointer) {}
  FN_INLINE Vec<A> operator[](int64_t column) const { return Vec<A>::load(p + column); }
};
template <Span span, class A>
struct Channel {
  PerChannel<span, A> mean, scale, shift;
  FN_INLINE explicit Channel(const Affine<A>& q) : mean(q.mean), scale(q.scale), shift(q.shift) {}
  FN_INLINE Vec<A> normalize(Vec<A> x, int64_t column) const {
    return math::normalize(x, mean[column], scale[column], shift[column]);
  }
};

template <class T>
FN_INLINE void copy_padded(const T* from, T* to, int64_t n, T fill = T{}) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = i < n ? from[i] : fill;
}
template <class T>
FN_INLINE void copy_out(const T* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// A block's pointers, or padded copies of what is there.
template <class T>
struct Block {
  alignas(64) T padded[kBlock];
  FN_INLINE const T* at(const T* p, int64_t rest) {
    if (rest >= kBlock) return p;
    copy_padded(p, padded, rest);
    return padded;
  }
};

FN_INLINE uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// ---- forward: y = activation((x - mean) * scale + shift) * multiplier where kept
// ----------------------------------------
template <class T, class Activation, Span span>
void apply(const Apply<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const math::Parameters<A> parameters{q.activation[0], q.activation[1]};
  const Channel<span, A> channel(q.affine);
  const V multiplier(q.multiplier);
  for (int64_t row = 0; row < q.rows; ++row) {
    const uint32_t* bits = q.keep ? q.keep + row * q.ldkeep : nullptr;
    uint32_t* save = q.save ? q.save + row * q.ldsave : nullptr;
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<T> in;
      alignas(64) T out[kBlock];
      const T* x = in.at(q.x + row * q.ldx + i, rest);
      T* y = rest < kBlock ? out : q.y + row * q.ldy + i;
      const uint32_t keep = bits ? bits[i / kBlock] : ~0u;
      uint32_t saved = 0;
      for_vectors<Activation::one_bit, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const V z = channel.normalize(V::load(x + v * V::width), i + v * V::width);
        const Mask<A> kept = from_bits<A>(keep, v);
        // A multiplication, not a selection: a dropped infinity is NaN, as in the unfused composition.
        (Activation::value(z, parameters) * select(kept, multiplier, V(0.0f))).store(y + v * V::width);
        if constexpr (Activation::one_bit) {
          saved |= to_bits(both(kept, Activation::passes(z, parameters))) << (v * V::width);
        }
      });
      if (save) save[i / kBlock] = Activation::one_bit ? saved : keep;
      if (rest < kBlock) copy_out(out, q.y + row * q.ldy + i, rest);
    }
  }
}

// ---- backward
// ------------------------------------------------------------------------------------------------------------ dz = g *
// multiplier * activation'(z) where kept. A gradient that is not finite gives 0 where its element was dropped.
template <class T, class Activation, Span span, bool keep_is_saved>
struct LocalGradient {
  using A = opmath_t<T>;
  math::Parameters<A> parameters;
  Channel<span, A> channel;
  Vec<A> multiplier;
  FN_INLINE explicit LocalGradient(const Backward<T>& q)
      : parameters{q.activation[0], q.activation[1]}, channel(q.affine), multiplier(q.multiplier) {}

  template <class Index>
  FN_INLINE Vec<A> operator()(int64_t column, Vec<A> x, Vec<A> g, uint32_t keep, Index v) const {
    Vec<A> dz = g * multiplier;
    if constexpr (!(Activation::one_bit && keep_is_saved)) {
      dz = Activation::gradient(channel.normalize(x, column), dz, parameters);
    }
    return select(from_bits<A>(keep, v), dz, Vec<A>(0.0f));
  }
};

// Sums of one block's lanes in opmath type, moved to double before they have grown long: the sums cancel.
constexpr int kShortSum = 16;
template <class A>
struct Sums {
  Vec<A> dz[kVectors<A>], dz_xmu[kVectors<A>];
};

template <class T, class Activation, Span span, bool keep_is_saved>
FN_INLINE void sums_block(const LocalGradient<T, Activation, span, keep_is_saved>& local, int64_t column, const T* x,
                          const T* g, uint32_t keep, Sums<opmath_t<T>>& sums) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  for_vectors<Activation::one_bit, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
    const int64_t i = column + v * V::width;
    const V xv = V::load(x + v * V::width);
    const V dz = local(i, xv, V::load(g + v * V::width), keep, v);
    sums.dz[v] = sums.dz[v] + dz;
    // dz may be 0 because it was dropped while x is infinite: such an x has already made the statistics NaN.
    sums.dz_xmu[v] = fma(dz, xv - local.channel.mean[i], sums.dz_xmu[v]);
  });
}

FN_INLINE void add_lanes(double* to, Vec<double> a) { (Vec<double>::load(to) + a).store(to); }
FN_INLINE void add_lanes(double* to, Vec<float> a) {
  const DoublePair d = widen(a);
  add_lanes(to, d.low);
  add_lanes(to + Vec<double>::width, d.high);
}

// Sum of 32 lanes, always in the same tree.
FN_INLINE double sum_lanes(double* lanes) {
  for (int half = kBlock / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class A>
FN_INLINE void add_sums(const Sums<A>& sums, double* dz, double* dz_xmu) {
  for (int v = 0; v < kVectors<A>; ++v) {
    add_lanes(dz + v * Vec<A>::width, sums.dz[v]);
    add_lanes(dz_xmu + v * Vec<A>::width, sums.dz_xmu[v]);
  }
}

template <class T, class Activation, bool keep_is_saved>
FN_INLINE void sums_run(const Backward<T>& q) {
  const LocalGradient<T, Activation, kRun, keep_is_saved> local(q);
  alignas(64) double dz[kBlock] = {}, dz_xmu[kBlock] = {};
  for (int64_t first = 0; first < q.cols; first += kShortSum * kBlock) {
    Sums<opmath_t<T>> sums{};
    const int64_t last = q.cols - first < kShortSum * kBlock ? q.cols : first + kShortSum * kBlock;
    for (int64_t i = first; i < last; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<T> in, gradient;
      const uint32_t keep = (q.keep ? q.keep[i / kBlock] : ~0u) & first_bits(rest);
      sums_block(local, 0, in.at(q.x + i, rest), gradient.at(q.g + i, rest), keep, sums);
    }
    add_sums(sums, dz, dz_xmu);
  }
  *q.sum_dz += sum_lanes(dz);
  *q.sum_dz_xmu += sum_lanes(dz_xmu);
}

template <class T, class Activation, bool keep_is_saved>
FN_INLINE void sums_columns(const Backward<T>& q) {
  const LocalGradient<T, Activation, kColumns, keep_is_saved> local(q);
  for (int64_t first = 0; first < q.rows; first += kShortSum) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Sums<opmath_t<T>> sums{};
      for (int64_t row = first; row < q.rows && row < first + kShortSum; ++row) {
        Block<T> in, gradient;
        const uint32_t keep = (q.keep ? q.keep[row * q.ldkeep + i / kBlock] : ~0u) & first_bits(rest);
        sums_block(local, i, in.at(q.x + row * q.ldx + i, rest), gradient.at(q.g + row * q.ldg + i, rest), keep, sums);
      }
      add_sums(sums, q.sum_dz + i, q.sum_dz_xmu + i);  // padded to 32, like every per-channel vector
    }
  }
}

template <class T, class Activation, Span span>
void gradient_sums(const Backward<T>& q) {
  if constexpr (span == kRun) {
    q.keep_is_saved ? sums_run<T, Activation, true>(q) : sums_run<T, Activation, false>(q);
  } else {
    q.keep_is_saved ? sums_columns<T, Activation, true>(q) : sums_columns<T, Activation, false>(q);
  }
}

template <class T, class Activation, Span span, bool keep_is_saved>
FN_INLINE void input_gradient_rows(const Backward<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const LocalGradient<T, Activation, span, keep_is_saved> local(q);
  const bool depends_on_x = q.b != nullptr;
  const PerChannel<span, A> a(q.a), b(depends_on_x ? q.b : q.a), c(q.c);
  for (int64_t row = 0; row < q.rows; ++row) {
    const uint32_t* bits = q.keep ? q.keep + row * q.ldkeep : nullptr;
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<T> in, gradient;
      alignas(64) T out[kBlock];
      const T* x = in.at(q.x + row * q.ldx + i, rest);
      const T* g = gradient.at(q.g + row * q.ldg + i, rest);
      T* dx = rest < kBlock ? out : q.dx + row * q.lddx + i;
      const uint32_t keep = bits ? bits[i / kBlock] : ~0u;
      for_vectors<Activation::one_bit, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const int64_t j = i + v * V::width;
        const V xv = V::load(x + v * V::width);
        const V dz = local(j, xv, V::load(g + v * V::width), keep, v);
        const V result =
            depends_on_x ? math::apply_input_gradient(dz, xv - local.channel.mean[j], a[j], b[j], c[j]) : a[j] * dz;
        result.store(dx + v * V::width);
      });
      if (rest < kBlock) copy_out(out, q.dx + row * q.lddx + i, rest);
    }
  }
}

template <class T, class Activation, Span span>
void input_gradient(const Backward<T>& q) {
  q.keep_is_saved ? input_gradient_rows<T, Activation, span, true>(q)
                  : input_gradient_rows<T, Activation, span, false>(q);
}

// ---- the other stages: elementwise, over rows that may be far apart
// An activation's parameters: numbers, or for PReLU a vector of lanes.
template <class A, class Activation, Span span>
struct StageParameters {
  math::Parameters<A> numbers;
  FN_INLINE explicit StageParameters(const Elementwise<A>& q) : numbers{q.activation[0], q.activation[1]} {}
  FN_INLINE const math::Parameters<A>& operator[](int64_t) const { return numbers; }
};
template <class A, Span span>
struct StageParameters<A, math::Prelu, span> {
  PerChannel<span, A> slope;
  FN_INLINE explicit StageParameters(const Elementwise<A>& q) : slope(q.act_weight) {}
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
  const StageParameters<A, Activation, span> parameters(q);
  const bool first = q.factor_first;
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<A> in, more;
      alignas(64) A out[kBlock];
      const A* x = in.at(q.x + row * q.ldx + i, rest);
      const A* add = q.add ? more.at(q.add + row * q.ldadd + i, rest) : nullptr;
      A* y = rest < kBlock ? out : q.y + row * q.ldy + i;
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      uint32_t saved = 0;
      for_vectors<Activation::one_bit, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        V z = V::load(x + v * V::width);
        if (add) z = z + V::load(add + v * V::width);
        if (first) z = z * factor[v];
        const auto p = parameters[i + v * V::width];
        V value = Activation::value(z, p);
        if (!first) value = value * factor[v];
        value.store(y + v * V::width);
        if constexpr (Activation::one_bit) {
          saved |= to_bits(both(from_bits<A>(factor.keep, v), Activation::passes(z, p))) << (v * V::width);
        }
      });
      if (q.save) q.save[row * q.ldsave + i / kBlock] = Activation::one_bit ? saved : factor.keep;
      if (rest < kBlock) copy_out(out, q.y + row * q.ldy + i, rest);
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
  const StageParameters<A, Activation, span> parameters(q);
  const bool first = q.factor_first;
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<A> in, gradient;
      alignas(64) A out[kBlock];
      const A* x = in.at(q.x + row * q.ldx + i, rest);
      const A* g = gradient.at(q.g + row * q.ldg + i, rest);
      A* y = rest < kBlock ? out : q.y + row * q.ldy + i;
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      for_vectors<Activation::one_bit, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        const V z = V::load(x + v * V::width), m = factor[v], dy = V::load(g + v * V::width) * m;
        // The factor is linear: it does not matter on which side of the activation's gradient it comes.
        Activation::gradient(first ? z * m : z, dy, parameters[i + v * V::width]).store(y + v * V::width);
      });
      if (rest < kBlock) copy_out(out, q.y + row * q.ldy + i, rest);
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
  alignas(64) double lanes[kBlock] = {};
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      Block<A> in, gradient;
      const A* x = in.at(q.x + row * q.ldx + i, q.cols - i);
      const A* g = gradient.at(q.g + row * q.ldg + i, q.cols - i);
      double* to = span == kRun ? lanes : q.sum + i;
      for (int v = 0; v < kVectors<A>; ++v) {
        add_lanes(to + v * V::width,
                  math::Prelu::weight_gradient(V::load(x + v * V::width), V::load(g + v * V::width)));
      }
    }
  }
  if (span == kRun) *q.sum += sum_lanes(lanes);
}

template <class T, FactorKind kind>
FN_INLINE void scale_rows(const Scale<T>& q) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  for (int64_t row = 0; row < q.rows; ++row) {
    for (int64_t i = 0; i < q.cols; i += kBlock) {
      const int64_t rest = q.cols - i;
      Block<T> in;
      alignas(64) T out[kBlock];
      const T* x = q.x ? in.at(q.x + row * q.ldx + i, rest) : nullptr;
      T* y = rest < kBlock ? out : q.y + row * q.ldy + i;
      Block<float> factors;
      const Factor<A, kind> factor(q, row, i, factors);
      for_vectors<true, kVectors<A>>([&](auto v) FN_LAMBDA_INLINE {
        ((x ? V::load(x + v * V::width) : V(1.0f)) * factor[v]).store(y + v * V::width);
      });
      if (rest < kBlock) copy_out(out, q.y + row * q.ldy + i, rest);
    }
  }
}

template <class T>
void scale(const Scale<T>& q) {
  for_factor(q, [&](auto kind) FN_LAMBDA_INLINE { scale_rows<T, kind>(q); });
}

template <class From, class To>
void convert(const From* x, int64_t ldx, To* y, int64_t ldy, int64_t rows, int64_t cols) {
  using V = Vec<std::conditional_t<sizeof(From) == 8, double, float>>;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < cols; i += kBlock) {
      Block<From> in;
      alignas(64) To out[kBlock];
      const From* from = in.at(x + row * ldx + i, cols - i);
      To* to = cols - i < kBlock ? out : y + row * ldy + i;
      FN_UNROLL for (int v = 0; v < kBlock / V::width; ++v) V::load(from + v * V::width).store(to + v * V::width);
      if (cols - i < kBlock) copy_out(out, y + row * ldy + i, cols - i);
    }
  }
}

// ---- statistics: two passes over a tile that sits in the first-level cache
// ------------------------------------------------ The first gives a centre near the mean, the second the deviations d
// from it. With them
//   mean = centre + sum(d)/n,  m2 = sum(d^2) - sum(d)^2/n
// (the corrected two-pass algorithm: Chan, Golub & LeVeque 1983), so the rounding of the first pass does no harm,
// neither a large mean nor an outlier anywhere.
FN_INLINE double widen_one(double x) { return x; }
FN_INLINE float widen_one(float x) { return x; }

// f(v, values, present lanes or null for all) for every vector of n values. Two blocks are in flight: a sum waits some
// cycles for the one before.
template <class T, class F>
FN_INLINE void for_run(const T* x, int64_t n, F f) {
  using V = Vec<opmath_t<T>>;
  constexpr int vectors = kVectors<opmath_t<T>>;
  int64_t i = 0;
  for (; i + 2 * kBlock <= n; i += 2 * kBlock) {
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
  alignas(64) double lanes[kBlock] = {};
  for (int v = 0; v < 2 * kVectors<A>; ++v) add_lanes(lanes + v % kVectors<A> * Vec<A>::width, sums[v]);
  return sum_lanes(lanes);
}

template <class T>
void moments_run(const T* x, int64_t n, double* mean, double* m2) {
  using A = opmath_t<T>;
  using V = Vec<A>;
  const auto only = [](V u, int v, const uint32_t* present) FN_LAMBDA_INLINE {
    return present ? select(from_bits<A>(*present, v % kVectors<A>), u, V(0.0f)) : u;
  };
  V sums[2 * kVectors<A>]{}, deviations[2 * kVectors<A>]{}, squares[2 * kVectors<A>]{};
  for_run(x, n, [&](int v, V u, const uint32_t* present) FN_LAMBDA_INLINE { sums[v] = sums[v] + only(u, v, present); });
  const A centre = static_cast<A>(sum_run(sums) / n);
  for_run(x, n, [&](int v, V u, const uint32_t* present) FN_LAMBDA_INLINE {
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
FN_INLINE void moments_of_columns(const T* x, int64_t rows, int64_t ld, double count, double* mean, double* m2) {
  using V = Vec<opmath_t<T>>;
  constexpr int n = width / V::width;
  V centre[n]{}, deviations[n]{}, squares[n]{};
  for (int64_t row = 0; row < rows; ++row) {
    FN_UNROLL for (int v = 0; v < n; ++v) centre[v] = centre[v] + V::load(x + row * ld + v * V::width);
  }
  FN_UNROLL for (int v = 0; v < n; ++v) centre[v] = centre[v] * V(1.0 / rows);
  for (int64_t row = 0; row < rows; ++row) {
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
void moments_columns(const T* x, int64_t rows, int64_t cols, int64_t ldx, double count, double* mean, double* m2) {
  int64_t i = 0;
  for (; i + 2 * kBlock <= cols; i += 2 * kBlock) {
    moments_of_columns<2 * kBlock>(x + i, rows, ldx, count, mean + i, m2 + i);
  }
  for (; i < cols; i += kBlock) {
    if (cols - i >= kBlock) {
      moments_of_columns<kBlock>(x + i, rows, ldx, count, mean + i, m2 + i);
    } else {
      alignas(64) T rest[kMaxTileRows * kBlock];
      for (int64_t row = 0; row < rows; ++row) copy_padded(x + i + row * ldx, rest + row * kBlock, cols - i);
      moments_of_columns<kBlock>(rest, rows, kBlock, count, mean + i, m2 + i);
    }
  }
}

// ---- noise
// -----------------------------------------------------------------------------------------------------------
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

// ---- the table
// --------------------------------------------------------------------------------------------------------
template <class T, Span span, class List>
struct Table;
template <class T, Span span, class... Activations>
struct Table<T, span, math::List<Activations...>> {
  // PReLU is a stage of its own: its parameter may differ from channel to channel.
  template <class Activation>
  using Fused = std::conditional_t<std::is_same_v<Activation, math::Prelu>, math::Identity, Activation>;
  static constexpr void (*forward[])(const Apply<T>&) = {&apply<T, Fused<Activations>, span>...};
  static constexpr void (*sums[])(const Backward<T>&) = {&gradient_sums<T, Fused<Activations>, span>...};
  static constexpr void (*backward[])(const Backward<T>&) = {&input_gradient<T, Fused<Activations>, span>...};
};
template <class T>
constexpr KernelsFor<T> kernels_for() {
  using Run = Table<T, kRun, math::Activations>;
  using Columns = Table<T, kColumns, math::Activations>;
  return {{Run::forward, Columns::forward},
          {Run::sums, Columns::sums},
          {Run::backward, Columns::backward},
          &scale<T>,
          &convert<T, opmath_t<T>>,
          &convert<opmath_t<T>, T>,
          &moments_run<T>,
          &moments_columns<T>};
}

template <class A, Span span, class List>
struct StageTable;
template <class A, Span span, class... Activations>
struct StageTable<A, span, math::List<Activations...>> {
  // Only PReLU tells the spans apart.
  template <class Activation>
  static constexpr Span span_of = std::is_same_v<Activation, math::Prelu> ? span : kRun;
  static constexpr void (*value[])(const Elementwise<A>&) = {&stage_value<A, Activations, span_of<Activations>>...};
  static constexpr void (*gradient[])(const Elementwise<A>&) = {
      &stage_gradient<A, Activations, span_of<Activations>>...};
};
template <class A>
constexpr ElementwiseFor<A> elementwise_for() {
  using Run = StageTable<A, kRun, math::Activations>;
  using Columns = StageTable<A, kColumns, math::Activations>;
  return {{Run::value, Columns::value},
          {Run::gradient, Columns::gradient},
          {&weight_sums<A, kRun>, &weight_sums<A, kColumns>}};
}

}  // namespace
}  // namespace fusednorm::cpu::FN_LEVEL

namespace fusednorm::cpu {
extern constexpr Kernels FN_LEVEL_TABLE = {
    FN_LEVEL_NAME,
    &FN_LEVEL::merge_moments,
    FN_LEVEL::kernels_for<float>(),
    FN_LEVEL::kernels_for<double>(),
    FN_LEVEL::kernels_for<BFloat16>(),
    FN_LEVEL::kernels_for<Float16>(),
    FN_LEVEL::elementwise_for<float>(),
    FN_LEVEL::elementwise_for<double>(),
    &FN_LEVEL::keep_run,
    &FN_LEVEL::keep_columns,
    {FN_LEVEL::uniform_run, FN_LEVEL::gaussian_run},
    {FN_LEVEL::uniform_columns, FN_LEVEL::gaussian_columns},
    &FN_LEVEL::philox_lanes,
};
}  // namespace fusednorm::cpu

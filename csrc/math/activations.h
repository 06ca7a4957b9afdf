// The activations, each a value and its gradient side by side, at the pre-activation z.
//
// A struct gives: `name` (torch.nn.functional's), the number of parameters, `one_bit` (the derivative is 0 or 1, so a
// saved bit can hold it together with the dropout decision), `value(z)`, `gradient(z, g)` = g * value'(z), and for
// one_bit also `passes(z)`: where the derivative is 1. To add one: write it here, add it to Activations, and
// give its torch twin in fusednorm/reference.py.
#pragma once

#include "functions.h"

namespace fusednorm::math {
namespace {

template <class A>
struct Parameters {  // of one activation, in torch's order
  A a, b;
};
template <class V>
using parameters_t = const Parameters<element_t<V>>&;

struct Identity {
  static constexpr const char* name = "identity";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = true;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return z;
  }
  template <class V>
  static FN_INLINE V gradient(V, V g, parameters_t<V>) {
    return g;
  }
  template <class V>
  static FN_INLINE mask_t<V> passes(V z, parameters_t<V>) {
    return negate(less(z, z));
  }
};

// NaN is passed on by the value and by the gradient, as torch does: hence max's order, and "z <= 0", never "z > 0".
struct Relu {
  static constexpr const char* name = "relu";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = true;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return max(V(0.0f), z);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    return select(less_equal(z, V(0.0f)), V(0.0f), g);
  }
  template <class V>
  static FN_INLINE mask_t<V> passes(V z, parameters_t<V>) {
    return negate(less_equal(z, V(0.0f)));
  }
};

struct LeakyRelu {  // a: negative_slope, a number or a vector of lanes
  static constexpr const char* name = "leaky_relu";
  static constexpr int parameters = 1;
  static constexpr bool one_bit = false;
  template <class V, class P>
  static FN_INLINE V value(V z, const P& p) {
    return select(less(V(0.0f), z), z, V(p.a) * z);
  }
  template <class V, class P>
  static FN_INLINE V gradient(V z, V g, const P& p) {
    return select(less(V(0.0f), z), g, V(p.a) * g);
  }
};

// a: the weight, one for all channels or one for each; a tensor, and so not among the parameters that are numbers.
struct Prelu : LeakyRelu {
  static constexpr const char* name = "prelu";
  static constexpr int parameters = 0;
  // The derivative with respect to the weight, times g.
  template <class V>
  static FN_INLINE V weight_gradient(V z, V g) {
    return select(less(V(0.0f), z), V(0.0f), g * z);
  }
};

struct Elu {  // a: alpha
  static constexpr const char* name = "elu";
  static constexpr int parameters = 1;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V> p) {
    return select(less(V(0.0f), z), z, V(p.a) * expm1(z));
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V> p) {
    return g * select(less(V(0.0f), z), V(1.0f), V(p.a) * exp(z));
  }
};

struct Gelu {
  static constexpr const char* name = "gelu";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return z * normal_cdf(z);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    return g * fma(z, normal_pdf(z), normal_cdf(z));
  }
};

// approximate="tanh": (1 + tanh(u)) / 2 is sigmoid(2u), which does not cancel on the left, nor does 1 less it on the
// right.
struct GeluTanh {
  static constexpr const char* name = "gelu_tanh";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  static constexpr double kTwoBeta = 1.59576912160573071176;  // 2 sqrt(2/pi)
  static constexpr double kKappa = 0.044715;
  template <class V>
  static FN_INLINE V complement(V z) {  // e, with sigmoid(2u) = 1 / (1 + e)
    return exp(V(0.0f) - V(kTwoBeta) * fma(V(kKappa) * z * z, z, z));
  }
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return z / (V(1.0f) + complement(z));
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    z = min(V(10.0f), max(V(-10.0f), z));  // constant beyond; e stays finite
    const V e = complement(z);
    const V s = V(1.0f) / (V(1.0f) + e);
    const V inner = V(kTwoBeta) * fma(V(3.0 * kKappa) * z, z, V(1.0f));
    return g * s * fma(z * inner, e * s, V(1.0f));  // e * s is 1 - s, and does not cancel
  }
};

struct Silu {
  static constexpr const char* name = "silu";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return z / (V(1.0f) + exp(V(0.0f) - z));
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    const V s = sigmoid(z);
    return g * s * fma(z, V(1.0f) - s, V(1.0f));
  }
};

struct Tanh {
  static constexpr const char* name = "tanh";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return tanh(z);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    const V t = tanh(z);
    return g * (V(1.0f) - t * t);
  }
};

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return sigmoid(z);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    const V s = sigmoid(z);
    return g * s * (V(1.0f) - s);
  }
};

struct Hardtanh {  // a: min_val, b: max_val
  static constexpr const char* name = "hardtanh";
  static constexpr int parameters = 2;
  static constexpr bool one_bit = true;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V> p) {
    return min(V(p.b), max(V(p.a), z));
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V> p) {
    return select(passes(z, p), g, V(0.0f));
  }
  template <class V>
  static FN_INLINE mask_t<V> passes(V z, parameters_t<V> p) {
    return both(negate(less_equal(z, V(p.a))), negate(less_equal(V(p.b), z)));
  }
};

struct Relu6 {
  static constexpr const char* name = "relu6";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = true;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return Hardtanh::value(z, {0, 6});
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    return Hardtanh::gradient(z, g, {0, 6});
  }
  template <class V>
  static FN_INLINE mask_t<V> passes(V z, parameters_t<V>) {
    return Hardtanh::passes(z, {0, 6});
  }
};

struct Hardswish {
  static constexpr const char* name = "hardswish";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    return z * Hardtanh::value(z + V(3.0f), {0, 6}) * V(1.0 / 6.0);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    // torch's sides: 0 at -3, 1 at 3.
    const V middle = fma(z, V(1.0 / 3.0), V(0.5f));
    return g * select(less_equal(z, V(-3.0f)), V(0.0f), select(less_equal(V(3.0f), z), V(1.0f), middle));
  }
};

// With w = e^z and n = w(w + 2), tanh(softplus(z)) = n / (n + 2): no cancellation on either side. Above 20 it is 1.
struct Mish {
  static constexpr const char* name = "mish";
  static constexpr int parameters = 0;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V>) {
    const V w = exp(min(V(20.0f), z));
    const V n = w * (w + V(2.0f));
    return z * (n / (n + V(2.0f)));
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V>) {
    const V small = min(V(20.0f), z);  // beyond it is 1
    const V w = exp(small);
    const V n = w * (w + V(2.0f));
    const V d = V(1.0f) / (n + V(2.0f));
    const V slope = V(4.0f) * (n + V(1.0f)) * d * d * (w / (w + V(1.0f)));
    return g * fma(small, slope, n * d);
  }
};

struct Softplus {  // a: beta, b: threshold
  static constexpr const char* name = "softplus";
  static constexpr int parameters = 2;
  static constexpr bool one_bit = false;
  template <class V>
  static FN_INLINE V value(V z, parameters_t<V> p) {
    const V x = V(p.a) * z;
    const V positive = max(V(0.0f), x);
    const V y = (positive + log1p_unit(exp(V(0.0f) - abs(x)))) / V(p.a);
    return select(less(V(p.b), x), z, y);
  }
  template <class V>
  static FN_INLINE V gradient(V z, V g, parameters_t<V> p) {
    const V x = V(p.a) * z;
    return g * select(less(V(p.b), x), V(1.0f), sigmoid(x));
  }
};

template <class...>
struct List {};
using Activations = List<Identity, Relu, LeakyRelu, Elu, Gelu, GeluTanh, Silu, Tanh, Sigmoid, Hardtanh, Relu6,
                         Hardswish, Mish, Softplus, Prelu>;

}  // namespace
}  // namespace fusednorm::math

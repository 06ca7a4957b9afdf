// Elementary functions over lanes: exp, expm1, log1p, tanh, sigmoid, the normal distribution, and for normal draws log,
// sin and cos.
//
// float: own polynomials (minimax fits on the stated intervals), the same bits for every vector width, within 3 units
// in the last place of the result (normal_cdf: of 1). double: libm lane by lane.
#pragma once

#include "lane.h"

namespace fusednorm::math {
namespace {

// exp(x) = 2 * (h + h*q), with h = 2^(k-1), k = round(x / ln 2), q = expm1(x - k ln 2).
// h carries half of the power of two, so that results up to the largest float do not overflow on the way.
template <class V>
struct ExpParts {
  V h, q;
};

template <class V>
FN_INLINE ExpParts<V> exp_parts(V x) {
  const V magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that integer in the low bits
  const V t = fma(x, V(1.44269504088896341f), magic);
  const V k = t - magic;
  V r = fma(k, V(-0.693145751953125f), x);  // ln 2 in two pieces: k * the first is exact
  r = fma(k, V(-1.42860682030941723e-6f), r);
  V s(0x1.a1c044p-13f);  // (expm1(r) - r) / r^2 on |r| <= ln(2)/2, fit error 5e-11
  s = fma(s, r, V(0x1.6d9e28p-10f));
  s = fma(s, r, V(0x1.111076p-7f));
  s = fma(s, r, V(0x1.555478p-5f));
  s = fma(s, r, V(0x1.555556p-3f));
  s = fma(s, r, V(0.5f));
  return {power_of_two(t - V(1.0f)), fma(r * r, s, r)};
}

// Saturates where exp_parts has no exponent left, and lets NaN through.
template <class V>
FN_INLINE V clamp_exp(V x, V y, float lowest, float at_lowest) {
  y = select(less(x, V(lowest)), V(at_lowest), y);
  y = select(less(V(88.7228394f), x), V(INFINITY), y);
  return select(less_equal(x, x), y, x);
}

template <class V>
FN_INLINE V exp(V x) {
  if constexpr (is_double<V>) {
    return map(x, [](double a) { return ::exp(a); });
  } else {
    const ExpParts<V> e = exp_parts(x);
    return clamp_exp(x, V(2.0f) * fma(e.h, e.q, e.h), -87.0f, 0.0f);  // denormal results are flushed
  }
}

template <class V>
FN_INLINE V expm1(V x) {
  if constexpr (is_double<V>) {
    return map(x, [](double a) { return ::expm1(a); });
  } else {
    const ExpParts<V> e = exp_parts(x);
    return clamp_exp(x, V(2.0f) * fma(e.h, e.q, e.h - V(0.5f)), -18.0f, -1.0f);
  }
}

// log(1 + u) for 0 <= u <= 1: 2 atanh(u / (2 + u)), whose argument stays under 1/3.
template <class V>
FN_INLINE V log1p_unit(V u) {
  if constexpr (is_double<V>) {
    return map(u, [](double a) { return ::log1p(a); });
  } else {
    const V t = u / (V(2.0f) + u);
    const V s = t * t;
    V q(0x1.f1aee2p-4f);  // (atanh(t)/t - 1) / t^2 on t <= 1/3, fit error 1e-10
    q = fma(q, s, V(0x1.b6d6a4p-4f));
    q = fma(q, s, V(0x1.250972p-3f));
    q = fma(q, s, V(0x1.9996a8p-3f));
    q = fma(q, s, V(0x1.555558p-2f));
    return V(2.0f) * fma(t * s, q, t);
  }
}

// log(u) of a normal float u in (0, 1], never above 0, to 2e-7 of the result: from a factor near 1 on either side, so
// that nothing cancels where u is near 1. Without the division of log1p_unit.
template <class V>
FN_INLINE V log_unit(V u) {
  V e;
  const V f = split_exponent(u, e);
  const mask_t<V> high = less(V(1.41421354f), f);
  const V x = select(high, V(0.5f) * f, f) - V(1.0f);
  V p(7.0376836292e-2f);  // (log(1 + x) - x + x^2/2) / x^3 on sqrt(1/2) <= 1 + x <= sqrt(2) (Cephes, logf)
  p = exact_fma(p, x, V(-1.1514610310e-1f));
  p = exact_fma(p, x, V(1.1676998740e-1f));
  p = exact_fma(p, x, V(-1.2420140846e-1f));
  p = exact_fma(p, x, V(1.4249322787e-1f));
  p = exact_fma(p, x, V(-1.6668057665e-1f));
  p = exact_fma(p, x, V(2.0000714765e-1f));
  p = exact_fma(p, x, V(-2.4999993993e-1f));
  p = exact_fma(p, x, V(3.3333331174e-1f));
  const V y = exact_fma(x * x, exact_fma(x, p, V(-0.5f)), x);
  return exact_fma(select(high, e + V(1.0f), e), V(0.693147180559945309f), y);
}

// sin and cos of pi*x for a float -1 <= x <= 1, to 2e-7. Folded to |y| <= 1/2 with y = 1/2 - |x|.
template <class V>
FN_INLINE void sincos_pi(V x, V& sine, V& cosine) {
  const V y = V(0.5f) - abs(x);
  const V s = y * y;
  V p(0x1.3e15f6p-4f);  // sin(pi y) / y
  p = exact_fma(p, s, V(-0x1.32533cp-1f));
  p = exact_fma(p, s, V(0x1.4668f0p+1f));
  p = exact_fma(p, s, V(-0x1.4abbc4p+2f));
  p = exact_fma(p, s, V(0x1.921fb6p+1f));
  V q(-0x1.8fb59ap-6f);  // cos(pi y)
  q = exact_fma(q, s, V(0x1.e126d0p-3f));
  q = exact_fma(q, s, V(-0x1.55d074p+0f));
  q = exact_fma(q, s, V(0x1.03c1e4p+2f));
  q = exact_fma(q, s, V(-0x1.3bd3ccp+2f));
  q = exact_fma(q, s, V(1.0f));
  cosine = p * y;
  sine = copy_sign(q, x);
}

// Through expm1(2|x|), which keeps small arguments exact; beyond 9.1 the result rounds to 1.
template <class V>
FN_INLINE V tanh(V x) {
  if constexpr (is_double<V>) {
    return map(x, [](double a) { return ::tanh(a); });
  } else {
    const V a = abs(x);
    const ExpParts<V> e = exp_parts(V(2.0f) * select(less(V(9.1f), a), V(9.1f), a));
    const V m = V(2.0f) * fma(e.h, e.q, e.h - V(0.5f));
    return copy_sign(m / (m + V(2.0f)), x);
  }
}

template <class V>
FN_INLINE V sigmoid(V x) {
  return V(1.0f) / (V(1.0f) + exp(V(0.0f) - x));
}

// P(Z <= z) for a standard normal Z. With t = |z|/sqrt(2): below 1 from erf(t) = t * P(t^2), above from
// erfc(t) = exp(-W(t)), which keeps the left tail's relative accuracy.
template <class V>
FN_INLINE V normal_cdf(V z) {
  if constexpr (is_double<V>) {
    return map(z, [](double a) { return 0.5 * ::erfc(-0.70710678118654752440 * a); });
  } else {
    const V x = z * V(0.707106781186547524f);
    const V a = abs(x);
    const V s = x * x;
    V p(0x1.40be52p-14f);  // erf(t)/t on t <= 1, fit error 6e-10
    p = fma(p, s, V(-0x1.a06882p-11f));
    p = fma(p, s, V(0x1.5375c8p-8f));
    p = fma(p, s, V(-0x1.b7e328p-6f));
    p = fma(p, s, V(0x1.ce2b58p-4f));
    p = fma(p, s, V(-0x1.812730p-2f));
    p = fma(p, s, V(0x1.20dd74p+0f));
    const V t = select(less(V(6.0f), a), V(6.0f), a);
    V w(0x1.24ddecp-16f);  // -log(erfc(t)) on 1 <= t <= 6, fit error 5e-9
    w = fma(w, t, V(-0x1.93bcd6p-12f));
    w = fma(w, t, V(0x1.fe1860p-9f));
    w = fma(w, t, V(-0x1.8d99b8p-6f));
    w = fma(w, t, V(0x1.b54fd6p-4f));
    w = fma(w, t, V(0x1.4513fap-1f));
    w = fma(w, t, V(0x1.20ee20p+0f));
    w = fma(w, t, V(0x1.0acc14p-15f));
    const V tail = select(less(V(6.0f), a), V(0.0f), V(0.5f) * exp(V(0.0f) - w));  // erfc(6) = 2e-17
    const V outer = select(less(x, V(0.0f)), tail, V(1.0f) - tail);
    return select(less(a, V(1.0f)), fma(V(0.5f) * x, p, V(0.5f)), outer);
  }
}

template <class V>
FN_INLINE V normal_pdf(V z) {
  return V(0.3989422804014326779) * exp(V(-0.5) * z * z);
}

}  // namespace
}  // namespace fusednorm::math

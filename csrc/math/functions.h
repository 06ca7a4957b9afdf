// Elementary functions over lanes: exp, expm1, log1p, tanh, sigmoid, the normal distribution, and for normal draws log,
// sin and cos.
//
// float: own polynomials (minimax fits on the stated intervals), the same bits for every vector width, within 3 units
// in the last place of the result (the normal distribution's: of 1; of exp, what is below 2e-38 is 0). double: libm
// lane by lane.
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
  const V t = fma(x, V(1.44269504088896341f), V(kPowers - 1));
  const V k = t - V(kPowers - 1);
  V r = fma(k, V(-0.693145751953125f), x);  // ln 2 in two pieces: k * the first is exact
  r = fma(k, V(-1.42860682030941723e-6f), r);
  V s(0x1.a1c044p-13f);  // (expm1(r) - r) / r^2 on |r| <= ln(2)/2, fit error 5e-11
  s = fma(s, r, V(0x1.6d9e28p-10f));
  s = fma(s, r, V(0x1.111076p-7f));
  s = fma(s, r, V(0x1.555478p-5f));
  s = fma(s, r, V(0x1.555556p-3f));
  s = fma(s, r, V(0.5f));
  return {power_of_two(t), fma(r * r, s, r)};
}

// 2^x / 2 for |x| <= 125.
template <class V>
FN_INLINE V half_exp2(V x) {
  const V t = x + V(kPowers - 1);
  const V r = x - (t - V(kPowers - 1));
  V p(0x1.444p-13f);  // (2^r - 1) / r on |r| <= 1/2, fit error 4e-9
  p = fma(p, r, V(0x1.5f48cp-10f));
  p = fma(p, r, V(0x1.3b2a1cp-7f));
  p = fma(p, r, V(0x1.c6aeccp-5f));
  p = fma(p, r, V(0x1.ebfbe0p-3f));
  p = fma(p, r, V(0x1.62e430p-1f));
  const V h = power_of_two(t);
  return fma(h, p * r, h);
}

template <class V>
FN_INLINE V exp(V x) {
  if constexpr (is_double<V>) {
    return map(x, [](double a) { return ::exp(a); });
  } else {
    const ExpParts<V> e = exp_parts(min(V(89.0f), x));                         // infinite from 88.73 on
    return select(less(x, V(-86.9f)), V(0.0f), V(2.0f) * fma(e.h, e.q, e.h));  // 2e-38: h would not be normal
  }
}

template <class V>
FN_INLINE V expm1(V x) {
  if constexpr (is_double<V>) {
    return map(x, [](double a) { return ::expm1(a); });
  } else {
    const ExpParts<V> e = exp_parts(min(V(89.0f), x));
    return select(less(x, V(-18.0f)), V(-1.0f), V(2.0f) * fma(e.h, e.q, e.h - V(0.5f)));
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
    const ExpParts<V> e = exp_parts(V(2.0f) * min(V(9.1f), a));
    const V m = V(2.0f) * fma(e.h, e.q, e.h - V(0.5f));
    return copy_sign(m / (m + V(2.0f)), x);
  }
}

template <class V>
FN_INLINE V sigmoid(V x) {
  return V(1.0f) / (V(1.0f) + exp(V(0.0f) - x));
}

// A standard normal Z never gets beyond this: what is left there is 1e-17.
constexpr float kBeyond = 8.5f;

// P(Z <= z): on the left 2^(W(|z|) - 1), which keeps most of the tail's relative accuracy (1e-5 at -6, 2e-4 at -8.5),
// and on the right 1 less that.
template <class V>
FN_INLINE V normal_cdf(V z) {
  if constexpr (is_double<V>) {
    return map(z, [](double a) { return 0.5 * ::erfc(-0.70710678118654752440 * a); });
  } else {
    const V a = abs(z);
    const V t = min(V(kBeyond), a);
    const V s = t * t;
    // W(t) = log2(2 P(Z <= -t)) on 0 <= t <= 8.5, fit error 6e-8 * max(|W|, 1/3) up to 6, and 2e-5 at the end.
    V odd(0x1.778bdcp-28f);
    odd = fma(odd, s, V(0x1.df9de2p-20f));
    odd = fma(odd, s, V(0x1.7fbb5cp-14f));
    odd = fma(odd, s, V(0x1.8b3268p-16f));
    odd = fma(odd, s, V(-0x1.ada73cp-5f));
    odd = fma(odd, s, V(-0x1.26aeccp+0f));
    V even(-0x1.c27054p-34f);
    even = fma(even, s, V(-0x1.15d074p-23f));
    even = fma(even, s, V(-0x1.09a950p-16f));
    even = fma(even, s, V(-0x1.411e5cp-12f));
    even = fma(even, s, V(0x1.c6f666p-8f));
    even = fma(even, s, V(-0x1.d63cfap-2f));
    const V tail = select(less(V(kBeyond), a), V(0.0f), half_exp2(fma(even, s, odd * t)));
    return select(less(z, V(0.0f)), tail, V(1.0f) - tail);
  }
}

template <class V>
FN_INLINE V normal_pdf(V z) {
  if constexpr (is_double<V>) {
    return V(0.3989422804014326779) * exp(V(-0.5) * z * z);
  } else {
    const V a = abs(z);
    const V t = min(V(kBeyond), a);
    const V x = V(-0.721347520444481703f) * (t * t);  // log2(e) / 2
    return select(less(V(kBeyond), a), V(0.0f), V(0.797884560802865356f) * half_exp2(x));
  }
}

}  // namespace
}  // namespace fusednorm::math

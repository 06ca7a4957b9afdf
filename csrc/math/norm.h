// The normalisation: statistics and their merge, the affine map, and the coefficients of its backward.
//
//   z  = (u - mean) * scale + shift          scale = weight * invstd, shift = bias
//   dx = scale * (dz - mean(dz) - xhat * mean(dz * xhat)),   xhat = (u - mean) * invstd
// (Ioffe & Szegedy 2015, section 3). With running statistics the two means vanish.
#pragma once

#include "lane.h"

namespace fusednorm::math {
namespace {

// count, mean and sum of squared deviations of a set of values.
template <class V>
struct Moments {
  V count, mean, m2;
};

// Chan, Golub & LeVeque 1983: the moments of the union. Exact for empty sets.
template <class V>
FN_INLINE Moments<V> merge(const Moments<V>& a, const Moments<V>& b, V b_share) {
  const V delta = b.mean - a.mean;
  return {a.count + b.count, fma(delta, b_share, a.mean), a.m2 + fma(delta * delta, a.count * b_share, b.m2)};
}
FN_INLINE Moments<double> merge(const Moments<double>& a, const Moments<double>& b) {
  return a.count == 0 ? b : b.count == 0 ? a : merge(a, b, b.count / (a.count + b.count));
}

template <class A>
FN_INLINE A inverse_std(A var, A eps) {
  return A(1) / sqrt(var + eps);
}

// The subtraction comes first: folding it into the shift would cancel when |mean| >> std.
template <class V>
FN_INLINE V normalize(V u, V mean, V scale, V shift) {
  return fma(u - mean, scale, shift);
}

// dx = a*dz + b*(u - mean) + c, from the channel's sums of dz and of dz*(u - mean) over `count` values.
template <class A>
struct InputGradient {
  A a, b, c;
};
template <class A>
FN_INLINE InputGradient<A> input_gradient(A scale, A invstd, A sum_dz, A sum_dz_xmu, A count) {
  return {scale, -scale * invstd * invstd * (sum_dz_xmu / count), -scale * (sum_dz / count)};
}
template <class V>
FN_INLINE V apply_input_gradient(V dz, V u_minus_mean, V a, V b, V c) {
  return fma(a, dz, fma(b, u_minus_mean, c));
}

}  // namespace
}  // namespace fusednorm::math

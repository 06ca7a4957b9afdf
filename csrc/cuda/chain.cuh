// The elementwise stages after the norm, on a fragment: the few values that a thread holds in registers. Which
// activation is a run-time choice, one uniform branch per fragment, so there is one kernel for all of them.
#pragma once

#include "../call.h"
#include "../math/activations.h"
#include "../math/noise.h"
#include "device.cuh"

namespace fusednorm::cuda {

using math::Seed;

constexpr uint32_t kKeepAll = 0xffu;  // the decisions of a Philox call that was not made

// Chain, as kernels take it.
template <class A>
struct Stages {
  int activation;
  math::Parameters<A> parameters;
  Noise noise;
  uint32_t threshold;
  A multiplier;
  const int64_t* seed;  // one value, or null
};

// f(Activation{}) for the activation of that index.
template <class F, class... Activations>
FN_DEVICE void with_activation(int index, math::List<Activations...>, F f) {
  int i = 0;
  (void)((index == i++ ? (f(Activations{}), true) : false) || ...);
}

// v[0], v[1], ... becomes v[2], v[3], ..., v[0], v[1].
template <int N, class A>
FN_DEVICE void rotate(A (&v)[N]) {
  const A first = v[0], second = v[1];
#pragma unroll
  for (int i = 0; i + 2 < N; ++i) v[i] = v[i + 2];
  v[N - 2] = first;
  v[N - 1] = second;
}

// f(i) for each element of the arrays: unrolled where that is a few instructions; a real loop where it is an
// exponential, which eight times over would take all registers. A loop cannot index registers, so the arrays turn.
template <bool unrolled, int N, class F, class... Arrays>
FN_DEVICE void for_elements(F f, Arrays&... arrays) {
  if constexpr (unrolled || N <= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) f(i);
  } else {
#pragma unroll 1
    for (int i = 0; i < N; i += 2) {
      f(0);
      f(1);
      (rotate(arrays), ...);
    }
  }
}

template <int N, class A>
FN_DEVICE void activate(const Stages<A>& stages, A (&z)[N]) {
  with_activation(stages.activation, math::Activations{}, [&](auto activation) {
    for_elements<activation.one_bit, N>([&](int i) { z[i] = activation.value(z[i], stages.parameters); }, z);
  });
}

// g becomes the gradient with respect to z, the activation's input.
template <int N, class A>
FN_DEVICE void activation_gradient(const Stages<A>& stages, A (&z)[N], A (&g)[N]) {
  with_activation(stages.activation, math::Activations{}, [&](auto activation) {
    for_elements<activation.one_bit, N>([&](int i) { g[i] = activation.gradient(z[i], g[i], stages.parameters); }, z,
                                        g);
  });
}

// Multiplied by 0 where dropped, not replaced: NaN and infinity stay visible, as in the unfused composition.
template <class A>
FN_DEVICE A drop(const Stages<A>& stages, A v, bool keep) {
  return v * (keep ? stages.multiplier : A(0));
}
template <class A>
FN_DEVICE A drop_gradient(const Stages<A>& stages, A g, bool keep) {
  return keep ? g * stages.multiplier : A(0);
}

template <class A>
FN_DEVICE Seed seed_of(const Stages<A>& stages) {
  return math::split_seed(stages.seed ? *stages.seed : 0);
}

}  // namespace fusednorm::cuda

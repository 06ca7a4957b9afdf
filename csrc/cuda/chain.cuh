// The elementwise stages around the norm, on a fragment: the few values that a thread holds in registers. Which
// activation is a run-time choice, one uniform branch per fragment, so there is one kernel for all of them.
//
// Most calls are an activation and then dropout behind the norm: Stages, which kernels of their own compute in a fixed
// order. Every other chain is a Program, whose stages `staged` kernels walk one by one.
#pragma once

#include "../call.h"
#include "../math/activations.h"
#include "../math/noise.h"
#include "backend.h"
#include "device.cuh"

namespace fusednorm::cuda {

using math::Seed;

constexpr uint32_t kKeepAll = 0xffu;  // the decisions of a Philox call that was not made

// How the decisions, or the multipliers, of a channel's rows are found.
enum class Draw : int { none, all_dropped, each_row, each_sample };

// Chain, as kernels take it.
template <class A>
struct Stages {
  int activation;
  math::Parameters<A> parameters;
  Draw draw;
  uint32_t threshold;
  A multiplier;
  const int64_t* seed;  // one value, or null
};

// f(Activation{}) for the activation of that index. Prelu is none of these: its parameter is not one of the call's.
template <class F, class... Activations>
FN_DEVICE void with_activation(int index, math::List<Activations...>, F f) {
  int i = 0;
  const auto call = [&](auto activation) {
    if constexpr (!std::is_same_v<decltype(activation), math::Prelu>) f(activation);
    return true;
  };
  (void)((index == i++ ? call(Activations{}) : false) || ...);
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

// ---- programs -----------------------------------------------------------------------------------------------------
// Stages as nibbles, the first one lowest; 0 ends them. The norm is one of them, so that a chain is walked by one loop
// and the code of all activations is there once.
using Steps = uint32_t;
constexpr Steps kStep = 0xf, kNorm = 4;
FN_HOST_DEVICE bool is(Steps steps, Stage stage) { return (steps & kStep) == static_cast<Steps>(stage); }
FN_HOST_DEVICE bool is_norm(Steps steps) { return (steps & kStep) == kNorm; }

template <class A>
struct Program : Stages<A> {
  Steps before, all;         // up to the norm; from x to y
  Steps to_norm, to_act;     // `before` and the norm; from x to what enters an activation behind the norm, if one does
  Steps back_to_norm, back;  // from y to z; from y to x
  Noise noise;
  float strength;
  bool has_weight;           // PReLU
  bool one_channel;          // all channels take the draws of channel 0
  bool noisy, noisy_before;  // drop is a stage; one of `before`
  bool act_after;            // act is one behind the norm
  bool saves_pass, saves_keep;
  const Live* live;  // in the place of threshold, multiplier and strength; or null
};
// Element i of a fragment belongs to channel i % V of the thread's V; `weight` is PReLU's, of those.
template <int V, int N, class A>
FN_DEVICE void activate(const Program<A>& q, const A (&weight)[V], A (&v)[N]) {
  if (q.has_weight) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = math::Prelu::value(v[i], math::Parameters<A>{weight[i % V], A(0)});
  } else {
    activate(static_cast<const Stages<A>&>(q), v);
  }
}
template <int V, int N, class A>
FN_DEVICE void activation_gradient(const Program<A>& q, const A (&weight)[V], A (&v)[N], A (&g)[N]) {
  if (q.has_weight) {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = math::Prelu::gradient(v[i], g[i], math::Parameters<A>{weight[i % V], A(0)});
  } else {
    activation_gradient(static_cast<const Stages<A>&>(q), v, g);
  }
}

// Bit i: the derivative of the activation, which is 0 or 1, is 1 at v[i].
template <int N, class A>
FN_DEVICE uint32_t passes(const Program<A>& q, const A (&v)[N]) {
  uint32_t bits = 0;
  with_activation(q.activation, math::Activations{}, [&](auto activation) {
    if constexpr (activation.one_bit) {
#pragma unroll
      for (int i = 0; i < N; ++i) bits |= static_cast<uint32_t>(activation.passes(v[i], q.parameters)) << i;
    }
  });
  return bits;
}

// The multipliers of decisions.
template <int N, class A>
FN_DEVICE void multipliers(const Program<A>& q, uint32_t keep, A (&m)[N]) {
  const A multiplier = q.live ? static_cast<A>(q.live->multiplier) : q.multiplier;
#pragma unroll
  for (int i = 0; i < N; ++i) m[i] = keep >> i & 1u ? multiplier : A(0);
}
// What a Philox call's 8 rows draw: decisions, or else all ones and multipliers in m. Gaussian noise takes two calls,
// of which a loop makes one code.
template <class A>
FN_DEVICE uint32_t draw_aligned(const Program<A>& q, Seed seed, uint64_t call, uint32_t c,
                                float (&m)[math::kRowsPerCall]) {
#pragma unroll 1
  for (uint32_t stage = 0; stage < 2; ++stage) {
    math::Counter x = math::counter(call, c, stage);
    math::philox4x32<math::kPhiloxRounds>(x.word, seed);
    if (q.noise == Noise::bernoulli) {
      const uint32_t threshold = q.live ? q.live->threshold : q.threshold;
      return threshold == kAllKept ? kKeepAll : math::keep8(x.word, threshold);
    }
    const float strength = q.live ? q.live->strength : q.strength;
    if (q.noise == Noise::uniform) {
      math::uniform8(x.word, strength, m);
      break;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = m[4 + i];
    math::gaussian4(x.word, strength, m + 4);
  }
  return kKeepAll;
}
// The same of 8 rows that begin within a call, as they may in a part of a larger batch: one by one, which takes no more
// registers than a call does.
FN_DEVICE uint32_t draw_across(const Live& live, Noise noise, Seed seed, uint64_t call, uint32_t over, uint32_t c,
                               float (&m)[math::kRowsPerCall]) {
  uint32_t bits = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < math::kRowsPerCall; ++i) {
    const uint32_t lane = (over + i) % math::kRowsPerCall, stage = noise == Noise::gaussian ? lane / 4 : 0;
    math::Counter x = math::counter(call + (lane < over), c, stage);
    math::philox4x32<math::kPhiloxRounds>(x.word, {kept(seed.low), kept(seed.high)});  // or all rounds' keys would stay
    float value = 0, next;
    if (noise == Noise::gaussian) {
      const bool second = lane % 4 >= 2;
      math::gaussian_multipliers(static_cast<float>(second ? x.word[2] : x.word[0]),
                                 static_cast<float>(second ? x.word[3] : x.word[1]), live.strength, value, next);
      value = lane % 2 ? next : value;
    } else {
      const uint32_t low = lane < 2 ? x.word[0] : x.word[1], high = lane < 6 ? x.word[2] : x.word[3];
      const uint32_t draw = (lane < 4 ? low : high) >> (16 * (lane % 2)) & 0xffffu;
      bits = bits >> 1 | static_cast<uint32_t>(draw < live.threshold) << (math::kRowsPerCall - 1);
      value = math::uniform_multiplier(static_cast<float>(draw), live.strength);
    }
#pragma unroll
    for (int i = 0; i + 1 < math::kRowsPerCall; ++i) m[i] = m[i + 1];
    m[math::kRowsPerCall - 1] = value;
  }
  return noise == Noise::bernoulli ? bits : kKeepAll;
}
template <class A>
FN_DEVICE uint32_t draw_call(const Program<A>& q, Seed seed, uint64_t call, uint32_t c,
                             float (&m)[math::kRowsPerCall]) {
  const uint64_t first = q.live ? static_cast<uint64_t>(q.live->first) : 0;
  const uint32_t over = first % math::kRowsPerCall;
  call += first / math::kRowsPerCall;
  return over ? draw_across(*q.live, q.noise, seed, call, over, c, m) : draw_aligned(q, seed, call, c, m);
}

// NaN and infinity stay visible forward; backward, a dropped element's gradient is 0 whatever comes in.
template <int N, class A>
FN_DEVICE void multiply(A (&v)[N], const A (&m)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] *= m[i];
}
template <int N, class A>
FN_DEVICE void multiply_gradient(A (&g)[N], const A (&m)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] = m[i] == A(0) ? A(0) : g[i] * m[i];
}

// For what a walk does not come to, or has nothing to do at.
struct Nothing {
  template <class... Arrays>
  FN_DEVICE void operator()(const Arrays&...) const {}
};

// v goes through `steps`, past noise only if `noisy`; norm(v) and add(v) are the caller's. Returns the bits of `passes`
// if they are to be saved.
template <int V, int N, class A, class Norm, class Add>
FN_DEVICE uint32_t run(const Program<A>& q, Steps steps, const A (&weight)[V], const A (&m)[N], bool noisy, bool saves,
                       A (&v)[N], Norm norm, Add add) {
  uint32_t bits = 0;
#pragma unroll 1
  for (; steps; steps >>= 4) {
    if (is(steps, Stage::drop) && noisy) multiply(v, m);
    if (is_norm(steps)) norm(v);
    if (is(steps, Stage::add)) add(v);
    if (is(steps, Stage::act)) {
      if (saves) bits = passes(q, v);
      activate(q, weight, v);
    }
  }
  return bits;
}

// g goes back through `steps`; v is what enters the activation that comes next. norm(v, g) makes du of dz, and v what
// enters an activation before the norm. `saved`: the bits `pass` replace the derivative of one behind it. added(g) gets
// the residual's gradient, weighed(v, g) what PReLU behind the norm gets and the gradient of what it gives.
template <int V, int N, class A, class Norm, class Added, class Weighed>
FN_DEVICE void run_back(const Program<A>& q, Steps steps, const A (&weight)[V], const A (&m)[N], bool saved,
                        uint32_t pass, A (&v)[N], A (&g)[N], Norm norm, Added added, Weighed weighed) {
#pragma unroll 1
  for (; steps; steps >>= 4) {
    if (is(steps, Stage::drop)) multiply_gradient(g, m);
    if (is_norm(steps)) norm(v, g);
    if (is(steps, Stage::add)) added(g);
    if (is(steps, Stage::act)) {
      if (saved) {
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = pass >> i & 1u ? g[i] : A(0);
      } else {
        if (q.has_weight) weighed(v, g);
        activation_gradient(q, weight, v, g);
      }
    }
  }
}

// The derivatives of u with respect to PReLU's weight, where that stands before the norm; v is x.
template <int N, class A>
FN_DEVICE void weight_factors(const Program<A>& q, const A (&m)[N], A (&v)[N]) {
  if (is(q.before, Stage::drop)) multiply(v, m);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = math::Prelu::weight_gradient(v[i], A(1));
  if (is(q.before >> 4, Stage::drop)) multiply(v, m);
}

template <class A>
FN_DEVICE Seed seed_of(const Stages<A>& stages) {
  return math::split_seed(stages.seed ? *stages.seed : 0);
}

}  // namespace fusednorm::cuda

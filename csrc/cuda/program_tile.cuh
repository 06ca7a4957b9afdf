// What becomes of a tile whose chain is a Program: its stages, one by one, and noise that may be a number. `before` is
// computed anew in every pass, from x, and costs no pass of its own.
#pragma once

#include "stages_tile.cuh"

namespace fusednorm::cuda {

template <int V, class T, class A>
FN_DEVICE void add_fragment(const Fragment<T, V>& from, A (&to)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) to[i] += widen(from[i / V], i % V);
}
template <class Q, int V, class A>
FN_DEVICE Drawn draw(const Q& q, const Team<Q, V>& team, Seed seed, const Tile& tile, A (&m)[kFragment]) {
  return draw_fragment<V>(q.chain, seed, team.samples, team.visits, tile, team.c, m);
}

// ---- forward ------------------------------------------------------------------------------------------------------
// Decisions that a pass has saved are read by the next one.
template <int V, class T, class A>
FN_DEVICE void gather_tile(const StagedForwardArguments<T>& q, const Team<StagedForwardArguments<T>, V>& team,
                           Seed seed, const Tile& tile, const Fragment<T, V>& x, Moments<A> (&moments)[2]) {
  A v[kFragment], m[kFragment];
  if (q.chain.noisy_before) {
    const Drawn drawn = draw(q, team, seed, tile, m);
    if (q.p.mask && q.chain.saves_keep) team.saved.put(team.visits, tile, drawn.byte);
  }
  const CutTile cut = team.cut(tile);
#pragma unroll 1
  for (bool noisy = !q.gathers(1);; noisy = true) {
    widen_fragment<V>(x, v);
    run(q.chain, q.chain.before, team.weight, m, noisy, false, v, Nothing{}, Nothing{});
    noisy ? merge_values<V>(moments[0], v, cut) : merge_values<V>(moments[1], v, cut);
    if (noisy) break;
  }
}

// y in the place of x.
template <int V, class T, class A>
FN_DEVICE void apply_tile(const StagedForwardArguments<T>& q, const Team<StagedForwardArguments<T>, V>& team,
                          const Affine<A>& affine, Seed seed, const Tile& tile, Fragment<T, V>& x,
                          const Fragment<T, V>& residual) {
  A v[kFragment], m[kFragment];
  uint32_t keep = kKeepAll;
  if (q.p.mask && q.chain.saves_keep && q.chain.noisy_before && q.training) {
    multipliers(q.chain, team.saved_bits(tile), m);
  } else if (q.chain.noisy) {
    const Drawn drawn = draw(q, team, seed, tile, m);
    keep = drawn.keep;
    if (q.p.mask && !q.chain.saves_pass) team.saved.put(team.visits, tile, drawn.byte);
  }
  widen_fragment<V>(x, v);
  const bool saves = q.p.mask && q.chain.saves_pass;
  uint32_t pass = run(
      q.chain, q.chain.all, team.weight, m, true, saves, v,
      [&](A(&u)[kFragment]) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) u[i] = affine(u[i]);
      },
      [&](A(&sum)[kFragment]) { add_fragment<V>(residual, sum); });
  if (saves) {
    if (q.chain.saves_keep) pass &= keep;
    team.saved.put(team.visits, tile, byte_of_fragments<V>(pass));
  }
  narrow_fragment<V>(v, x);
}

// ---- backward -----------------------------------------------------------------------------------------------------
template <class T>
FN_DEVICE Seed backward_seed(const StagedBackwardArguments<T>& q) {
  return seed_of(q.chain);
}

// The decisions as bits of the fragment, the saved bits of `passes`, and the multipliers.
template <class A>
struct Multiplied {
  uint32_t keep, pass;
  A m[kFragment];
};
template <int V, class T, class A = opmath_t<T>>
FN_DEVICE Multiplied<A> restore_noise(const StagedBackwardArguments<T>& q,
                                      const Team<StagedBackwardArguments<T>, V>& team, Seed seed, const Tile& tile) {
  Multiplied<A> noise;
  noise.keep = kKeepAll;
  noise.pass = q.p.mask ? team.saved_bits(tile) : 0;
  if (q.p.mask && q.chain.saves_keep) {
    multipliers(q.chain, noise.keep = noise.pass, noise.m);
  } else if (q.chain.noisy) {
    noise.keep = draw(q, team, seed, tile, noise.m).keep;
  }
  return noise;
}
// Of which a resident kernel has kept `keep`: decisions, or the bits of a mask that replace them.
template <int V, class T, class A = opmath_t<T>>
FN_DEVICE Multiplied<A> kept_noise(const StagedBackwardArguments<T>& q, const Team<StagedBackwardArguments<T>, V>& team,
                                   Seed seed, const Tile& tile, uint32_t keep) {
  Multiplied<A> noise;
  noise.keep = keep;
  noise.pass = q.chain.saves_keep ? keep : q.p.mask ? team.saved_bits(tile) : 0;
  if (q.chain.noise == Noise::bernoulli) {
    multipliers(q.chain, keep, noise.m);
  } else if (q.chain.noisy) {
    draw(q, team, seed, tile, noise.m);
  }
  return noise;
}

// u - mean of a tile, and v: what enters an activation behind the norm, unless `saved` bits make that superfluous.
template <int V, class T, class X, class A>
FN_DEVICE void recompute(const StagedBackwardArguments<T>& q, const Team<StagedBackwardArguments<T>, V>& team,
                         const Affine<A>& affine, const A (&m)[kFragment], bool saved, X x,
                         const Fragment<T, V>& residual, A (&centred)[kFragment], A (&v)[kFragment]) {
  x(v);
  run(
      q.chain, saved ? q.chain.to_norm : q.chain.to_act, team.weight, m, true, false, v,
      [&](A(&u)[kFragment]) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) {
          centred[i] = u[i] - affine.mean;
          u[i] = affine(u[i]);
        }
      },
      [&](A(&sum)[kFragment]) { add_fragment<V>(residual, sum); });
}

// Adds a tile's sums. Rows that are not there were read as zeros, so their dz is one. x(to) and g(to) fetch the tile's
// values, when they are needed: from registers, or from where they have been put away.
template <int V, class T, class X, class G, class A>
FN_DEVICE void add_tile(const StagedBackwardArguments<T>& q, const Team<StagedBackwardArguments<T>, V>& team,
                        const Affine<A>& affine, const Multiplied<A>& noise, X x, G g, const Fragment<T, V>& residual,
                        A (&sums)[kSums]) {
  A v[kFragment], dz[kFragment], centred[kFragment], part[kSums] = {};
  const bool saved = q.p.mask && q.chain.saves_pass;
  recompute<V>(q, team, affine, noise.m, saved, x, residual, centred, v);
  g(dz);
  run_back(q.chain, q.chain.back_to_norm, team.weight, noise.m, saved, noise.pass, v, dz, Nothing{}, Nothing{},
           [&](const A(&z)[kFragment], const A(&gradient)[kFragment]) {
#pragma unroll
             for (int i = 0; i < kFragment; ++i) part[2] += math::Prelu::weight_gradient(z[i], gradient[i]);
           });
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    part[0] += dz[i];
    part[1] = math::fma(dz[i], centred[i], part[1]);
  }
  if (q.chain.has_weight && !q.chain.act_after) {
    x(v);
    weight_factors(q.chain, noise.m, v);
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      part[2] = math::fma(dz[i], v[i], part[2]);
      part[3] = math::fma(centred[i], v[i], part[3]);
      part[4] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] += part[i];
}

// dx, and what reaches the residual is written.
template <int V, class T, class X, class G, class A>
FN_DEVICE void input_gradient_tile(const StagedBackwardArguments<T>& q, const Team<StagedBackwardArguments<T>, V>& team,
                                   const Affine<A>& affine, const math::InputGradient<A>& k, const Multiplied<A>& noise,
                                   const Tile& tile, X x, G g, const Fragment<T, V>& residual, Fragment<T, V>& dx) {
  A v[kFragment], gradient[kFragment], centred[kFragment];
  const bool saved = q.p.mask && q.chain.saves_pass;
  recompute<V>(q, team, affine, noise.m, saved, x, residual, centred, v);
  g(gradient);
  run_back(
      q.chain, q.p.dx ? q.chain.back : q.chain.back_to_norm, team.weight, noise.m, saved, noise.pass, v, gradient,
      [&](A(&entering)[kFragment], A(&dz)[kFragment]) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) dz[i] = math::apply_input_gradient(dz[i], centred[i], k.a, k.b, k.c);
        x(entering);
        if (is(q.chain.before, Stage::drop)) multiply(entering, noise.m);
      },
      [&](const A(&added)[kFragment]) {
        if (!q.p.grad_residual) return;
        Fragment<T, V> narrowed;
        narrow_fragment<V>(added, narrowed);
        team.write(q.p.grad_residual, tile, narrowed);
      },
      Nothing{});
  narrow_fragment<V>(gradient, dx);
}

}  // namespace fusednorm::cuda

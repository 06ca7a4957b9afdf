// What becomes of a tile whose chain is Stages: forward, and backward with what it needs of forward.
#pragma once

#include "team.cuh"

namespace fusednorm::cuda {

// ---- forward ------------------------------------------------------------------------------------------------------
// A tile's first `left` rows into the thread's moments.
template <int V, class A, class Tile>
FN_DEVICE void merge_values(Moments<A>& m, const A (&v)[kFragment], const Tile& tile) {
  if (tile.full()) {
    merge_fragment(m, v);
  } else {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) {
      if (tile.there(row_in_tile<V>(i / V) + i % V) && tile.counts(i)) merge_value(m, v[i]);
    }
  }
}
template <int V, class T, class A>
FN_DEVICE void gather_tile(const ForwardArguments<T>& q, const Team<ForwardArguments<T>, V>& team, Seed,
                           const Tile& tile, const Fragment<T, V>& x, Moments<A> (&moments)[1]) {
  A v[kFragment];
  widen_fragment<V>(x, v);
  merge_values<V>(moments[0], v, tile);
}

// y in the place of x.
template <int V, class T, class A>
FN_DEVICE void apply_tile(const ForwardArguments<T>& q, const Team<ForwardArguments<T>, V>& team,
                          const Affine<A>& affine, Seed seed, const Tile& tile, Fragment<T, V>& x,
                          const Fragment<T, V>&) {
  const auto [byte, keep] = draw_fragment<V>(q.chain, seed, team.samples, team.visits, tile, team.c);
  team.saved.put(team.visits, tile, byte);
  A v[kFragment];
  widen_fragment<V>(x, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = affine(v[i]);
  activate(q.chain, v);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) v[i] = drop(q.chain, v[i], keep >> i & 1u);
  narrow_fragment<V>(v, x);
}

// ---- backward -----------------------------------------------------------------------------------------------------
template <class T>
FN_DEVICE Seed backward_seed(const BackwardArguments<T>& q) {
  return q.p.mask ? Seed{} : seed_of(q.chain);
}

// The decisions of a tile, drawn again or read, and those of which a resident kernel has kept the byte.
struct Decided {
  uint32_t keep;
};
template <int V, class T>
FN_DEVICE Decided restore_noise(const BackwardArguments<T>& q, const Team<BackwardArguments<T>, V>& team, Seed seed,
                                const Tile& tile) {
  if (q.p.mask) return {team.saved_bits(tile)};
  return {draw_fragment<V>(q.chain, seed, team.samples, team.visits, tile, team.c).keep};
}
template <int V, class T>
FN_DEVICE Decided kept_noise(const BackwardArguments<T>& q, const Team<BackwardArguments<T>, V>& team, Seed,
                             const Tile&, uint32_t byte) {
  return {byte};
}

// dz and x - mean of a tile. x(to) and g(to) fetch its values.
template <class T, class X, class G, class A>
FN_DEVICE void local_gradient(const BackwardArguments<T>& q, const Affine<A>& affine, uint32_t keep, X x, G g,
                              A (&dz)[kFragment], A (&centred)[kFragment]) {
  A z[kFragment];
  x(z);
  g(dz);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    centred[i] = kept(z[i] - affine.mean);
    z[i] = affine(z[i]);
    dz[i] = drop_gradient(q.chain, dz[i], keep >> i & 1u);
  }
  activation_gradient(q.chain, z, dz);
}

// Adds a tile's sums of dz and dz*(x - mean). Rows that are not there were read as zeros, so their dz is one too: 0
// times the derivative at z(0), which is finite unless z(0) is beyond all that a float32 activation takes (1e13).
template <int V, class T, class X, class G, class A>
FN_DEVICE void add_tile(const BackwardArguments<T>& q, const Team<BackwardArguments<T>, V>&, const Affine<A>& affine,
                        const Decided& noise, X x, G g, const Fragment<T, V>&, A (&sums)[2]) {
  A dz[kFragment], centred[kFragment];
  local_gradient(q, affine, noise.keep, x, g, dz, centred);
  Pair<A> part{0, 0};  // apart first: a long sum of short ones rounds less than a long one
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    part.first += dz[i];
    part.second = math::fma(dz[i], centred[i], part.second);
  }
  sums[0] += part.first;
  sums[1] += part.second;
}

template <int V, class T, class X, class G, class A>
FN_DEVICE void input_gradient_tile(const BackwardArguments<T>& q, const Team<BackwardArguments<T>, V>&,
                                   const Affine<A>& affine, const math::InputGradient<A>& k, const Decided& noise,
                                   const Tile&, X x, G g, const Fragment<T, V>&, Fragment<T, V>& dx) {
  A dz[kFragment], centred[kFragment];
  local_gradient(q, affine, noise.keep, x, g, dz, centred);
#pragma unroll
  for (int i = 0; i < kFragment; ++i) dz[i] = math::apply_input_gradient(dz[i], centred[i], k.a, k.b, k.c);
  narrow_fragment<V>(dz, dx);
}

}  // namespace fusednorm::cuda

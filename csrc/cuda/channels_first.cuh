// Channels-first kernels, streaming: statistics and apply, each reading x once, and likewise backward. A team of
// threads takes a channel's chunk of rows; partial sums go through global memory, and every block of the second kernel
// merges them anew, which costs less than a third launch and needs no atomics.
//
//   forward    statistics: x -> partials                 apply:          partials, x -> y            3 units
//   backward   gradient_sums: x, g -> partials           input_gradient: partials, x, g -> dx        5 units
//
// Each pass is there once, for every chain: what becomes of a tile is in stages_tile.cuh and program_tile.cuh.
//
// Blocks: x = teams of adjacent channels, so that those who share a sector of memory run together, of one group after
// another; y = chunk.
#pragma once

#include "program_tile.cuh"

namespace fusednorm::cuda {

template <class Q, int V>
FN_DEVICE void read_residual(const Q& q, const Team<Q, V>& team, const Tile& tile, Input<typename Q::T, V>& in) {
  if constexpr (Q::walks) {
    if (q.p.residual) team.read(q.p.residual, tile, in.residual);
  }
}
template <class Q, int V>
FN_DEVICE auto gradient_reader(const Q& q, const Team<Q, V>& team) {
  return [&](const Tile& tile, Input<typename Q::T, V>& in) {
    team.read(q.p.x, tile, in.x);
    team.read(q.p.g, tile, in.g);
    read_residual(q, team, tile, in);
  };
}
template <int V, class T>
FN_DEVICE auto in_registers(const Fragment<T, V>& from) {
  return [&](opmath_t<T>(&to)[kFragment]) { widen_fragment<V>(from, to); };
}

template <class Q, class A, int N>
FN_DEVICE void team_sums(const Q& q, A (&sums)[N]) {
  if (q.gathers(2)) return team_sum(sums);
  A first[2] = {sums[0], sums[1]};
  team_sum(first);
  sums[0] = first[0];
  sums[1] = first[1];
}

// The gradients of the channel's vectors, from the sums of the team's group, or of all groups.
template <class Q, int V, class A>
FN_DEVICE void finish_parameters(const Q& q, const Team<Q, V>& team, A scale, const A (&sums)[Q::sums]) {
  if (team.group() != 0 || blockIdx.y != 0) return;
  A gradients[Q::sums] = {};
  if (!Q::walks || q.groups.count == 1) {
    add_parameter_gradients(q, 0, team.rows.rows, team.c, scale, sums, gradients);
  } else {
    add_groups(q, team.c, lane(), kWarp, gradients);
#pragma unroll
    for (int i = 0; i < Q::sums; ++i) gradients[i] = warp_sum(gradients[i]);
  }
  if (!team.leads()) return;
  write_parameter_gradients(q, team.c, gradients);
  write_sums(q, team.c, sums);
}

// ---- the passes ---------------------------------------------------------------------------------------------------
template <int V, class Q>
FN_DEVICE void statistics(const Q& q) {
  using A = typename Q::A;
  next_grid_may_start();
  const Team<Q, V> team(q, q.samples, in_first_pass(), false);
  const Seed seed = seed_of(q.chain);
  Moments<A> own[Q::moments] = {};
  team.template each<team.kForward>(
      [&](const Tile& tile, auto& in) { team.read(q.p.x, tile, in.x); },
      [&](const Tile& tile, auto& in) { gather_tile<V>(q, team, seed, tile, in.x, own); });
#pragma unroll
  for (int i = 0; i < Q::moments; ++i) {
    if (!q.gathers(i)) break;
    const Pair<A> moments = team.merge(own[i]);
    if (team.leads()) q.partials[i][q.place(team.group(), team.chunk, team.c)] = moments;
  }
}

template <int V, class Q>
FN_DEVICE void apply(const Q& q) {
  using A = typename Q::A;
  previous_grid_ends();
  const Team<Q, V> team(q, q.samples, in_second_pass(), true);
  Pair<A> moments[Q::moments] = {};
#pragma unroll
  for (int i = 0; i < Q::moments; ++i) {
    if (!q.training || !q.gathers(i)) break;
    moments[i] =
        merge_chunks<A>(team.rows, [&](int chunk) { return q.partials[i][q.place(team.group(), chunk, team.c)]; });
  }
  const Affine<A> affine = finish_statistics(q, team.group(), team.rows.rows, team.c, moments, team.writes());
  if (!q.p.y) return;
  const Seed seed = seed_of(q.chain);
  team.template each<team.kForward>(
      [&](const Tile& tile, auto& in) {
        team.read(q.p.x, tile, in.x);
        read_residual(q, team, tile, in);
      },
      [&](const Tile& tile, auto& in) {
        apply_tile<V>(q, team, affine, seed, tile, in.x, in.residual);
        team.write(q.p.y, tile, in.x);
      });
}

template <int V, class Q>
FN_DEVICE void gradient_sums(const Q& q) {
  using A = typename Q::A;
  next_grid_may_start();
  const Team<Q, V> team(q, q.samples, in_first_pass(), false);
  const Affine<A> affine = saved_statistics(q, team.group(), team.c);
  const Seed seed = backward_seed(q);
  A sums[Q::sums] = {};
  team.template each<team.kBackward>(gradient_reader(q, team), [&](const Tile& tile, auto& in) {
    add_tile<V>(q, team, affine, restore_noise<V>(q, team, seed, tile), in_registers<V>(in.x), in_registers<V>(in.g),
                in.residual, sums);
  });
  team_sums(q, sums);
  if (team.leads()) write_partials(q, team.group(), team.chunk, team.c, sums);
}

template <int V, class Q>
FN_DEVICE void input_gradient(const Q& q) {
  using A = typename Q::A;
  previous_grid_ends();
  const Team<Q, V> team(q, q.samples, in_second_pass(), true);
  const Affine<A> affine = saved_statistics(q, team.group(), team.c);
  A sums[Q::sums] = {};
  if (q.p.given) {
    read_given(q, team.c, sums);
  } else if (q.partials) {
    for (int chunk = lane(); chunk < q.chunks.count; chunk += kWarp) {
      add_partials(q, team.group(), chunk, team.c, sums);
    }
#pragma unroll
    for (int i = 0; i < Q::sums; ++i) {
      if (q.gathers(i)) sums[i] = warp_sum(sums[i]);
    }
  }
  if (q.p.given || q.partials) finish_parameters(q, team, affine.scale, sums);
  if (!q.p.dx && !(Q::walks && q.p.grad_residual)) return;
  const math::InputGradient<A> k = coefficients(q, team.group(), team.rows.rows, team.c, affine.scale, sums);
  const Seed seed = backward_seed(q);
  team.template each<team.kBackward>(gradient_reader(q, team), [&](const Tile& tile, auto& in) {
    input_gradient_tile<V>(q, team, affine, k, restore_noise<V>(q, team, seed, tile), tile, in_registers<V>(in.x),
                           in_registers<V>(in.g), in.residual, in.x);
    if (!Q::walks || q.p.dx) team.write(q.p.dx, tile, in.x);
  });
}

// ---- the kernels --------------------------------------------------------------------------------------------------
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? kBackwardBlocks : kForwardBlocks;

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_statistics(ForwardArguments<T> q) {
  statistics<V>(q);
}
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_statistics(StagedForwardArguments<T> q) {
  statistics<V>(q);
}

template <class T, int V>
FN_KERNEL(256, kBlocks<T>)
channels_first_apply(ForwardArguments<T> q) {
  apply<V>(q);
}
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_apply(StagedForwardArguments<T> q) {
  apply<V>(q);
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_gradient_sums(BackwardArguments<T> q) {
  gradient_sums<V>(q);
}
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_gradient_sums(StagedBackwardArguments<T> q) {
  gradient_sums<V>(q);
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_input_gradient(BackwardArguments<T> q) {
  input_gradient<V>(q);
}
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_input_gradient(StagedBackwardArguments<T> q) {
  input_gradient<V>(q);
}

// ---- noise alone --------------------------------------------------------------------------------------------------
// y = x * m, or m where there is no x.
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_noise(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  const Team<StagedForwardArguments<T>, V> team(q, q.samples, in_first_pass(), false);
  const Seed seed = seed_of(q.chain);
  team.template each<team.kForward>(
      [&](const Tile& tile, auto& in) {
        if (q.p.x) team.read(q.p.x, tile, in.x);
      },
      [&](const Tile& tile, auto& in) {
        A v[kFragment], m[kFragment];
        draw(q, team, seed, tile, m);
        widen_fragment<V>(in.x, v);
#pragma unroll
        for (int i = 0; i < kFragment; ++i) v[i] = q.p.x ? v[i] * m[i] : m[i];
        narrow_fragment<V>(v, in.x);
        team.write(q.p.y, tile, in.x);
      });
}

}  // namespace fusednorm::cuda

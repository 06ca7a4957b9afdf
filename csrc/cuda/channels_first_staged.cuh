// Channels-first kernels for every chain: the same two passes forward and backward as in channels_first.cuh, streaming
// or resident, over the groups of a batch too. What differs is what a tile goes through: a program's stages, one by
// one, and noise that may be a number. `before` is computed anew in every pass, from x, and costs no pass of its own.
//
// Blocks: x = teams of adjacent channels, of one group after another; y = chunk.
#pragma once

#include "channels_first_resident.cuh"

namespace fusednorm::cuda {

// The tiles of one tensor that are on their way: as many as elsewhere forward; fewer of them backward, where up to
// three tensors are read.
template <class T, int V, int Share = 1>
struct Queue {
  static constexpr int kLength = kTilesInFlight<T, V> / Share > 0 ? kTilesInFlight<T, V> / Share : 1;
  Fragment<T, V> tile[kLength];
  FN_DEVICE void move() {
#pragma unroll
    for (int u = 0; u + 1 < kLength; ++u) {
#pragma unroll
      for (int j = 0; j < kFragment / V; ++j) tile[u][j] = tile[u + 1][j];
    }
  }
};

// A team in a group.
template <class T, int V>
struct StagedTeam {
  using A = opmath_t<T>;
  int64_t group, c;
  int chunk;
  bool active;
  const Samples& samples;
  Window window;
  Visits visits;
  SavedBytes saved;
  A weight[1];  // PReLU's
  template <class Arguments>
  FN_DEVICE StagedTeam(const Arguments& q, Place place, bool descending)
      : group(q.groups.group(place)),
        c(int64_t{q.groups.block_x(place)} * blockDim.y + threadIdx.y),
        chunk(place.chunk),
        active(c < q.shape.C),
        samples(q.samples),
        window(q.chunks, q.groups, group),
        visits(window, chunk, c, q.shape.S, q.samples, lane() * V, descending),
        saved(q.p.mask, window.rows, c) {
    if (!active) c = visits.count = 0;
    weight[0] = cuda::read<A>(q.p.act_weight, c, A(0));
  }
  FN_DEVICE bool leads() const { return active && threadIdx.x == 0; }
  FN_DEVICE bool writes() const { return leads() && blockIdx.y == 0; }

  FN_DEVICE CutTile cut(const Tile& tile) const { return CutTile(tile, visits.row(tile), window.first); }
  FN_DEVICE void read(const T* p, const Tile& tile, Fragment<T, V>& to) const {
    cuda::read<V>(p, cut(tile), samples, to);
  }
  FN_DEVICE void write(T* p, const Tile& tile, const A (&from)[kFragment]) const {
    Fragment<T, V> narrowed;
    narrow_fragment<V>(from, narrowed);
    cuda::write<V>(p, cut(tile), samples, narrowed);
  }
  template <int Ahead, class Read, class F, class Move>
  FN_DEVICE void each(Read read, F f, Move move) const {
    visits.template each<Ahead>(samples, read, f, move);
  }

  // What a saved mask holds for the fragment.
  FN_DEVICE uint32_t saved_bits(const Tile& tile) const { return row_bits<V>(saved.get(visits, tile)); }
  FN_DEVICE Drawn draw(const Program<A>& program, Seed seed, const Tile& tile, A (&m)[kFragment]) const {
    return draw_fragment<V>(program, seed, samples, visits, tile, c, m);
  }
};

// What backward reads.
template <class T, int V, int Share>
struct BackwardQueues {
  Queue<T, V, Share> x, g, residual;
  // f(tile) for every one, whose values are then first in the queues.
  template <class F>
  FN_DEVICE void each(const StagedBackwardArguments<T>& q, const StagedTeam<T, V>& team, F f) {
    team.template each<Queue<T, V, Share>::kLength>(
        [&](int u, const Tile& tile) {
          team.read(q.p.x, tile, x.tile[u]);
          team.read(q.p.g, tile, g.tile[u]);
          if (q.p.residual) team.read(q.p.residual, tile, residual.tile[u]);
        },
        f,
        [&] {
          x.move();
          g.move();
          residual.move();
        });
  }
};

template <int V, class T, class A>
FN_DEVICE void add_fragment(const Fragment<T, V>& from, A (&to)[kFragment]) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) to[i] += widen(from[i / V], i % V);
}

// ---- forward, tile by tile ----------------------------------------------------------------------------------------
// Decisions that a pass has saved are read by the next one.
template <class T, int V, class A = opmath_t<T>>
FN_DEVICE void gather_tile(const StagedForwardArguments<T>& q, const StagedTeam<T, V>& team, Seed seed,
                           const Tile& tile, const Fragment<T, V>& x, Moments<A>& moments, Moments<A>& matched) {
  A v[kFragment], m[kFragment];
  if (q.program.noisy_before) {
    const Drawn drawn = team.draw(q.program, seed, tile, m);
    if (q.p.mask && q.program.saves_keep) team.saved.put(team.visits, tile, drawn.byte);
  }
  const CutTile cut = team.cut(tile);
#pragma unroll 1
  for (bool noisy = !q.matches();; noisy = true) {
    widen_fragment<V>(x, v);
    run(q.program, q.program.before, team.weight, m, noisy, false, v, Nothing{}, Nothing{});
    noisy ? merge_values<V>(moments, v, cut) : merge_values<V>(matched, v, cut);
    if (noisy) break;
  }
}

template <class T, int V, class A = opmath_t<T>>
FN_DEVICE void apply_tile(const StagedForwardArguments<T>& q, const StagedTeam<T, V>& team, const Affine<A>& affine,
                          Seed seed, const Tile& tile, const Fragment<T, V>& x, const Fragment<T, V>& residual) {
  A v[kFragment], m[kFragment];
  uint32_t keep = kKeepAll;
  if (q.p.mask && q.program.saves_keep && q.program.noisy_before && q.training) {
    multipliers(q.program, team.saved_bits(tile), m);
  } else if (q.program.noisy) {
    const Drawn drawn = team.draw(q.program, seed, tile, m);
    keep = drawn.keep;
    if (q.p.mask && !q.program.saves_pass) team.saved.put(team.visits, tile, drawn.byte);
  }
  widen_fragment<V>(x, v);
  const bool saves = q.p.mask && q.program.saves_pass;
  uint32_t pass = run(
      q.program, q.program.all, team.weight, m, true, saves, v,
      [&](A(&u)[kFragment]) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) u[i] = affine(u[i]);
      },
      [&](A(&sum)[kFragment]) { add_fragment<V>(residual, sum); });
  if (saves) {
    if (q.program.saves_keep) pass &= keep;
    team.saved.put(team.visits, tile, byte_of_fragments<V>(pass));
  }
  team.write(q.p.y, tile, v);
}

// ---- backward, tile by tile ---------------------------------------------------------------------------------------
// The multipliers and the saved bits of `passes`. Returns the decisions as bits of the fragment.
template <class T, int V, class A = opmath_t<T>>
FN_DEVICE uint32_t restore_noise(const StagedBackwardArguments<T>& q, const StagedTeam<T, V>& team, Seed seed,
                                 const Tile& tile, A (&m)[kFragment], uint32_t& pass) {
  pass = q.p.mask ? team.saved_bits(tile) : 0;
  if (q.p.mask && q.program.saves_keep) {
    multipliers(q.program, pass, m);
    return pass;
  }
  return q.program.noisy ? team.draw(q.program, seed, tile, m).keep : kKeepAll;
}

template <int V, class T>
FN_DEVICE auto in_registers(const Fragment<T, V>& from) {
  return [&](opmath_t<T>(&to)[kFragment]) { widen_fragment<V>(from, to); };
}
template <class T, int V>
FN_DEVICE auto on_shelf(const Shelf<T, V, 2>& shelf, int tensor) {
  return [&shelf, tensor](opmath_t<T>(&to)[kFragment]) {
    Fragment<T, V> from;
    shelf.get(tensor, from);
    widen_fragment<V>(from, to);
  };
}

// u - mean of a tile, and v: what enters an activation behind the norm, unless `saved` bits make that superfluous.
template <int V, class T, class X, class A = opmath_t<T>>
FN_DEVICE void recompute(const StagedBackwardArguments<T>& q, const StagedTeam<T, V>& team, const Affine<A>& affine,
                         const A (&m)[kFragment], bool saved, X x, const Fragment<T, V>& residual,
                         A (&centred)[kFragment], A (&v)[kFragment]) {
  x(v);
  run(
      q.program, saved ? q.program.to_norm : q.program.to_act, team.weight, m, true, false, v,
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
template <int V, class T, class X, class G, class A = opmath_t<T>>
FN_DEVICE void add_tile(const StagedBackwardArguments<T>& q, const StagedTeam<T, V>& team, const Affine<A>& affine,
                        const A (&m)[kFragment], uint32_t pass, X x, G g, const Fragment<T, V>& residual,
                        A (&sums)[kSums]) {
  A v[kFragment], dz[kFragment], centred[kFragment], part[kSums] = {};
  const bool saved = q.p.mask && q.program.saves_pass;
  recompute<V>(q, team, affine, m, saved, x, residual, centred, v);
  g(dz);
  run_back(q.program, q.program.back_to_norm, team.weight, m, saved, pass, v, dz, Nothing{}, Nothing{},
           [&](const A(&z)[kFragment], const A(&gradient)[kFragment]) {
#pragma unroll
             for (int i = 0; i < kFragment; ++i) part[2] += math::Prelu::weight_gradient(z[i], gradient[i]);
           });
#pragma unroll
  for (int i = 0; i < kFragment; ++i) {
    part[0] += dz[i];
    part[1] = math::fma(dz[i], centred[i], part[1]);
  }
  if (q.program.has_weight && !q.program.act_after) {
    x(v);
    weight_factors(q.program, m, v);
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

template <int V, class T, class X, class G, class A = opmath_t<T>>
FN_DEVICE void input_gradient_tile(const StagedBackwardArguments<T>& q, const StagedTeam<T, V>& team,
                                   const Affine<A>& affine, const math::InputGradient<A>& k, const A (&m)[kFragment],
                                   uint32_t pass, const Tile& tile, X x, G g, const Fragment<T, V>& residual) {
  A v[kFragment], gradient[kFragment], centred[kFragment];
  const bool saved = q.p.mask && q.program.saves_pass;
  recompute<V>(q, team, affine, m, saved, x, residual, centred, v);
  g(gradient);
  run_back(
      q.program, q.p.dx ? q.program.back : q.program.back_to_norm, team.weight, m, saved, pass, v, gradient,
      [&](A(&entering)[kFragment], A(&dz)[kFragment]) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) dz[i] = math::apply_input_gradient(dz[i], centred[i], k.a, k.b, k.c);
        x(entering);
        if (is(q.program.before, Stage::drop)) multiply(entering, m);
      },
      [&](const A(&added)[kFragment]) {
        if (q.p.grad_residual) team.write(q.p.grad_residual, tile, added);
      },
      Nothing{});
  if (q.p.dx) team.write(q.p.dx, tile, gradient);
}

template <class T, class A = opmath_t<T>>
FN_DEVICE void team_sums(const StagedBackwardArguments<T>& q, A (&sums)[kSums]) {
  if (q.program.has_weight) {
    team_sum(sums);
  } else {
    A first[2] = {sums[0], sums[1]};
    team_sum(first);
    sums[0] = first[0];
    sums[1] = first[1];
  }
}

// The moments of the chunk's rows.
template <class T, int V, class A = opmath_t<T>>
FN_DEVICE Pair<A> merge_window(const StagedTeam<T, V>& team, const Moments<A>& own) {
  const int64_t rows = team.window.size(team.chunk);
  const int skipped = team.chunk == 0 ? static_cast<int>(team.window.first % math::kRowsPerCall) : 0;
  return merge_team(own, rows > 0 ? rows : 1, skipped / V);
}

// ---- the kernels --------------------------------------------------------------------------------------------------
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_statistics(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const StagedTeam<T, V> team(q, in_first_pass(), false);
  const Seed seed = seed_of(q.program);
  Moments<A> m{0, 0, 0}, matched{0, 0, 0};
  Queue<T, V> x;
  team.template each<Queue<T, V>::kLength>(
      [&](int u, const Tile& tile) { team.read(q.p.x, tile, x.tile[u]); },
      [&](const Tile& tile) { gather_tile(q, team, seed, tile, x.tile[0], m, matched); }, [&] { x.move(); });
  const int64_t at = (team.group * q.chunks.count + team.chunk) * q.shape.C + team.c;
  const Pair<A> moments = merge_window(team, m);
  if (team.leads()) q.partials[at] = moments;
  if (q.matches()) {
    const Pair<A> quiet = merge_window(team, matched);
    if (team.leads()) q.matched_partials[at] = quiet;
  }
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_apply(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const StagedTeam<T, V> team(q, in_second_pass(), true);
  Pair<A> moments{0, 0}, matched{0, 0};
  const int64_t group_begin = team.group * q.chunks.count;
  const auto merged = [&](const Pair<A>* partials) {
    return merge_chunks<A>(team.window, [&](int i) { return partials[(group_begin + i) * q.shape.C + team.c]; });
  };
  if (q.training) moments = merged(q.partials);
  if (q.matches()) matched = merged(q.matched_partials);
  const Affine<A> affine = finish_statistics(q, team.group, team.window.rows, team.c, moments, matched, team.writes());
  const Seed seed = seed_of(q.program);
  Queue<T, V> x, residual;
  team.template each<Queue<T, V>::kLength>(
      [&](int u, const Tile& tile) {
        team.read(q.p.x, tile, x.tile[u]);
        if (q.p.residual) team.read(q.p.residual, tile, residual.tile[u]);
      },
      [&](const Tile& tile) { apply_tile(q, team, affine, seed, tile, x.tile[0], residual.tile[0]); },
      [&] {
        x.move();
        residual.move();
      });
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_gradient_sums(StagedBackwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const StagedTeam<T, V> team(q, in_first_pass(), false);
  const Affine<A> affine = saved_statistics(q, team.group, team.c);
  const Seed seed = seed_of(q.program);
  A sums[kSums] = {};
  BackwardQueues<T, V, 2> in;
  in.each(q, team, [&](const Tile& tile) {
    A m[kFragment];
    uint32_t pass;
    restore_noise(q, team, seed, tile, m, pass);
    add_tile<V>(q, team, affine, m, pass, in_registers<V>(in.x.tile[0]), in_registers<V>(in.g.tile[0]),
                in.residual.tile[0], sums);
  });
  team_sums(q, sums);
  if (!team.leads()) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if (i < 2 || q.program.has_weight) *q.partial(i, team.group, team.chunk, team.c) = sums[i];
  }
}

template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_staged_input_gradient(StagedBackwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const StagedTeam<T, V> team(q, in_second_pass(), true);
  A sums[kSums] = {};
  if (q.partials) {
    for (int i = threadIdx.x; i < q.chunks.count; i += blockDim.x) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        if (j < 2 || q.program.has_weight) sums[j] += *q.partial(j, team.group, i, team.c);
      }
    }
    team_sums(q, sums);
    if (team.group == 0 && blockIdx.y == 0) {
      A gradients[kSums] = {};
      if (q.groups.count == 1) {
        add_parameter_gradients(q, 0, team.window.rows, team.c, sums, gradients);
      } else {
        add_groups(q, team.c, threadIdx.x, blockDim.x, gradients);
        team_sums(q, gradients);
      }
      if (team.leads()) write_parameter_gradients(q, team.c, gradients);
    }
  }
  if (!q.p.dx && !q.p.grad_residual) return;
  const Affine<A> affine = saved_statistics(q, team.group, team.c);
  const math::InputGradient<A> k = coefficients(q, team.group, team.window.rows, team.c, sums);
  const Seed seed = seed_of(q.program);
  BackwardQueues<T, V, 2> in;
  in.each(q, team, [&](const Tile& tile) {
    A m[kFragment];
    uint32_t pass;
    restore_noise(q, team, seed, tile, m, pass);
    input_gradient_tile<V>(q, team, affine, k, m, pass, tile, in_registers<V>(in.x.tile[0]),
                           in_registers<V>(in.g.tile[0]), in.residual.tile[0]);
  });
}

// Resident, as in channels_first_resident.cuh. The residual is read where it is needed; backward of several groups is
// never resident, because the sums of all groups meet in a second kernel.
template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_staged_resident_forward(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  const StagedTeam<T, V> team(q, in_cluster(), false);
  Shelf<T, V, 1> shelf(q.chunks.length);
  const Seed seed = seed_of(q.program);
  Moments<A> m{0, 0, 0}, own_matched{0, 0, 0};
  Queue<T, V> x;
  team.template each<Queue<T, V>::kLength>([&](int u, const Tile& tile) { team.read(q.p.x, tile, x.tile[u]); },
                                           [&](const Tile& tile) {
                                             shelf.put(0, x.tile[0]);
                                             shelf.next();
                                             gather_tile(q, team, seed, tile, x.tile[0], m, own_matched);
                                           },
                                           [&] { x.move(); });
  const auto merged = [&](const Moments<A>& own) {
    return exchange(merge_window(team, own), [&](auto part) { return merge_chunks<A>(team.window, part); });
  };
  const Pair<A> moments = merged(m);
  Pair<A> matched{0, 0};
  if (q.matches()) matched = merged(own_matched);
  const Affine<A> affine = finish_statistics(q, team.group, team.window.rows, team.c, moments, matched, team.writes());
  Queue<T, V> residual;
  shelf = Shelf<T, V, 1>(q.chunks.length);
  team.template each<Queue<T, V>::kLength>(
      [&](int u, const Tile& tile) {
        if (q.p.residual) team.read(q.p.residual, tile, residual.tile[u]);
      },
      [&](const Tile& tile) {
        shelf.get(0, x.tile[0]);
        shelf.next();
        apply_tile(q, team, affine, seed, tile, x.tile[0], residual.tile[0]);
      },
      [&] { residual.move(); });
}

// What is put away beside x and g: the bits of a fragment, decisions or those of a mask that replace them.
template <class T, int V>
FN_KERNEL(kResidentThreads<T>, 1)
channels_first_staged_resident_backward(StagedBackwardArguments<T> q) {
  using A = opmath_t<T>;
  const StagedTeam<T, V> team(q, in_cluster(), false);
  Shelf<T, V, 2> shelf(q.chunks.length);
  const Affine<A> affine = saved_statistics(q, team.group, team.c);
  const Seed seed = seed_of(q.program);
  A sums[kSums] = {};
  BackwardQueues<T, V, kTilesInFlight<T, V>> in;
  in.each(q, team, [&](const Tile& tile) {
    A m[kFragment];
    uint32_t pass;
    shelf.put(0, in.x.tile[0]);
    shelf.put(1, in.g.tile[0]);
    const uint32_t keep = restore_noise(q, team, seed, tile, m, pass);
    add_tile<V>(q, team, affine, m, pass, on_shelf(shelf, 0), on_shelf(shelf, 1), in.residual.tile[0], sums);
    *shelf.byte = static_cast<uint8_t>(keep);
    shelf.next();
  });
  team_sums(q, sums);
  shelf = Shelf<T, V, 2>(q.chunks.length);
  const auto exchanged = [&](A& first, A& second) {
    const Pair<A> all = exchange(Pair<A>{first, second}, [&](auto part) { return sum_chunks<A>(q.chunks, part); });
    first = all.first;
    second = all.second;
  };
  exchanged(sums[0], sums[1]);
  if (q.program.has_weight) {
    A none = 0;
    exchanged(sums[2], sums[3]);
    exchanged(sums[4], none);
  }
  if (team.writes()) {
    A gradients[kSums] = {};
    add_parameter_gradients(q, 0, team.window.rows, team.c, sums, gradients);
    write_parameter_gradients(q, team.c, gradients);
  }
  const math::InputGradient<A> k = coefficients(q, team.group, team.window.rows, team.c, sums);
  team.template each<Queue<T, V, kTilesInFlight<T, V>>::kLength>(
      [&](int u, const Tile& tile) {
        if (q.p.residual) team.read(q.p.residual, tile, in.residual.tile[u]);
      },
      [&](const Tile& tile) {
        A m[kFragment];
        const uint32_t keep = *shelf.byte;
        const uint32_t pass = q.program.saves_keep ? keep : q.p.mask ? team.saved_bits(tile) : 0;
        if (q.program.noise == Noise::bernoulli) {
          multipliers(q.program, keep, m);
        } else if (q.program.noisy) {
          team.draw(q.program, seed, tile, m);
        }
        input_gradient_tile<V>(q, team, affine, k, m, pass, tile, on_shelf(shelf, 0), on_shelf(shelf, 1),
                               in.residual.tile[0]);
        shelf.next();
      },
      [&] { in.residual.move(); });
}

// ---- noise alone --------------------------------------------------------------------------------------------------
// y = x * m, or m where there is no x.
template <class T, int V>
FN_KERNEL(256, kBackwardBlocks)
channels_first_noise(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  const StagedTeam<T, V> team(q, in_first_pass(), false);
  const Seed seed = seed_of(q.program);
  Queue<T, V> x;
  team.template each<Queue<T, V>::kLength>(
      [&](int u, const Tile& tile) {
        if (q.p.x) team.read(q.p.x, tile, x.tile[u]);
      },
      [&](const Tile& tile) {
        A v[kFragment], m[kFragment];
        team.draw(q.program, seed, tile, m);
        widen_fragment<V>(x.tile[0], v);
#pragma unroll
        for (int i = 0; i < kFragment; ++i) v[i] = q.p.x ? v[i] * m[i] : m[i];
        team.write(q.p.y, tile, v);
      },
      [&] { x.move(); });
}

}  // namespace fusednorm::cuda

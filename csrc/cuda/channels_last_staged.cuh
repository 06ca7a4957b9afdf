// Channels-last kernels for every chain, and for the groups of a batch: the two passes of channels_last.cuh over what
// program_tile.cuh does to a fragment. A fragment is 8 values here too, so that few programs are walked: 8 / V
// rows of the thread's V <= 2 channels.
//
// A Philox call serves 8 rows of one channel, a fragment some rows of all. Decisions wait for their rows as bits in
// registers; multipliers, which are numbers, in shared memory, where each thread comes back for its own.
//
// Blocks: x = columns, of one group after another; y = chunk of rows.
#pragma once

#include <algorithm>

#include "channels_last.cuh"
#include "program_tile.cuh"

namespace fusednorm::cuda {

constexpr int kStagedColumns = 2;  // V at most: sums, coefficients and weights of more would spill
template <class T, int V>
constexpr int kFragmentRows = kFragment / V;

// The rows that a thread asks for before it uses any: some bytes of a tensor, but a fragment at least, and not more
// backward, where up to three tensors are read.
constexpr int kForwardBytes = 64, kBackwardBytes = 0;
template <class T, int V, int Bytes>
constexpr int kRowsInFlight = std::clamp<int>(Bytes / (V * sizeof(T)), kFragmentRows<T, V>, kRows);

// Shared memory: behind what sums over columns need, for noise that is a number, V * 8 of those for each thread.
template <class A, int V>
FN_DEVICE int behind_columns() {
  return column_scratch<A, V>(block_threads(), blockDim.x);
}
constexpr int64_t multiplier_bytes(int V, int threads) { return int64_t{V} * kRows * threads * sizeof(float); }

// A group of 8 rows, of which [from, to) belong to the chunk, and those of the bits `counting` count. Others are read
// as zeros, and written as such if they belong to it.
struct Eight {
  int64_t row;
  int from, to;
  uint32_t counting;
  FN_DEVICE bool there(int i) const { return i >= from && i < to; }
  FN_DEVICE bool counts(int i) const { return there(i) && (counting >> i & 1u); }
};

template <class T, int V>
struct StagedColumns : Columns<T, V> {
  using A = opmath_t<T>;
  using Columns<T, V>::c;
  int64_t group;
  Window window;
  template <class Arguments>
  FN_DEVICE StagedColumns(const Arguments& q, Place place)
      : Columns<T, V>(q.shape, Place{q.groups.block_x(place), place.chunk}),
        group(q.groups.group(place)),
        window(q.chunks, q.groups, group, q.counting) {}

  FN_DEVICE Eight eight(int64_t row) const {
    const int64_t end = window.end(this->chunk);
    return {row, row < window.first ? static_cast<int>(window.first - row) : 0,
            row + kRows < end ? kRows : static_cast<int>(end - row),
            window.counting.bits ? window.counting.bits[row / kRows] : 0xffu};
  }
  // Rows from the group's row `at` on.
  template <int N>
  FN_DEVICE void read(const T* p, const Eight& rows, int at, Pack<T, V> (&to)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = rows.counts(at + i) ? load<V>(p + (rows.row + at + i) * this->C + c) : Pack<T, V>{};
    }
  }
  FN_DEVICE void write(T* p, const Eight& rows, int at, const A (&from)[kFragment]) const {
#pragma unroll
    for (int i = 0; i < kFragmentRows<T, V>; ++i) {
      if (!rows.there(at + i)) continue;
      store<V>(p + (rows.row + at + i) * this->C + c, rows.counts(at + i) ? narrow<T, V>(from + i * V) : Pack<T, V>{});
    }
  }
  FN_DEVICE void weights(const Vector& act_weight, A (&to)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = cuda::read<A>(act_weight, c + v, A(0));
  }
};

// Tensors' rows on their way.
template <class T, int V, int Bytes>
struct RowQueue {
  static constexpr int kLength = kRowsInFlight<T, V, Bytes>;
  Pack<T, V> row[kLength];
  FN_DEVICE void move() {
#pragma unroll
    for (int i = 0; i + kFragmentRows<T, V> < kLength; ++i) row[i] = row[i + kFragmentRows<T, V>];
  }
  template <class A>
  FN_DEVICE void widen_to(A (&to)[kFragment]) const {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) to[i] = widen(row[i / V], i % V);
  }
  template <class A>
  FN_DEVICE void add_to(A (&to)[kFragment]) const {
#pragma unroll
    for (int i = 0; i < kFragment; ++i) to[i] += widen(row[i / V], i % V);
  }
};

// begin(rows) for the thread's groups of 8 rows; then read(rows, at) for as many rows as are in flight, and f(rows,
// at), move() for their fragments, at: their first row in the group; finally end(rows).
template <int Bytes, class T, int V, class Begin, class Read, class F, class Move, class End>
FN_DEVICE void each_fragment(const StagedColumns<T, V>& columns, bool descending, Begin begin, Read read, F f,
                             Move move, End end) {
  columns.each_group(columns.window, descending, [&](int64_t row, int) {
    const auto rows = columns.eight(row);
    begin(rows);
#pragma unroll 1
    for (int at = 0; at < kRows;) {
      read(rows, at);
#pragma unroll 1
      for (int i = 0; i < kRowsInFlight<T, V, Bytes>; i += kFragmentRows<T, V>) {
        f(rows, at);
        move();
        at += kFragmentRows<T, V>;
      }
    }
    end(rows);
  });
}

// ---- noise --------------------------------------------------------------------------------------------------------
// The bits of the fragment that begins with the group's row `row`, from those of the group, and into them.
template <int V>
FN_DEVICE uint32_t fragment_bits(const Decisions<V>& from, int row) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kFragment; ++i) bits |= static_cast<uint32_t>(from.keeps(i % V, row + i / V)) << i;
  return bits;
}
template <int V>
FN_DEVICE void add_bits(Decisions<V>& to, uint32_t bits, int row) {
#pragma unroll
  for (int i = 0; i < kFragment; ++i) to.add(i % V, (bits >> i & 1u) << (row + i / V));
}

// What a group of 8 rows drew.
template <class T, int V>
struct RowNoise {
  using A = opmath_t<T>;
  int base;  // of the multipliers in shared memory, in bytes
  Decisions<V> keep{0xffu};

  FN_DEVICE float* at(int row, int v) const {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return shared_memory<float>(base) + (row * V + v) * threads + thread;
  }

  FN_DEVICE void draw(const Program<A>& q, Seed seed, const StagedColumns<T, V>& columns, int64_t row, int64_t S) {
    if (q.noise == Noise::constant) return;
    if (q.noise == Noise::bernoulli) keep = Decisions<V>(0u);
    q.draw == Draw::each_sample ? draw_samples(q, seed, columns, row, S) : draw_rows(q, seed, columns, row);
  }

  // The multipliers of the fragment that begins with the group's row `row`.
  FN_DEVICE void fragment(const Program<A>& q, int row, A (&m)[kFragment]) const {
    if (q.noise == Noise::uniform || q.noise == Noise::gaussian) {
#pragma unroll
      for (int i = 0; i < kFragment; ++i) m[i] = static_cast<A>(*at(row + i / V, i % V));
    } else {
      multipliers(q, fragment_bits(keep, row), m);
    }
  }

 private:
  FN_DEVICE static uint32_t channel(const Program<A>& q, const StagedColumns<T, V>& columns, int v) {
    return q.one_channel ? 0u : static_cast<uint32_t>(columns.c) + v;
  }

  FN_DEVICE void draw_rows(const Program<A>& q, Seed seed, const StagedColumns<T, V>& columns, int64_t row) {
#pragma unroll 1
    for (int v = 0; v < V; ++v) {
      float m[kRows] = {};
      const uint32_t byte = draw_call(q, seed, row / kRows, channel(q, columns, v), m);
      if (q.noise == Noise::bernoulli) {
        keep.add(v, byte);
      } else {
#pragma unroll
        for (int i = 0; i < kRows; ++i) *at(i, v) = m[i];
      }
    }
  }

  // Row after row; a sample's draws are made at its first row here, and stay for the others.
  FN_DEVICE void draw_samples(const Program<A>& q, Seed seed, const StagedColumns<T, V>& columns, int64_t row,
                              int64_t S) {
#pragma unroll 1
    for (int v = 0; v < V; ++v) {
      int64_t n = row / S, s = row - n * S;
      float m = 0;
      uint32_t bit = 0;
#pragma unroll 1
      for (int i = 0; i < kRows; ++i) {
        if (i == 0 || s == 0) {
          const uint32_t own = n % kRows;
          float drawn[kRows] = {};
          bit = draw_call(q, seed, n / kRows, channel(q, columns, v), drawn) >> own & 1u;
#pragma unroll
          for (uint32_t from = 0; from < kRows; ++from) {
            if (from == own) m = drawn[from];
          }
        }
        if (q.noise == Noise::bernoulli) {
          keep.add(v, bit << i);
        } else {
          *at(i, v) = m;
        }
        if (++s == S) {
          s = 0;
          ++n;
        }
      }
    }
  }
};

template <int V, class T>
FN_DEVICE Decisions<V> load_decisions(const uint8_t* mask, const Columns<T, V>& columns, int64_t row) {
  const Pack<uint8_t, V> bytes = load<V>(mask + row / kRows * columns.C + columns.c);
  Decisions<V> bits(0u);
#pragma unroll
  for (int v = 0; v < V; ++v) bits.add(v, bytes.word[v]);
  return bits;
}

// ---- forward ------------------------------------------------------------------------------------------------------
// Adds a fragment to the moments of its columns.
template <int V, class A>
FN_DEVICE void merge_values(Moments<A> (&m)[V], const A (&u)[kFragment], const Eight& rows, int at) {
#pragma unroll
  for (int i = 0; i < kFragment / V; ++i) {
    if (!rows.counts(at + i)) continue;
    const A share = A(1) / (m[0].count + A(1));  // all columns have as many
#pragma unroll
    for (int v = 0; v < V; ++v) m[v] = math::merge(m[v], Moments<A>{A(1), u[i * V + v], A(0)}, share);
  }
}

// Columns of threads whose chunk is empty still take part.
template <class T, int V, class A = opmath_t<T>>
FN_DEVICE void write_moments(const StagedForwardArguments<T>& q, const StagedColumns<T, V>& columns,
                             const Moments<A> (&m)[V], Pair<A>* partials) {
  const int64_t rows = columns.window.size(columns.chunk);
  A mean[V], m2[V];
  merge_column(m, rows > 0 ? rows : 1, mean, m2);
  write_partials(partials + columns.group * q.chunks.count * columns.C, columns, mean, m2);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_staged_statistics(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const StagedColumns<T, V> columns(q, in_first_pass());
  const Seed seed = seed_of(q.chain);
  A weight[V];
  columns.weights(q.p.act_weight, weight);
  Moments<A> m[V], matched[V];
#pragma unroll
  for (int v = 0; v < V; ++v) m[v] = matched[v] = {0, 0, 0};
  RowQueue<T, V, kForwardBytes> x;
  RowNoise<T, V> noise{behind_columns<A, V>()};
  each_fragment<kForwardBytes>(
      columns, false,
      [&](const Eight& rows) {
        if (q.chain.noisy_before) noise.draw(q.chain, seed, columns, rows.row, q.shape.S);
        if (q.p.mask && q.chain.saves_keep && q.chain.noisy_before) {
          save_decisions(q.p.mask, columns, rows.row, noise.keep);
        }
      },
      [&](const Eight& rows, int at) { columns.read(q.p.x, rows, at, x.row); },
      [&](const Eight& rows, int at) {
        A u[kFragment], multiplier[kFragment];
        if (q.chain.noisy_before) noise.fragment(q.chain, at, multiplier);
#pragma unroll 1
        for (bool noisy = !q.gathers(1);; noisy = true) {
          x.widen_to(u);
          run(q.chain, q.chain.before, weight, multiplier, noisy, false, u, Nothing{}, Nothing{});
          noisy ? merge_values(m, u, rows, at) : merge_values(matched, u, rows, at);
          if (noisy) break;
        }
      },
      [&] { x.move(); }, [](const Eight&) {});
  write_moments(q, columns, m, q.partials[0]);
  if (q.gathers(1)) write_moments(q, columns, matched, q.partials[1]);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_staged_apply(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const StagedColumns<T, V> columns(q, in_second_pass());
  const Table<A, V> table;
  const auto merge = [&](const Pair<A>* partials, int row) {
    const Pair<A>* of_group = partials + columns.group * q.chunks.count * columns.C;
    merge_chunks<V>(columns.window, Partials<A>{of_group, columns.C, columns.block_c},
                    [&](int channel, Pair<A> moments) {
                      table.at(row, channel) = moments.first;
                      table.at(row + 1, channel) = moments.second;
                    });
    barrier();
  };
  A moments[4][V] = {}, weight[V];  // mean and squares, with noise and matched
  if (q.training) merge(q.partials[0], 0);
  if (q.gathers(1)) merge(q.partials[1], 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < 2 ? q.training : q.gathers(1)) table.get(i, moments[i]);
  }
  Affine<A> affine[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    affine[v] = finish_statistics(q, columns.group, columns.window.rows, columns.c + v,
                                  {{moments[0][v], moments[1][v]}, {moments[2][v], moments[3][v]}},
                                  columns.leads() && blockIdx.y == 0);
  }
  if (!q.p.y) return;
  columns.weights(q.p.act_weight, weight);
  const Seed seed = seed_of(q.chain);
  const bool saves_pass = q.p.mask && q.chain.saves_pass, saves_keep = q.p.mask && !q.chain.saves_pass;
  const bool saved = saves_keep && q.chain.noisy_before && q.training;  // by the statistics
  RowQueue<T, V, kForwardBytes> x, residual;
  RowNoise<T, V> noise{behind_columns<A, V>()};
  Decisions<V> pass(0u);
  each_fragment<kForwardBytes>(
      columns, true,
      [&](const Eight& rows) {
        if (saved) {
          noise.keep = load_decisions<V>(q.p.mask, columns, rows.row);
        } else if (q.chain.noisy) {
          noise.draw(q.chain, seed, columns, rows.row, q.shape.S);
          if (saves_keep) save_decisions(q.p.mask, columns, rows.row, noise.keep);
        }
        pass = Decisions<V>(0u);
      },
      [&](const Eight& rows, int at) {
        columns.read(q.p.x, rows, at, x.row);
        if (q.p.residual) columns.read(q.p.residual, rows, at, residual.row);
      },
      [&](const Eight& rows, int at) {
        A v[kFragment], multiplier[kFragment];
        if (q.chain.noisy) noise.fragment(q.chain, at, multiplier);
        x.widen_to(v);
        uint32_t bits = run(
            q.chain, q.chain.all, weight, multiplier, true, saves_pass, v,
            [&](A(&u)[kFragment]) {
#pragma unroll
              for (int i = 0; i < kFragment; ++i) u[i] = affine[i % V](u[i]);
            },
            [&](A(&sum)[kFragment]) { residual.add_to(sum); });
        if (saves_pass) {
          if (q.chain.saves_keep) bits &= fragment_bits(noise.keep, at);
          add_bits(pass, bits, at);
        }
        columns.write(q.p.y, rows, at, v);
      },
      [&] {
        x.move();
        residual.move();
      },
      [&](const Eight& rows) {
        if (saves_pass) save_decisions(q.p.mask, columns, rows.row, pass);
      });
}

// ---- backward -----------------------------------------------------------------------------------------------------
// f(rows, at, m, pass, v, g, u - mean, x) for the thread's fragments of a chunk. v: what enters an activation behind
// the norm; pass: bits that may replace it.
template <class T, int V, class A, class F>
FN_DEVICE void each_gradient(const StagedBackwardArguments<T>& q, const StagedColumns<T, V>& columns,
                             const Affine<A> (&affine)[V], const A (&weight)[V], bool descending, F f) {
  const Seed seed = seed_of(q.chain);
  const bool saved_pass = q.p.mask && q.chain.saves_pass, saved_keep = q.p.mask && q.chain.saves_keep;
  RowQueue<T, V, kBackwardBytes> x, g;
  RowNoise<T, V> noise{behind_columns<A, V>()};
  Decisions<V> pass(0u);
  each_fragment<kBackwardBytes>(
      columns, descending,
      [&](const Eight& rows) {
        if (q.p.mask) pass = load_decisions<V>(q.p.mask, columns, rows.row);
        if (saved_keep) {
          noise.keep = pass;
        } else if (q.chain.noisy) {
          noise.draw(q.chain, seed, columns, rows.row, q.shape.S);
        }
      },
      [&](const Eight& rows, int at) {
        columns.read(q.p.x, rows, at, x.row);
        columns.read(q.p.g, rows, at, g.row);
      },
      [&](const Eight& rows, int at) {
        A v[kFragment], gradient[kFragment], centred[kFragment], multiplier[kFragment];
        if (q.chain.noisy) noise.fragment(q.chain, at, multiplier);
        x.widen_to(v);
        run(
            q.chain, saved_pass ? q.chain.to_norm : q.chain.to_act, weight, multiplier, true, false, v,
            [&](A(&u)[kFragment]) {
#pragma unroll
              for (int i = 0; i < kFragment; ++i) {
                centred[i] = u[i] - affine[i % V].mean;
                u[i] = affine[i % V](u[i]);
              }
            },
            [&](A(&sum)[kFragment]) {  // read here: few orders need it, and ahead of time it would take registers
              RowQueue<T, V, kBackwardBytes> residual;
              columns.read(q.p.residual, rows, at, residual.row);
              residual.add_to(sum);
            });
        g.widen_to(gradient);
        f(rows, at, multiplier, fragment_bits(pass, at), v, gradient, centred, x);
      },
      [&] {
        x.move();
        g.move();
      },
      [](const Eight&) {});
}

template <int V, class T, class A>
FN_DEVICE void column_sums(const StagedBackwardArguments<T>& q, A (&sums)[V][kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    if (!q.gathers(i)) break;
    A of_columns[V];
#pragma unroll
    for (int v = 0; v < V; ++v) of_columns[v] = sums[v][i];
    column_sum(of_columns);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v][i] = of_columns[v];
  }
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_staged_gradient_sums(StagedBackwardArguments<T> q) {
  using A = opmath_t<T>;
  next_grid_may_start();
  const StagedColumns<T, V> columns(q, in_first_pass());
  Affine<A> affine[V];
  A weight[V], sums[V][kSums] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) affine[v] = saved_statistics(q, columns.group, columns.c + v);
  columns.weights(q.p.act_weight, weight);
  const bool saved = q.p.mask && q.chain.saves_pass;
  each_gradient(q, columns, affine, weight, false,
                [&](const Eight& rows, int at, const A(&m)[kFragment], uint32_t pass, A(&v)[kFragment],
                    A(&dz)[kFragment], const A(&centred)[kFragment], const auto& x) {
                  run_back(q.chain, q.chain.back_to_norm, weight, m, saved, pass, v, dz, Nothing{}, Nothing{},
                           [&](const A(&z)[kFragment], const A(&gradient)[kFragment]) {
#pragma unroll
                             for (int i = 0; i < kFragment; ++i) {
                               sums[i % V][2] += math::Prelu::weight_gradient(z[i], gradient[i]);
                             }
                           });
#pragma unroll
                  for (int i = 0; i < kFragment; ++i) {
                    sums[i % V][0] += dz[i];
                    sums[i % V][1] = math::fma(dz[i], centred[i], sums[i % V][1]);
                  }
                  if (q.chain.has_weight && !q.chain.act_after) {
                    x.widen_to(v);
                    weight_factors(q.chain, m, v);
#pragma unroll
                    for (int i = 0; i < kFragment; ++i) {
                      sums[i % V][2] = math::fma(dz[i], v[i], sums[i % V][2]);
                      sums[i % V][3] = math::fma(centred[i], v[i], sums[i % V][3]);
                      sums[i % V][4] += v[i];
                    }
                  }
                });
  column_sums(q, sums);
  if (!columns.leads()) return;
#pragma unroll
  for (int v = 0; v < V; ++v) write_partials(q, columns.group, columns.chunk, columns.c + v, sums[v]);
}

template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_staged_input_gradient(StagedBackwardArguments<T> q) {
  using A = opmath_t<T>;
  previous_grid_ends();
  const StagedColumns<T, V> columns(q, in_second_pass());
  const int64_t rows = columns.window.rows;
  Affine<A> affine[V];
  A sums[V][kSums] = {}, gradients[V][kSums] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) affine[v] = saved_statistics(q, columns.group, columns.c + v);
  if (q.p.given) {
#pragma unroll
    for (int v = 0; v < V; ++v) read_given(q, columns.c + v, sums[v]);
  } else if (q.partials) {
    for (int chunk = threadIdx.y; chunk < q.chunks.count; chunk += blockDim.y) {
#pragma unroll
      for (int v = 0; v < V; ++v) add_partials(q, columns.group, chunk, columns.c + v, sums[v]);
    }
    column_sums(q, sums);
  }
  if (q.p.given || q.partials) {
    if (columns.group == 0 && blockIdx.y == 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (q.groups.count == 1) {
          add_parameter_gradients(q, 0, rows, columns.c + v, affine[v].scale, sums[v], gradients[v]);
        } else {
          add_groups(q, columns.c + v, threadIdx.y, blockDim.y, gradients[v]);
        }
      }
      if (q.groups.count > 1) column_sums(q, gradients);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (!columns.leads()) continue;
        write_parameter_gradients(q, columns.c + v, gradients[v]);
        write_sums(q, columns.c + v, sums[v]);
      }
    }
  }
  if (!q.p.dx && !q.p.grad_residual) return;
  math::InputGradient<A> k[V];
  A weight[V];
#pragma unroll
  for (int v = 0; v < V; ++v) k[v] = coefficients(q, columns.group, rows, columns.c + v, affine[v].scale, sums[v]);
  columns.weights(q.p.act_weight, weight);
  const bool saved = q.p.mask && q.chain.saves_pass;
  each_gradient(q, columns, affine, weight, true,
                [&](const Eight& rows, int at, const A(&m)[kFragment], uint32_t pass, A(&v)[kFragment],
                    A(&gradient)[kFragment], const A(&centred)[kFragment], const auto& x) {
                  run_back(
                      q.chain, q.p.dx ? q.chain.back : q.chain.back_to_norm, weight, m, saved, pass, v, gradient,
                      [&](A(&entering)[kFragment], A(&dz)[kFragment]) {
#pragma unroll
                        for (int i = 0; i < kFragment; ++i) {
                          dz[i] = math::apply_input_gradient(dz[i], centred[i], k[i % V].a, k[i % V].b, k[i % V].c);
                        }
                        x.widen_to(entering);
                        if (is(q.chain.before, Stage::drop)) multiply(entering, m);
                      },
                      [&](const A(&added)[kFragment]) {
                        if (q.p.grad_residual) columns.write(q.p.grad_residual, rows, at, added);
                      },
                      Nothing{});
                  if (q.p.dx) columns.write(q.p.dx, rows, at, gradient);
                });
}

// ---- noise alone --------------------------------------------------------------------------------------------------
template <class T, int V>
FN_KERNEL(256, kColumnBlocks)
channels_last_noise(StagedForwardArguments<T> q) {
  using A = opmath_t<T>;
  const StagedColumns<T, V> columns(q, in_first_pass());
  const Seed seed = seed_of(q.chain);
  RowQueue<T, V, kForwardBytes> x;
  RowNoise<T, V> noise{behind_columns<A, V>()};
  each_fragment<kForwardBytes>(
      columns, false, [&](const Eight& rows) { noise.draw(q.chain, seed, columns, rows.row, q.shape.S); },
      [&](const Eight& rows, int at) {
        if (q.p.x) columns.read(q.p.x, rows, at, x.row);
      },
      [&](const Eight& rows, int at) {
        A v[kFragment], m[kFragment];
        noise.fragment(q.chain, at, m);
        x.widen_to(v);
#pragma unroll
        for (int i = 0; i < kFragment; ++i) v[i] = q.p.x ? v[i] * m[i] : m[i];
        columns.write(q.p.y, rows, at, v);
      },
      [&] { x.move(); }, [](const Eight&) {});
}

}  // namespace fusednorm::cuda

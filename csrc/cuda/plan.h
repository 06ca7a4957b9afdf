// How a call is cut into blocks and threads. The numbers depend on the shape and the machine only, so a run repeats
// bit for bit on the same kind of GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backend.h"

namespace fusednorm::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Plan {
  int threads_x, threads_y;  // of a block
  int64_t blocks_x;
  int64_t chunk_rows;
  int chunks;  // blocks_y
};

// The rows of a channel that have statistics of their own, and how often: a whole channel, once, unless a batch has
// groups. Chunks begin at multiples of 8 rows of the whole batch, so up to 7 rows of them may lie before the group.
struct Cut {
  int64_t rows, groups;
  int64_t span() const { return groups > 1 && rows % 8 != 0 ? rows + 7 : rows; }
};

// Blocks of 256 threads that a multiprocessor holds at once, which is what the kernels are compiled for: 80 registers a
// thread forward, channels-first, and 128 elsewhere.
inline constexpr int kForwardBlocks = 3, kBackwardBlocks = 2, kColumnBlocks = 2;
constexpr int kTileRows = 256;  // channels-first, a warp's unit
constexpr int kMaxChunks = 65535;
constexpr int64_t kMaxChunkRows = 1 << 30;

// Chunks of a channel: as many as make one wave of blocks over the GPU, if that nearly fills it; else so many that the
// last of several waves matters little.
inline int64_t wanted_chunks(int64_t blocks_x, int blocks, const Machine& machine) {
  const int64_t wave = int64_t{machine.multiprocessors} * blocks;
  const int64_t chunks = wave / blocks_x;
  return 5 * chunks * blocks_x >= 4 * wave ? chunks : ceil_div(4 * wave, blocks_x);
}

// Channels-first, flat: as many adjacent channels as a vector has values, so that the rows of all of them in a sample
// are whole vectors, whatever their number.
inline Plan plan_flat(const Shape& shape, int vector, const Machine& machine) {
  Plan plan{machine.threads / vector, vector, 0, 0, 0};
  plan.blocks_x = shape.C / vector;
  return plan;
}

// The rows of a channel over `chunks` blocks or fewer, in chunks of a multiple of `unit` rows.
inline void cut(Plan& plan, int64_t rows, int64_t chunks, int64_t unit) {
  chunks = std::clamp<int64_t>(std::max(chunks, ceil_div(rows, kMaxChunkRows)), 1, kMaxChunks);
  plan.chunk_rows = round_up(ceil_div(rows, chunks), unit);
  plan.chunks = static_cast<int>(ceil_div(rows, plan.chunk_rows));
}

// Channels-first: blockDim.x threads to a channel, 8 rows to a thread at a time. Where a channel has few rows, or a
// sample is shorter than some sectors of memory, a block takes several adjacent channels.
inline Plan plan_teams(const Shape& shape, const Cut& part, int bytes, const Machine& machine) {
  constexpr int kRowsPerThread = 8, kRun = 256;
  Plan plan{machine.threads, 1, 0, 0, 0};
  while (plan.threads_x > 32 &&
         (plan.threads_x / 2 * kRowsPerThread >= part.span() || plan.threads_y * shape.S * bytes < kRun) &&
         plan.threads_y < shape.C) {
    plan.threads_x /= 2;
    plan.threads_y *= 2;
  }
  plan.blocks_x = ceil_div(shape.C, plan.threads_y);
  return plan;
}

inline Plan plan_channels_first(const Shape& shape, const Cut& part, int bytes, int blocks, const Machine& machine) {
  Plan plan = plan_teams(shape, part, bytes, machine);
  cut(plan, part.span(), wanted_chunks(plan.blocks_x * part.groups, blocks, machine), kTileRows);
  return plan;
}

// Channels-last: threads side by side for 128 bytes of a row, or 64 where that leaves a single block; the columns are
// shared out evenly. Not more: every block of the second kernel reads the partial sums of its columns' chunks, and the
// chunks are as many as the blocks side by side are few.
inline Plan plan_channels_last(const Shape& shape, const Cut& part, int vector, int bytes, const Machine& machine) {
  const int64_t vectors = ceil_div(shape.C, vector), wide = std::clamp(128 / (vector * bytes), 1, 32);
  Plan plan{};
  plan.blocks_x = ceil_div(vectors, vectors > wide ? wide : std::max<int64_t>(wide / 2, 1));
  plan.threads_x = static_cast<int>(ceil_div(vectors, plan.blocks_x));
  plan.threads_y = static_cast<int>(std::clamp<int64_t>(ceil_div(part.span(), 8), 1, machine.threads / plan.threads_x));
  cut(plan, part.span(), wanted_chunks(plan.blocks_x * part.groups, kColumnBlocks, machine), plan.threads_y * 8);
  return plan;
}

// Residency, channels-first: the smallest cluster whose blocks each hold their share of a channel in half of a
// multiprocessor's shared memory (so that two blocks run there, and one loads while the other stores) and which gives
// every multiprocessor a block; failing that, the largest one whose blocks hold the channel at all and give half of the
// multiprocessors one. Clusters are powers of two. `teams` is how the channels are shared out, `unit` what the rows of
// a chunk are a multiple of, bytes_of(plan) what a block stores. Returns whether there is one; the plan's chunks are
// the blocks of the cluster.
constexpr int kReservedShared = 1024;  // bytes that the hardware keeps of each block's share
inline int half_of_shared(const Machine& machine) { return (machine.shared_per_block - kReservedShared) / 2; }
template <class BytesOf>
bool plan_resident(const Plan& teams, const Cut& part, int64_t unit, const Machine& machine, Plan& plan,
                   BytesOf bytes_of) {
  if (machine.residency == Residency::never) return false;
  const bool always = machine.residency == Residency::always_if_it_fits;

  Plan next = teams;
  bool found = false;
  for (int cluster = 1; cluster <= machine.max_cluster; cluster *= 2) {
    cut(next, part.span(), cluster, unit);
    if (next.chunks != cluster) continue;  // the channel is too short for so many
    const int64_t needed = bytes_of(next), blocks = next.blocks_x * part.groups * cluster;
    if (needed <= machine.shared_per_block && (always || 2 * blocks >= machine.multiprocessors)) {
      plan = next;
      found = true;
    }
    if (needed <= half_of_shared(machine) && (always || blocks >= machine.multiprocessors)) break;
  }
  return found;
}

}  // namespace fusednorm::cuda

// What changes from call to call: the running statistics, and the seed of the noise. One small launch each.
#include "../math/noise.h"
#include "backend.h"
#include "reduce.cuh"

namespace fusednorm::cuda {

// torch's running statistics: an exponential average, or the plain one, with the unbiased variance. For the plain one a
// single block, because its factor comes from num_batches_tracked, which it also advances. Groups follow one another as
// batches would; those of a few steps are fetched at once, or each step would wait for memory.
FN_KERNEL(256, 1)
update_statistics_kernel(UpdateStatistics p) {
  constexpr int kAhead = 4;
  int64_t before = 0;
  if (p.num_batches_tracked && blockIdx.x == 0) {
    before = *p.num_batches_tracked;
    barrier();  // all have read
    if (threadIdx.x == 0) *p.num_batches_tracked = before + p.groups;
  }
  if (!p.counts && p.last_count == 0) return;
  const auto unbiased = [](double n) { return n / (n > 2 ? n - 1 : 1.0); };
  const double usual = unbiased(static_cast<double>(p.count)), last = unbiased(static_cast<double>(p.last_count));
  for (int64_t c = blockIdx.x * blockDim.x + threadIdx.x; c < p.C; c += gridDim.x * blockDim.x) {
    double running_mean = read<double>(p.running_mean, c), running_var = read<double>(p.running_var, c);
    for (int64_t group = 0; group < p.groups; group += kAhead) {
      double mean[kAhead], var[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (group + i >= p.groups) break;
        mean[i] = read<double>(p.mean, (group + i) * p.C + c, 0.0);
        var[i] = read<double>(p.var, (group + i) * p.C + c, 0.0);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (group + i >= p.groups) break;
        const double factor = p.cumulative ? 1.0 / static_cast<double>(before + group + i + 1) : p.momentum;
        double correction = group + i == p.groups - 1 ? last : usual;
        if (p.counts) {
          const double values = p.counts[group + i];
          if (values == 0) continue;
          correction = unbiased(values);
        }
        running_mean = (1 - factor) * running_mean + factor * mean[i];
        running_var = (1 - factor) * running_var + factor * (correction * var[i]);
      }
    }
    write(p.running_mean, c, running_mean);
    write(p.running_var, c, running_var);
  }
}

void update_statistics(const Context& context, const UpdateStatistics& p) {
  const int64_t threads = context.machine.threads, blocks = p.cumulative ? 1 : (p.C + threads - 1) / threads;
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
  launch("update_statistics", Launch{grid, block, 0, 1, context.stream, 0, false}, update_statistics_kernel, p);
}

// What make_chain computes of a number (ops.cpp), of one in its range.
FN_KERNEL(32, 1)
realise_kernel(Realise p) {
  if (threadIdx.x != 0) return;
  Live live{p.chain.threshold, p.chain.strength, p.chain.multiplier, p.sample ? *p.sample * p.draws : 0};
  if (p.p) {
    const double value = *p.p;
    if (p.chain.noise == Noise::gaussian) {
      live.strength = static_cast<float>(sqrt(value));
    } else {
      live.threshold = value > 0 ? math::keep_threshold(value) : kAllKept;
      live.strength = static_cast<float>(value);
      live.multiplier = value < 1 ? math::keep_scale(live.threshold) : 0;
    }
  }
  *p.to = live;
}

void realise(const Context& context, const Realise& p) {
  launch("realise", Launch{dim3(1), dim3(32), 0, 1, context.stream, 0, false}, realise_kernel, p);
}

// The published ten rounds here: a seed must not resemble the draws that are made from it.
FN_KERNEL(32, 1)
draw_seed_kernel(DrawSeed p) {
  const int64_t seed = p.captured ? *p.captured_seed : static_cast<int64_t>(p.seed);
  const uint64_t offset = p.captured ? static_cast<uint64_t>(*p.captured_offset) + p.offset_in_graph : p.offset;
  math::Counter x = math::counter(offset, 0);
  math::philox4x32<10>(x.word, math::split_seed(seed));
  if (threadIdx.x == 0) *p.out = static_cast<int64_t>(uint64_t{x.word[1]} << 32 | x.word[0]);
}

bool compiled_for_clusters() { return compiled_for_clusters(draw_seed_kernel); }

void draw_seed(const Context& context, const DrawSeed& p) {
  launch("draw_seed", Launch{dim3(1), dim3(32), 0, 1, context.stream, 0, false}, draw_seed_kernel, p);
}

}  // namespace fusednorm::cuda

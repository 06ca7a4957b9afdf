// What changes from call to call: the running statistics, and the seed of the noise. One small launch each.
#include "../math/noise.h"
#include "backend.h"
#include "reduce.cuh"

namespace fusednorm::cuda {

// torch's running statistics: an exponential average, or the plain one, with the unbiased variance. One block, because
// its factor comes from num_batches_tracked, which it also advances.
FN_KERNEL(256, 1)
update_statistics_kernel(UpdateStatistics p) {
  double factor = p.momentum;
  if (p.num_batches_tracked) {
    const int64_t batches = *p.num_batches_tracked + 1;
    if (p.cumulative) factor = 1.0 / static_cast<double>(batches);
    barrier();  // all have read
    if (threadIdx.x == 0) *p.num_batches_tracked = batches;
  }
  if (p.count == 0) return;
  const double unbiased = p.count > 1 ? static_cast<double>(p.count) / static_cast<double>(p.count - 1) : 1.0;
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    write(p.running_mean, c, (1 - factor) * read<double>(p.running_mean, c) + factor * read<double>(p.mean, c, 0.0));
    write(p.running_var, c,
          (1 - factor) * read<double>(p.running_var, c) + factor * (unbiased * read<double>(p.var, c, 0.0)));
  }
}

void update_statistics(const Context& context, const UpdateStatistics& p) {
  launch("update_statistics", Launch{dim3(1), dim3(context.machine.threads), 0, 1, context.stream},
         update_statistics_kernel, p);
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

void draw_seed(const Context& context, const DrawSeed& p) {
  launch("draw_seed", Launch{dim3(1), dim3(32), 0, 1, context.stream}, draw_seed_kernel, p);
}

}  // namespace fusednorm::cuda

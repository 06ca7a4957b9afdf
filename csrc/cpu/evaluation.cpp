// Channels-first in evaluation without noise: no pass over a channel has to end before another begins, so the tiles
// follow one another as they stand in memory. Where rows are short, a tile has those of several adjacent channels.
#include <algorithm>

#include "drivers.h"
#include "stages.h"

namespace fusednorm::cpu {

constexpr int64_t kBytesAhead = 2048;  // are fetched, as the pass follows memory

template <class T>
void forward_in_order(const Call& call, const ForwardPointers<T>& p) {
  using A = opmath_t<T>;
  const Plan plan(call.chain, false, false, false);
  const int64_t C = call.shape.C, S = C == 1 ? call.shape.rows() : call.shape.S, samples = C == 1 ? 1 : call.shape.N;
  ChannelVectors<A> vectors(C);
  for (int64_t c = 0; c < C; ++c) finish_statistics(call, p, c, Statistics{}, vectors);

  // A tile has some rows of a sample, or a piece of one.
  const int64_t largest = plan.tile_elements(kTile), pieces = (S + largest - 1) / largest;
  const int64_t cols = pieces > 1 ? even_share(S, largest, 32) : S;
  const int64_t rows = even_share(C, std::clamp<int64_t>(largest / padded(cols), 1, kMaxTileRows), 1);
  const int64_t groups = (C + rows - 1) / rows;
  const bool past = outgrows_caches(call, sizeof(T));
  const int64_t ahead = past ? kBytesAhead / static_cast<int64_t>(sizeof(T)) : 0;
  for_tasks(samples * groups * pieces, C * call.shape.rows() < kSerial, false, [&](int64_t i) {
    const int64_t column = i % pieces * cols, c = i / pieces % groups * rows;
    const int64_t at = (i / pieces / groups * C + c) * S + column;
    const Tile<T> tile{kRun,
                       std::min(rows, C - c),
                       std::min(cols, S - column),
                       vectors.at(c),
                       p.act_weight ? p.act_weight + c : nullptr,
                       {},
                       nullptr,
                       0};
    Workspace<A> workspace;
    Stages<T>(plan, tile, workspace)
        .forward({p.x + at, S, ahead}, {p.residual ? p.residual + at : nullptr, S, ahead}, {p.y + at, S, 0, past},
                 nullptr, 0);
  });
}

template void forward_in_order<float>(const Call&, const ForwardPointers<float>&);
template void forward_in_order<double>(const Call&, const ForwardPointers<double>&);
template void forward_in_order<BFloat16>(const Call&, const ForwardPointers<BFloat16>&);
template void forward_in_order<Float16>(const Call&, const ForwardPointers<Float16>&);

}  // namespace fusednorm::cpu

// What the operators of both backends share: the checked arguments of a call in canonical form.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>

#include "call.h"

namespace fusednorm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// How the rows of a channel are cut where a tile of a channels-first tensor, and its words of a saved mask, begin anew:
// at every sample if samples are long, else nowhere.
struct PieceLayout {
  int64_t count, length;
};
inline PieceLayout piece_layout(const Shape& s) {
  const bool cut = s.S >= 512 && s.N > 1 && s.C > 1;
  return cut ? PieceLayout{s.N, s.S} : PieceLayout{1, s.rows()};
}

// Channels-first rows that are short: where nothing is drawn, those of all channels of a sample are one row of C*S
// columns, in blocks of whole channels.
constexpr int64_t kShortRow = 512, kShortColumns = 1024;
inline bool has_short_rows(const Shape& s, const Chain& chain) {
  return !s.channels_last && s.S > 0 && s.S < kShortRow && s.C > 1 && !chain.draws() && !chain.gaps;
}
inline int64_t channels_of_block(const Shape& s) {
  const int64_t room = std::max<int64_t>(1, kShortColumns / s.S);
  if (s.C <= room) return s.C;
  // In steps that end with a cache line, or better with a kernel's block of 32 columns, where these leave a choice.
  int64_t step = 1;
  for (int64_t columns : {16, 32}) {
    const int64_t channels = columns / std::gcd(s.S, columns);
    if (channels <= room) step = channels;
  }
  const int64_t most = room / step * step;
  const int64_t blocks = (s.C + 2 * most - 1) / (2 * most) * 2;  // even, for two threads to share
  return ((s.C + blocks - 1) / blocks + step - 1) / step * step;
}

// A batch that is part of a larger one has its seed, and behind it the number of its first sample there.
inline bool is_numbered(const OptionalTensor& seed) { return seed && seed->defined() && seed->numel() == 2; }

// The trailing arguments of the schemas, in their order.
struct Settings {
  bool training;
  double eps;
  std::string_view order, act;
  at::ArrayRef<double> act_params;
  std::string_view noise;
  double p;
  std::string_view granularity;
  int64_t ghost_batch_size;   // 0: the whole batch
  OptionalTensor strength{};  // one value in the place of p, which is then any for which the noise is live
};

// What they ask for; act_weight: as the operators have it.
Chain make_chain(const Settings& settings, const OptionalTensor& act_weight);
bool reads_residual(const Chain& chain, const Tensor& mask);  // in backward, with the mask that forward saved

std::pair<int64_t, int64_t> ghosts(const Settings& settings, int64_t N);  // samples of a group of the batch, and groups

// Statistics are those of `ghost` samples each (the last group may be smaller), so per-channel results come once for
// each group: (G, C).
struct Forward {
  Shape shape;
  Chain chain;
  bool training;
  double eps;
  int64_t ghost, groups;  // samples of a group; ghost = N: one group
  Tensor x;               // dense, in shape's layout
  Tensor y;               // the result: of the input's shape, and x's memory layout; undefined: statistics alone
  Tensor weight, bias;    // (C,) or undefined; in opmath type on the CPU, of any type on CUDA
  Tensor running_mean, running_var;  // likewise; used when not training
  Tensor residual;                   // in x's layout, or undefined
  Tensor act_weight;                 // as weight; that of PReLU
  Tensor mean, invstd;               // (G, C) results, in opmath type
  Tensor stat_var, stat_mean;        // likewise, what the running statistics learn; stat_mean empty: it is mean
  Tensor var;                        // likewise, of u; undefined: not asked for
  Tensor mask;                       // result: bits in the backend's layout, or empty
  Tensor seed;                       // int64 scalar, or undefined
  Tensor valid;                      // (N, S...) bool: the rows that count; undefined: all of them
  Tensor strength;                   // of the noise, one value; undefined, or known to the chain
};

struct Backward {
  Shape shape;
  Chain chain;
  bool training;
  int64_t ghost, groups;
  Tensor x, grad_output;             // dense, all in the same layout
  Tensor grad_input, grad_residual;  // likewise, or undefined: not needed
  Tensor residual;                   // likewise; undefined where the mask or the chain makes it superfluous
  Tensor weight, bias, act_weight;   // as above
  Tensor mean, invstd;               // (G, C)
  Tensor mask;                       // bits in the backend's layout, or undefined: redraw
  Tensor seed, valid, strength;
  Tensor grad_weight, grad_bias;  // (C,) results of the parameters' types, always computed when training
  Tensor grad_act_weight;         // (C,) of the same type, or undefined: not needed
  Tensor sums;          // (2, C) float64 result: of dz and of dz * (u - mean); or undefined. (5, C) with PReLU:
                        // what else a backend needs of the first pass in the second
  Tensor given, count;  // (2, C) or (5, C), and one value, float64: sums over the values of all processes, and
                        // how many these are, in the place of a first pass; or undefined
};

Forward check_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& residual, const OptionalTensor& act_weight, const OptionalTensor& seed,
                      const OptionalTensor& valid, const Settings& settings, bool eval_matched_stats, bool save_mask,
                      bool emits = true);

Backward check_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                        const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
                        const OptionalTensor& seed, const OptionalTensor& valid, const Settings& settings,
                        std::array<bool, 5> output_mask);

// (output, save_mean, save_invstd, stat_var, stat_mean, mask) and the gradients of
// (input, weight, bias, residual, act_weight).
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operators return: strides as the input has them, gradients in the parameters' dtypes and shapes, an empty
// tensor for a gradient that was not asked for.
Tensor forward_result(const Forward& q, const Tensor& input);
BackwardResult backward_result(const Backward& q, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& act_weight,
                               std::array<bool, 5> output_mask);

// The passes apart, for statistics that are those of several processes: (mean, var, stat_mean, stat_var); the sums; and
// the gradients of (input, residual, act_weight).
using StatisticsResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GivenResult = std::tuple<Tensor, Tensor, Tensor>;
Backward check_sums(Backward q);
Backward check_given(Backward q, const Tensor& sums, const Tensor& count);

// The C++ signatures of the operators that have no derivative of their own.
using ForwardSignature = ForwardResult(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                       const OptionalTensor& residual, const OptionalTensor& act_weight,
                                       const OptionalTensor& seed, bool training, double eps, std::string_view order,
                                       std::string_view act, at::ArrayRef<double> act_params, std::string_view noise,
                                       double p, std::string_view granularity, int64_t ghost_batch_size,
                                       bool eval_matched_stats, bool save_mask, const OptionalTensor& valid,
                                       const OptionalTensor& strength);
using BackwardSignature = BackwardResult(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                         const OptionalTensor& bias, const OptionalTensor& residual,
                                         const OptionalTensor& act_weight, const Tensor& save_mean,
                                         const Tensor& save_invstd, const Tensor& mask, const OptionalTensor& seed,
                                         bool training, double eps, std::string_view order, std::string_view act,
                                         at::ArrayRef<double> act_params, std::string_view noise, double p,
                                         std::string_view granularity, int64_t ghost_batch_size,
                                         std::array<bool, 5> output_mask, const OptionalTensor& valid,
                                         const OptionalTensor& strength);

using StatisticsSignature = StatisticsResult(const Tensor& input, const OptionalTensor& act_weight,
                                             const OptionalTensor& seed, std::string_view order, std::string_view act,
                                             at::ArrayRef<double> act_params, std::string_view noise, double p,
                                             std::string_view granularity, bool eval_matched_stats,
                                             const OptionalTensor& valid, const OptionalTensor& strength);
using SumsSignature = Tensor(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& bias, const OptionalTensor& residual,
                             const OptionalTensor& act_weight, const Tensor& save_mean, const Tensor& save_invstd,
                             const Tensor& mask, const OptionalTensor& seed, double eps, std::string_view order,
                             std::string_view act, at::ArrayRef<double> act_params, std::string_view noise, double p,
                             std::string_view granularity, const OptionalTensor& valid, const OptionalTensor& strength);
using GivenSignature = GivenResult(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& residual,
                                   const OptionalTensor& act_weight, const Tensor& save_mean, const Tensor& save_invstd,
                                   const Tensor& mask, const OptionalTensor& seed, const Tensor& sums,
                                   const Tensor& count, double eps, std::string_view order, std::string_view act,
                                   at::ArrayRef<double> act_params, std::string_view noise, double p,
                                   std::string_view granularity, std::array<bool, 3> output_mask,
                                   const OptionalTensor& valid, const OptionalTensor& strength);

using DropoutSignature = Tensor(const Tensor& input, const Tensor& seed, double p, std::string_view kind,
                                std::string_view granularity, const OptionalTensor& strength);

// x * m, or m itself where there is no x.
struct NoiseRequest {
  Shape shape;
  Chain chain;
  Tensor x;         // dense, in the shape's layout; or undefined
  Tensor y;         // the result, likewise; m before it is broadcast is contiguous
  Tensor strength;  // as that of Forward
};
NoiseRequest check_noise(const Tensor& seed, at::IntArrayRef size, double p, std::string_view kind,
                         std::string_view granularity, at::ScalarType dtype);
NoiseRequest check_dropout(const Tensor& input, const Tensor& seed, double p, std::string_view kind,
                           std::string_view granularity, const OptionalTensor& strength);
Tensor dropout_result(const NoiseRequest& q, const Tensor& input);

// mean, var: (G, C) or (C,), of groups that hold `count` values per channel each, but for the last; or as many as
// `counts` says, float64 (G,).
void check_update_stats(const Tensor& running_mean, const Tensor& running_var,
                        const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                        std::optional<double> momentum, const OptionalTensor& counts);

}  // namespace fusednorm

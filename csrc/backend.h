// The operators' bodies that both backends share: from the schema's arguments to a checked call, and back. A backend
// gives the functions that run such a call, and registers these with them as template arguments.
#pragma once

#include <torch/library.h>

#include "ops.h"

namespace fusednorm {

template <void run(const Forward&)>
ForwardResult forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& residual, const OptionalTensor& act_weight, const OptionalTensor& seed,
                      bool training, double eps, std::string_view order, std::string_view act,
                      at::ArrayRef<double> act_params, std::string_view noise, double p, std::string_view granularity,
                      int64_t ghost_batch_size, bool eval_matched_stats, bool save_mask, const OptionalTensor& valid,
                      const OptionalTensor& strength) {
  const Forward q =
      check_forward(input, weight, bias, running_mean, running_var, residual, act_weight, seed, valid,
                    {training, eps, order, act, act_params, noise, p, granularity, ghost_batch_size, strength},
                    eval_matched_stats, save_mask);
  if (q.x.numel() == 0) {
    for (const Tensor& t : {q.mean, q.invstd, q.stat_var, q.stat_mean}) t.zero_();
  } else {
    run(q);
  }
  return {forward_result(q, input), q.mean, q.invstd, q.stat_var, q.stat_mean, q.mask};
}

template <void run(const Backward&)>
BackwardResult backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                        const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
                        const OptionalTensor& seed, bool training, double eps, std::string_view order,
                        std::string_view act, at::ArrayRef<double> act_params, std::string_view noise, double p,
                        std::string_view granularity, int64_t ghost_batch_size, std::array<bool, 5> output_mask,
                        const OptionalTensor& valid, const OptionalTensor& strength) {
  const Backward q = check_backward(
      grad_output, input, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, valid,
      {training, eps, order, act, act_params, noise, p, granularity, ghost_batch_size, strength}, output_mask);
  if (q.x.numel() != 0) run(q);
  return backward_result(q, input, weight, bias, act_weight, output_mask);
}

template <void run(const Forward&)>
StatisticsResult statistics(const Tensor& input, const OptionalTensor& act_weight, const OptionalTensor& seed,
                            std::string_view order, std::string_view act, at::ArrayRef<double> act_params,
                            std::string_view noise, double p, std::string_view granularity, bool eval_matched_stats,
                            const OptionalTensor& valid, const OptionalTensor& strength) {
  const Forward q = check_forward(input, {}, {}, {}, {}, {}, act_weight, seed, valid,
                                  {true, 1, order, act, act_params, noise, p, granularity, 0, strength},
                                  eval_matched_stats, false, false);
  if (q.x.numel() == 0) {
    for (const Tensor& t : {q.mean, q.var, q.stat_var, q.stat_mean}) t.zero_();
  } else {
    run(q);
  }
  return {q.mean, q.var, q.stat_mean, q.stat_var};
}

template <void run(const Backward&)>
Tensor gradient_sums(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                     const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                     const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask, const OptionalTensor& seed,
                     double eps, std::string_view order, std::string_view act, at::ArrayRef<double> act_params,
                     std::string_view noise, double p, std::string_view granularity, const OptionalTensor& valid,
                     const OptionalTensor& strength) {
  const Backward q = check_sums(
      check_backward(grad_output, input, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, valid,
                     {true, eps, order, act, act_params, noise, p, granularity, 0, strength}, {}));
  if (q.x.numel() != 0) run(q);
  return q.sums;
}

template <void run(const Backward&)>
GivenResult backward_given(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                           const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
                           const OptionalTensor& seed, const Tensor& sums, const Tensor& count, double eps,
                           std::string_view order, std::string_view act, at::ArrayRef<double> act_params,
                           std::string_view noise, double p, std::string_view granularity,
                           std::array<bool, 3> output_mask, const OptionalTensor& valid,
                           const OptionalTensor& strength) {
  const std::array<bool, 5> wanted{output_mask[0], false, false, output_mask[1], output_mask[2]};
  const Backward q = check_given(
      check_backward(grad_output, input, weight, bias, residual, act_weight, save_mean, save_invstd, mask, seed, valid,
                     {true, eps, order, act, act_params, noise, p, granularity, 0, strength}, wanted),
      sums, count);
  if (q.x.numel() != 0) run(q);
  const auto [grad_input, grad_weight, grad_bias, grad_residual, grad_act_weight] =
      backward_result(q, input, weight, bias, act_weight, wanted);
  return {grad_input, grad_residual, grad_act_weight};
}

template <void run(const NoiseRequest&, const Tensor& seed)>
Tensor noise(const Tensor& seed, at::IntArrayRef size, double p, std::string_view kind, std::string_view granularity,
             at::ScalarType dtype) {
  const NoiseRequest q = check_noise(seed, size, p, kind, granularity, dtype);
  if (q.y.numel() != 0) run(q, seed);
  return q.y;
}

template <void run(const NoiseRequest&, const Tensor& seed)>
Tensor dropout(const Tensor& input, const Tensor& seed, double p, std::string_view kind, std::string_view granularity,
               const OptionalTensor& strength) {
  const NoiseRequest q = check_dropout(input, seed, p, kind, granularity, strength);
  if (q.y.numel() != 0) run(q, seed);
  return dropout_result(q, input);
}

}  // namespace fusednorm

// The operators' bodies that both backends share: from the schema's arguments to a checked call, and back. A backend
// gives the functions that run such a call, and registers these with them as template arguments.
#pragma once

#include <torch/library.h>

#include "ops.h"

namespace fusednorm {

template <void run(const Forward&)>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& residual, const OptionalTensor& seed, bool training,
    double eps, std::string_view order, std::string_view act, at::ArrayRef<double> act_params, std::string_view noise,
    double p, std::string_view granularity, int64_t groups, bool save_mask) {
  const Forward q = check_forward(input, weight, bias, running_mean, running_var, residual, seed,
                                  {training, eps, order, act, act_params, noise, p, granularity, groups}, save_mask);
  if (q.x.numel() == 0) {
    q.mean.zero_();
    q.invstd.zero_();
    q.var.zero_();
  } else {
    run(q);
  }
  return {forward_result(q, input), q.mean, q.invstd, q.var, q.mask};
}

template <void run(const Backward&)>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
    const OptionalTensor& seed, bool training, double eps, std::string_view order, std::string_view act,
    at::ArrayRef<double> act_params, std::string_view noise, double p, std::string_view granularity, int64_t groups,
    std::array<bool, 4> output_mask) {
  const Backward q =
      check_backward(grad_output, input, weight, bias, residual, save_mean, save_invstd, mask, seed,
                     {training, eps, order, act, act_params, noise, p, granularity, groups}, output_mask);
  if (q.x.numel() != 0) run(q);
  return backward_result(q, input, weight, bias, output_mask);
}

template <void run(const NoiseRequest&, const Tensor& seed)>
Tensor noise(const Tensor& seed, at::IntArrayRef size, double p, std::string_view kind, std::string_view granularity,
             at::ScalarType dtype) {
  const NoiseRequest q = check_noise(seed, size, p, kind, granularity, dtype);
  if (q.m.numel() != 0) run(q, seed);
  return q.m;
}

}  // namespace fusednorm

// What the operators of both backends share: the checked arguments of a call in canonical form.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <array>
#include <cstdint>
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

// The trailing arguments of the schemas, in their order.
struct Settings {
  bool training;
  double eps;
  std::string_view order, act;
  at::ArrayRef<double> act_params;
  std::string_view noise;
  double p;
  std::string_view granularity;
  int64_t groups;
};

struct Forward {
  Shape shape;
  Chain chain;
  bool training;
  double eps;
  Tensor x;                          // dense, in shape's layout
  Tensor y;                          // the result: of the input's shape, and x's memory layout
  Tensor weight, bias;               // (C,) or undefined; in opmath type on the CPU, of any type on CUDA
  Tensor running_mean, running_var;  // likewise; used when not training
  Tensor mean, invstd, var;          // (C,) results, in opmath type
  Tensor mask;                       // result: bits in the backend's layout, or empty
  Tensor seed;                       // int64 scalar, or undefined
};

struct Backward {
  Shape shape;
  Chain chain;
  bool training;
  Tensor x, grad_output, grad_input;  // dense, all in the same layout
  Tensor weight, bias;                // as above
  Tensor mean, invstd;
  Tensor mask;  // bits in the backend's layout, or undefined: redraw
  Tensor seed;
  Tensor grad_weight, grad_bias;  // (C,) results of the same types, always computed when training
  bool need_grad_input;
};

Forward check_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& residual, const OptionalTensor& seed, const Settings& settings,
                      bool save_mask);

Backward check_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& save_mean,
                        const Tensor& save_invstd, const Tensor& mask, const OptionalTensor& seed,
                        const Settings& settings, std::array<bool, 4> output_mask);

// What the operators return: strides as the input has them, gradients in the parameters' dtypes and shapes, an empty
// tensor for a gradient that was not asked for.
Tensor forward_result(const Forward& q, const Tensor& input);
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_result(const Backward& q, const Tensor& input,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           std::array<bool, 4> output_mask);

// The C++ signatures of the two operators whose schemas are long.
using ForwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& residual, const OptionalTensor& seed, bool training,
    double eps, std::string_view order, std::string_view act, at::ArrayRef<double> act_params, std::string_view noise,
    double p, std::string_view granularity, int64_t groups, bool save_mask);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
    const OptionalTensor& seed, bool training, double eps, std::string_view order, std::string_view act,
    at::ArrayRef<double> act_params, std::string_view noise, double p, std::string_view granularity, int64_t groups,
    std::array<bool, 4> output_mask);

// Noise for a tensor of `size`: the shape of m before it is broadcast, and how to draw it.
struct NoiseRequest {
  Shape shape;
  Chain chain;
  Tensor m;  // the result, contiguous
};
NoiseRequest check_noise(const Tensor& seed, at::IntArrayRef size, double p, std::string_view kind,
                         std::string_view granularity, at::ScalarType dtype);

void check_update_stats(const Tensor& running_mean, const Tensor& running_var,
                        const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                        std::optional<double> momentum);

}  // namespace fusednorm

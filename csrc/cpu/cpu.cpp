// The CPU backend's operators: from checked tensors to the drivers, and back.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <mutex>

#include "../backend.h"
#include "drivers.h"

namespace fusednorm::cpu {
namespace {

template <class T>
struct Storage {  // the backend's type with the same bits
  using type = T;
};
template <>
struct Storage<at::BFloat16> {
  using type = BFloat16;
};
template <>
struct Storage<at::Half> {
  using type = Float16;
};

template <class T>
T* data(const Tensor& t) {
  return t.defined() && t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// f(T{}) for the storage type of dtype.
template <class F>
void for_dtype(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

int64_t read_seed(const Tensor& seed) { return seed.defined() ? *static_cast<const int64_t*>(seed.data_ptr()) : 0; }

Tensor draw_seed(const Tensor& like) {
  auto generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  Tensor seed = at::empty({}, like.options().dtype(at::kLong).memory_format(std::nullopt));
  *static_cast<int64_t*>(seed.data_ptr()) = static_cast<int64_t>(generator->random64());
  return seed;
}

void run_forward(const fusednorm::Forward& q) {
  const Call call{q.shape, q.chain, read_seed(q.seed), q.training, q.eps};
  for_dtype(q.x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = opmath_t<T>;
    const ForwardPointers<T> p{
        data<T>(q.x),           data<T>(q.y),    data<A>(q.weight), data<A>(q.bias),     data<A>(q.running_mean),
        data<A>(q.running_var), data<A>(q.mean), data<A>(q.invstd), data<A>(q.stat_var), data<uint32_t>(q.mask)};
    q.shape.channels_last ? forward_channels_last<T>(call, p) : forward_channels_first<T>(call, p);
  });
}

void run_backward(const fusednorm::Backward& q) {
  const Call call{q.shape, q.chain, read_seed(q.seed), q.training, 0};
  for_dtype(q.x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = opmath_t<T>;
    const BackwardPointers<T> p{
        data<T>(q.x),    data<T>(q.grad_output), data<T>(q.grad_input),  data<A>(q.weight),    data<A>(q.bias),
        data<A>(q.mean), data<A>(q.invstd),      data<A>(q.grad_weight), data<A>(q.grad_bias), data<uint32_t>(q.mask)};
    q.shape.channels_last ? backward_channels_last<T>(call, p) : backward_channels_first<T>(call, p);
  });
}

void run_noise(const NoiseRequest& q, const Tensor& seed) {
  const Call call{q.shape, q.chain, read_seed(seed), true, 0};
  for_dtype(q.y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    noise<T>(call, data<T>(q.y));
  });
}

// torch's running statistics: an exponential average (or the plain one, momentum = None) with the unbiased variance.
void update_stats_(Tensor& running_mean, Tensor& running_var, const std::optional<Tensor>& num_batches_tracked,
                   const Tensor& mean, const Tensor& var, int64_t count, int64_t last_count,
                   std::optional<double> momentum) {
  check_update_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum);
  const int64_t groups = mean.dim() == 2 ? mean.size(0) : 1;
  for (int64_t group = 0; group < groups; ++group) {
    double factor = momentum.value_or(0);
    if (num_batches_tracked.has_value()) {
      num_batches_tracked->add_(1);
      if (!momentum.has_value()) factor = 1.0 / static_cast<double>(num_batches_tracked->item<int64_t>());
    }
    const int64_t values = group + 1 < groups ? count : last_count;
    if (values == 0) continue;
    const double unbiased = values > 1 ? static_cast<double>(values) / static_cast<double>(values - 1) : 1.0;
    const auto blend = [&](Tensor& running, const Tensor& batches, double scale) {
      const Tensor batch = groups == 1 ? batches : batches.select(0, group);
      const int64_t n = running.numel();
      if (running.scalar_type() == at::kFloat && batch.scalar_type() == at::kFloat && running.is_contiguous() &&
          batch.is_contiguous()) {
        float* r = data<float>(running);
        const float* b = data<float>(batch);
        for (int64_t i = 0; i < n; ++i) r[i] = static_cast<float>((1 - factor) * r[i] + factor * (scale * b[i]));
        running.unsafeGetTensorImpl()->bump_version();  // written behind autograd's back
      } else {
        running.copy_(
            running.to(at::kDouble).mul_(1 - factor).add_(batch.to(at::kDouble).view_as(running), factor * scale));
      }
    };
    blend(running_mean, mean, 1.0);
    blend(running_var, var, unbiased);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fusednorm, CPU, m) {
  m.impl("draw_seed", &draw_seed);
  m.impl("forward", &fusednorm::forward<run_forward>);
  m.impl("backward", &fusednorm::backward<run_backward>);
  m.impl("noise", &fusednorm::noise<run_noise>);
  m.impl("update_stats_", &update_stats_);
}

}  // namespace fusednorm::cpu

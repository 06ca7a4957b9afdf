// The CPU backend's operators: from checked tensors to the drivers, and back.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <mutex>
#include <optional>

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

struct Origin {  // of a batch's noise: the seed, and the number of its first sample
  int64_t seed, sample;
};
Origin read_seed(const Tensor& seed) {
  if (!seed.defined()) return {0, 0};
  const auto* values = static_cast<const int64_t*>(seed.data_ptr());
  return {values[0], seed.numel() == 2 ? values[seed.dim() ? seed.stride(-1) : 0] : 0};
}

Tensor draw_seed(const Tensor& like) {
  auto generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  Tensor seed = at::empty({}, like.options().dtype(at::kLong).memory_format(std::nullopt));
  *static_cast<int64_t*>(seed.data_ptr()) = static_cast<int64_t>(generator->random64());
  return seed;
}

// f(group, call, elements before it) for the groups of a batch: shared among threads where there are many, or else
// one after the other, each shared.
template <class Q, class F>
void for_groups(const Q& q, double eps, bool trains, const F& f) {
  const Origin origin = read_seed(q.seed);
  const int64_t sample = q.shape.C * q.shape.S, threads = at::get_num_threads();
  const bool many = q.groups % threads == 0 || q.groups >= 8 * threads;
  for_tasks(q.groups, !many || q.shape.N * sample < kSerial, false, [&](int64_t group) {
    const int64_t first = group * q.ghost;
    Shape shape = q.shape;
    shape.N = std::min(q.ghost, shape.N - first);
    std::optional<Gaps> gaps;
    if (q.valid.defined()) gaps.emplace(data<bool>(q.valid) + first * shape.S, shape.rows());
    const int64_t count = gaps ? gaps->count(0, shape.rows()) : shape.rows();
    f(group,
      Call{shape, q.chain, origin.seed, (origin.sample + first) * shape.S, q.training, eps, q.shape.N * sample, trains,
           gaps ? &*gaps : nullptr, static_cast<double>(count)},
      first * sample);
  });
}

template <class E>
E* advance(E* p, int64_t n) {
  return p ? p + n : nullptr;
}

void run_forward(const fusednorm::Forward& q) {
  for_dtype(q.x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = opmath_t<T>;
    // With statistics that are given, and noise to be saved, too.
    const bool trains = q.training || q.mask.numel() > 0;
    for_groups(q, q.eps, trains, [&](int64_t group, const Call& call, int64_t at) {
      const int64_t channel = group * q.shape.C;
      const ForwardPointers<T> p{advance(data<T>(q.x), at),
                                 advance(data<T>(q.residual), at),
                                 advance(data<T>(q.y), at),
                                 data<A>(q.weight),
                                 data<A>(q.bias),
                                 data<A>(q.act_weight),
                                 data<A>(q.running_mean),
                                 data<A>(q.running_var),
                                 advance(data<A>(q.mean), channel),
                                 advance(data<A>(q.invstd), channel),
                                 advance(data<A>(q.stat_var), channel),
                                 advance(data<A>(q.stat_mean), channel),
                                 advance(data<A>(q.var), channel),
                                 data<uint32_t>(q.mask)};
      if (in_order(call, p.mask != nullptr)) return forward_in_order<T>(call, p);
      in_columns(call.shape, call.chain) ? forward_columns<T>(call, p) : forward_runs<T>(call, p);
    });
  });
}

void run_backward(const fusednorm::Backward& q) {
  const int64_t C = q.shape.C;
  // The parameters' gradients of each group.
  const auto sums = [&](const Tensor& gradient) { return std::vector<double>(gradient.defined() ? q.groups * C : 0); };
  const auto of_group = [&](std::vector<double>& all, int64_t group) {
    return all.empty() ? nullptr : all.data() + group * C;
  };
  std::vector<double> weight = sums(q.grad_weight), bias = sums(q.grad_bias), act_weight = sums(q.grad_act_weight);
  for_dtype(q.x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = opmath_t<T>;
    for_groups(q, 0, q.training, [&](int64_t group, const Call& call, int64_t at) {
      const BackwardPointers<T> p{advance(data<T>(q.x), at),
                                  advance(data<T>(q.grad_output), at),
                                  advance(data<T>(q.residual), at),
                                  advance(data<T>(q.grad_input), at),
                                  advance(data<T>(q.grad_residual), at),
                                  data<A>(q.weight),
                                  data<A>(q.bias),
                                  data<A>(q.act_weight),
                                  advance(data<A>(q.mean), group * C),
                                  advance(data<A>(q.invstd), group * C),
                                  of_group(weight, group),
                                  of_group(bias, group),
                                  of_group(act_weight, group),
                                  data<double>(q.sums),
                                  data<double>(q.given),
                                  q.count.defined() ? *data<double>(q.count) : 0,
                                  data<uint32_t>(q.mask)};
      in_columns(call.shape, call.chain) ? backward_columns<T>(call, p) : backward_runs<T>(call, p);
    });
    const auto store = [&](const Tensor& gradient, std::vector<double>& all) {
      for (int64_t group = 1; group < q.groups && !all.empty(); ++group) {
        for (int64_t c = 0; c < C; ++c) all[c] += all[group * C + c];
      }
      if (!all.empty()) std::copy_n(all.data(), C, data<A>(gradient));
    };
    store(q.grad_weight, weight);
    store(q.grad_bias, bias);
    store(q.grad_act_weight, act_weight);
  });
}

void run_noise(const NoiseRequest& q, const Tensor& seed) {
  const Origin origin = read_seed(seed);
  const Call call{q.shape, q.chain, origin.seed, origin.sample * q.shape.S, true, 0, q.shape.C * q.shape.rows(), true,
                  nullptr, 0};
  for_dtype(q.y.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    in_columns(q.shape, q.chain) ? noise_columns<T>(call, data<T>(q.x), data<T>(q.y))
                                 : noise_runs<T>(call, data<T>(q.x), data<T>(q.y));
  });
}

// torch's running statistics: an exponential average (or the plain one, momentum = None) with the unbiased variance.
void update_stats_(Tensor& running_mean, Tensor& running_var, const std::optional<Tensor>& num_batches_tracked,
                   const Tensor& mean, const Tensor& var, int64_t count, int64_t last_count,
                   std::optional<double> momentum, const std::optional<Tensor>& counts) {
  check_update_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum, counts);
  const Tensor told = counts.has_value() ? counts->contiguous() : Tensor();
  const int64_t groups = mean.dim() == 2 ? mean.size(0) : 1;
  for (int64_t group = 0; group < groups; ++group) {
    double factor = momentum.value_or(0);
    if (num_batches_tracked.has_value()) {
      int64_t& batches =
          *static_cast<int64_t*>(num_batches_tracked->data_ptr());  // add_ would cost as much as the rest
      ++batches;
      num_batches_tracked->unsafeGetTensorImpl()->bump_version();
      if (!momentum.has_value()) factor = 1.0 / static_cast<double>(batches);
    }
    const double values = told.defined()       ? data<double>(told)[group]
                          : group + 1 < groups ? static_cast<double>(count)
                                               : static_cast<double>(last_count);
    if (values == 0) continue;
    const double unbiased = values / std::max(values - 1, 1.0);
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
  m.impl("dropout", &fusednorm::dropout<run_noise>);
  m.impl("statistics", &statistics<run_forward>);
  m.impl("gradient_sums", &gradient_sums<run_backward>);
  m.impl("backward_given", &backward_given<run_backward>);
  m.impl("update_stats_", &update_stats_);
}

}  // namespace fusednorm::cpu

// The CUDA backend's operators: from checked tensors to plain pointers, on the tensors' device and current stream.
// Ordinary C++: the kernels and their launches are in the .cu files, behind backend.h.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_left_shift.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <mutex>
#include <vector>

#include "../backend.h"
#include "backend.h"
#include "hooks.h"

namespace fusednorm::cuda {
namespace {

std::atomic<int> residency{static_cast<int>(Residency::automatic)};

// The device of a tensor made current, its current stream, and memory for what passes between kernels.
class On {
 public:
  explicit On(const Tensor& t) : guard_(t.device()), bytes_(t.options().dtype(at::kByte)) {
    const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();
    context_.machine = {device.multiProcessorCount, static_cast<int>(device.sharedMemPerBlockOptin),
                        has_clusters(device.major) ? kPortableCluster : 1, kThreads,
                        static_cast<Residency>(residency.load())};
    context_.stream = at::cuda::getCurrentCUDAStream().stream();
    context_.workspace = [this](size_t bytes) {
      // Freed when the operator returns and handed out again only behind its kernels, on the same stream.
      memory_.push_back(at::empty({static_cast<int64_t>(bytes)}, bytes_));
      return memory_.back().data_ptr();
    };
  }
  On(const On&) = delete;
  const Context& context() const { return context_; }

 private:
  static constexpr int kThreads = 256, kPortableCluster = 8;
  static bool has_clusters(int major) {
    if (major < 9) return false;
    static const bool compiled = compiled_for_clusters();
    return compiled;
  }
  c10::cuda::CUDAGuard guard_;
  at::TensorOptions bytes_;
  std::vector<Tensor> memory_;
  Context context_;
};

DType dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      return DType::float16;
  }
}

// f(T{}) for the storage type of t.
template <class F>
void for_dtype(const Tensor& t, const F& f) {
  switch (dtype(t)) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
    case DType::float16:
      return f(__half{});
  }
}

template <class T>
T* data(const Tensor& t) {
  return t.defined() && t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
}
Vector vector(const Tensor& t) { return t.defined() ? Vector{t.data_ptr(), dtype(t)} : Vector{}; }
MutableVector mutable_vector(const Tensor& t) {
  return t.defined() ? MutableVector{t.data_ptr(), dtype(t)} : MutableVector{};
}

// Rows that count, a strength that is a tensor and the number of the first sample, as kernels take them: in device
// memory, for as long as the call runs.
class Beside {
 public:
  Beside(const On& on, const Shape& shape, const Chain& chain, const Tensor& valid, const Tensor& strength,
         const Tensor& seed) {
    if (valid.defined()) {
      const int64_t calls = (valid.numel() + 7) / 8;
      const Tensor rows = at::constant_pad_nd(valid.view({-1}).to(at::kByte), {0, 8 * calls - valid.numel()});
      const Tensor eights = rows.view({calls, 8});
      bits_ = at::bitwise_left_shift(eights, at::arange(8, eights.options())).sum(1, false, at::kByte);
      before_ = at::constant_pad_nd(eights.sum(1, false, at::kLong).cumsum(0), {1, 0});
    }
    if (strength.defined()) {
      // Nobody looks at it before: beyond its range, or no number, it is the nearest one, or 0.
      value_ = strength.to(at::kDouble).nan_to_num().clamp_min(0);
      if (chain.noise != Noise::gaussian) value_ = value_.clamp_max(1);
    }
    const bool numbered = is_numbered(seed);
    if (numbered || strength.defined()) {
      live_ = at::empty({sizeof(Live)}, (numbered ? seed : strength).options().dtype(at::kByte));
      const int64_t draws = chain.granularity == Granularity::element ? shape.S : 1;
      const int64_t* sample = numbered ? data<int64_t>(seed) + seed.stride(-1) : nullptr;
      realise(on.context(), {chain, data<double>(value_), sample, draws, static_cast<Live*>(live_.data_ptr())});
    }
  }
  Counting counting() const { return {data<uint8_t>(bits_), data<int64_t>(before_)}; }
  const Live* live() const { return data<Live>(live_); }

 private:
  Tensor bits_, before_, value_, live_;
};

void run_forward(const fusednorm::Forward& q) {
  const On on(q.x);
  const Beside beside(on, q.shape, q.chain, q.valid, q.strength, q.seed);
  const Call call{q.shape,           q.chain,      q.training, q.eps, q.ghost, q.groups, data<int64_t>(q.seed),
                  beside.counting(), beside.live()};
  for_dtype(q.x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(
        on.context(), call,
        {data<T>(q.x), data<T>(q.y), vector(q.weight), vector(q.bias), vector(q.running_mean), vector(q.running_var),
         data<void>(q.mean), data<void>(q.invstd), data<void>(q.stat_var), data<uint8_t>(q.mask), data<T>(q.residual),
         vector(q.act_weight), data<void>(q.stat_mean), data<void>(q.var)});
  });
}

void run_backward(const fusednorm::Backward& q) {
  const bool acts = q.chain.after_at(Stage::act) >= 0 || q.chain.before_has(Stage::act);
  const Tensor grad_act_weight = acts ? q.grad_act_weight : Tensor();
  const auto wanted = [](const Tensor& t) { return t.defined(); };
  if (!wanted(q.grad_input) && !wanted(q.grad_weight) && !wanted(q.grad_residual) && !wanted(grad_act_weight)) return;
  const On on(q.x);
  const Beside beside(on, q.shape, q.chain, q.valid, q.strength, q.seed);
  const Call call{q.shape,           q.chain,      q.training, 0, q.ghost, q.groups, data<int64_t>(q.seed),
                  beside.counting(), beside.live()};
  for_dtype(q.x, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(on.context(), call,
                {data<T>(q.x), data<T>(q.grad_output), data<T>(q.grad_input), vector(q.weight), vector(q.bias),
                 data<void>(q.mean), data<void>(q.invstd), mutable_vector(q.grad_weight), mutable_vector(q.grad_bias),
                 data<uint8_t>(q.mask), data<T>(q.residual), data<T>(q.grad_residual), vector(q.act_weight),
                 mutable_vector(grad_act_weight), data<double>(q.sums), data<double>(q.given), data<double>(q.count)});
  });
}

void run_noise(const NoiseRequest& q, const Tensor& seed) {
  const On on(q.y);
  const Beside beside(on, q.shape, q.chain, Tensor(), q.strength, seed);
  const Call call{q.shape, q.chain, true, 0, q.shape.N, 1, data<int64_t>(seed), {}, beside.live()};
  for_dtype(q.y, [&](auto zero) {
    using T = decltype(zero);
    noise(on.context(), call, static_cast<const T*>(data<T>(q.x)), data<T>(q.y));
  });
}

// From torch's generator in the way that its own kernels use it: a captured graph reads the state at each replay.
Tensor run_draw_seed(const Tensor& like) {
  const On on(like);
  Tensor seed = at::empty({}, like.options().dtype(at::kLong).memory_format(std::nullopt));
  auto generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(like.device().index()));
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(generator->mutex_);
    state = generator->philox_cuda_state(4);  // the offset advances in steps of 4, in torch
  }
  DrawSeed p{};
  p.captured = state.captured_;
  if (state.captured_) {
    p.captured_seed = static_cast<const int64_t*>(state.seed_.ptr);
    p.captured_offset = static_cast<const int64_t*>(state.offset_.ptr);
    p.offset_in_graph = state.offset_intragraph_;
  } else {
    p.seed = state.seed_.val;
    p.offset = state.offset_.val;
  }
  p.out = data<int64_t>(seed);
  draw_seed(on.context(), p);
  return seed;
}

void run_update_stats(Tensor& running_mean, Tensor& running_var, const std::optional<Tensor>& num_batches_tracked,
                      const Tensor& mean, const Tensor& var, int64_t count, int64_t last_count,
                      std::optional<double> momentum, const std::optional<Tensor>& counts) {
  check_update_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum, counts);
  const On on(mean);
  const Tensor dense_mean = running_mean.contiguous(), dense_var = running_var.contiguous();
  const Tensor batch_mean = mean.contiguous(), batch_var = var.contiguous();
  UpdateStatistics p{};
  p.running_mean = mutable_vector(dense_mean);
  p.running_var = mutable_vector(dense_var);
  p.num_batches_tracked = num_batches_tracked.has_value() ? data<int64_t>(*num_batches_tracked) : nullptr;
  p.mean = vector(batch_mean);
  p.var = vector(batch_var);
  p.groups = mean.dim() == 2 ? mean.size(0) : 1;
  p.C = running_mean.numel();
  p.count = count;
  p.last_count = last_count;
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0);
  const Tensor told = counts.has_value() ? counts->contiguous() : Tensor();
  p.counts = data<double>(told);
  update_statistics(on.context(), p);
  const auto written = [](const Tensor& to, const Tensor& from) {
    if (!to.is_same(from)) to.copy_(from);
    to.unsafeGetTensorImpl()->bump_version();  // written behind autograd's back
  };
  written(running_mean, dense_mean);
  written(running_var, dense_var);
  if (num_batches_tracked.has_value()) num_batches_tracked->unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(fusednorm, CUDA, m) {
  m.impl("draw_seed", &run_draw_seed);
  m.impl("forward", &fusednorm::forward<run_forward>);
  m.impl("backward", &fusednorm::backward<run_backward>);
  m.impl("noise", &fusednorm::noise<run_noise>);
  m.impl("dropout", &fusednorm::dropout<run_noise>);
  m.impl("statistics", &fusednorm::statistics<run_forward>);
  m.impl("gradient_sums", &fusednorm::gradient_sums<run_backward>);
  m.impl("backward_given", &fusednorm::backward_given<run_backward>);
  m.impl("update_stats_", &run_update_stats);
}

}  // namespace fusednorm::cuda

int fusednorm_cuda_set_residency(int residency) { return fusednorm::cuda::residency.exchange(residency); }

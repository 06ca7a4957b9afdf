// The operators: schemas, every check of an argument, and the canonical view of a tensor, once for all backends.
// A backend registers its kernels itself (cpu/cpu.cpp), begins with check_*() and assumes from then on.
#include "ops.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "math/activations.h"
#include "math/noise.h"

namespace fusednorm {
namespace {

// ---- the chain ----------------------------------------------------------------------------------------------------
struct ActivationInfo {
  std::string_view name;
  size_t parameters;
  bool one_bit, has_weight;
};
template <class... Activations>
std::vector<ActivationInfo> list_activations(math::List<Activations...>) {
  return {{Activations::name, static_cast<size_t>(Activations::parameters), Activations::one_bit,
           std::is_same_v<Activations, math::Prelu>}...};
}
const std::vector<ActivationInfo>& activations() {
  static const std::vector<ActivationInfo> list = list_activations(math::Activations{});
  return list;
}

std::string activation_names() {
  std::string names;
  for (const ActivationInfo& info : activations()) names += (names.empty() ? "" : ", ") + std::string(info.name);
  return names;
}

// p is the strength in the noise's own unit: probability of dropping, half width, variance; of a tensor, `strength`.
// What a call saves and draws must not hang on the value of a tensor, as a compiled graph cannot know it. On the CPU it
// is read here, where that waits for nothing; on CUDA by the kernels.
void set_noise(Chain& chain, std::string_view kind, double p, std::string_view granularity,
               const OptionalTensor& strength) {
  const bool varies = strength.has_value() && strength->defined();
  if (varies && strength->is_cpu()) {
    TORCH_CHECK_VALUE(strength->numel() == 1, "strength: expected one value, but got shape ", strength->sizes());
    p = strength->item<double>();
  }
  if (granularity == "element") {
    chain.granularity = Granularity::element;
  } else if (granularity == "channel") {
    chain.granularity = Granularity::channel;
  } else {
    TORCH_CHECK_VALUE(granularity == "sample", "granularity: expected 'element', 'channel' or 'sample', but got '",
                      granularity, "'");
    chain.granularity = Granularity::sample;
  }
  chain.noise = Noise::constant;
  chain.multiplier = 1;
  if (kind == "bernoulli") {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
    chain.threshold = math::keep_threshold(p);
    if (p > 0 && p < 1) {
      chain.noise = Noise::bernoulli;
      chain.multiplier = math::keep_scale(chain.threshold);
    } else if (varies) {
      chain.noise = Noise::bernoulli;
      chain.threshold = p == 0 ? kAllKept : 0;
    } else if (p == 1) {
      chain.multiplier = 0;
    }
  } else if (kind == "uniform") {
    TORCH_CHECK_VALUE(p >= 0 && p <= 1, "beta: expected a number between 0 and 1, but got ", p);
    if (p > 0 || varies) chain.noise = Noise::uniform;
    chain.strength = static_cast<float>(p);
  } else {
    TORCH_CHECK_VALUE(kind == "gaussian", "noise: expected 'bernoulli', 'uniform' or 'gaussian', but got '", kind, "'");
    TORCH_CHECK_VALUE(p >= 0 && std::isfinite(p), "alpha: expected a number of 0 or more, but got ", p);
    if (p > 0 || varies) chain.noise = Noise::gaussian;
    chain.strength = static_cast<float>(std::sqrt(p));
  }
}

void set_activation(Chain& chain, const Settings& s, const OptionalTensor& weight) {
  chain.activation = -1;
  for (size_t i = 0; i < activations().size(); ++i) {
    if (activations()[i].name == s.act) chain.activation = static_cast<int>(i);
  }
  TORCH_CHECK_VALUE(chain.activation >= 0, "act: expected one of ", activation_names(), ", but got '", s.act, "'");
  const ActivationInfo& info = activations()[chain.activation];
  TORCH_CHECK_VALUE(s.act_params.size() == info.parameters, "act_params: expected ", info.parameters, " for '",
                    info.name, "', but got ", s.act_params.size());
  for (size_t i = 0; i < s.act_params.size(); ++i) chain.parameters[i] = s.act_params[i];
  chain.one_bit = info.one_bit;
  chain.has_weight = info.has_weight;
  TORCH_CHECK_VALUE(weight.has_value() == info.has_weight, "act_weight: expected ",
                    info.has_weight ? "a tensor" : "None", " for '", info.name, "'");
}

// Places the stages of `order` that do something.
void set_stages(Chain& chain, std::string_view order) {
  const bool live[] = {false, true, chain.activation != 0, chain.noise != Noise::constant || chain.multiplier != 1};
  bool seen[4] = {}, normed = false;
  int before = 0, after = 0;
  for (size_t begin = 0; begin <= order.size();) {
    const size_t end = std::min(order.find('-', begin), order.size());
    const std::string_view name = order.substr(begin, end - begin);
    begin = end + 1;
    if (name == "norm" && !normed) {
      normed = true;
      continue;
    }
    const Stage stage = name == "act"    ? Stage::act
                        : name == "drop" ? Stage::drop
                        : name == "add"  ? Stage::add
                                         : Stage::none;
    const int i = static_cast<int>(stage);
    TORCH_CHECK_VALUE(
        stage != Stage::none && !seen[i] && (stage != Stage::add || normed),
        "order: expected 'norm' and, at most once each, 'act', 'drop' and behind it 'add', joined by '-', "
        "but got '",
        order, "'");
    seen[i] = true;
    if (live[i]) (normed ? chain.after[after++] : chain.before[before++]) = stage;
  }
  TORCH_CHECK_VALUE(normed, "order: expected 'norm' in it, but got '", order, "'");
}

}  // namespace

Chain make_chain(const Settings& s, const OptionalTensor& act_weight) {
  Chain chain{};
  set_noise(chain, s.noise, s.p, s.granularity, s.strength);
  set_activation(chain, s, act_weight);
  set_stages(chain, s.order);
  // What the order has no place for is as good as not given.
  if (chain.after_at(Stage::drop) < 0 && !chain.before_has(Stage::drop)) {
    chain.noise = Noise::constant;
    chain.multiplier = 1;
  }
  if (chain.after_at(Stage::act) < 0 && !chain.before_has(Stage::act)) {
    chain.activation = 0;
    chain.one_bit = true;
    chain.has_weight = false;
  }
  TORCH_CHECK_VALUE(s.ghost_batch_size >= 0, "ghost_batch_size: expected 0 or more, but got ", s.ghost_batch_size);
  return chain;
}

// Backward asks for what entered an activation, unless a bit says all about it.
bool reads_residual(const Chain& chain, const Tensor& mask) {
  const int act = chain.after_at(Stage::act), add = chain.after_at(Stage::add);
  return add >= 0 && act > add && !(mask.numel() > 0 && chain.saves_pass());
}

namespace {

// ---- layouts ------------------------------------------------------------------------------------------------------
// How a dense tensor lies in memory: sample by sample, with the channels of each first or last, or channel by channel.
enum class Memory { channels_first, channels_last, channel_by_channel };

// Strides are those of (N, spatial..., C), C innermost; dimensions of size 1 have no say.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    const bool ok = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return ok;
  };
  bool ok = matches(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) ok = matches(d) && ok;
  return matches(0) && ok;
}

bool lies(const Tensor& x, Memory memory) {
  return memory == Memory::channels_first  ? x.is_contiguous()
         : memory == Memory::channels_last ? is_channels_last(x)
                                           : x.transpose(0, 1).is_contiguous();
}

Tensor to_memory(const Tensor& x, Memory memory) {
  if (lies(x, memory)) return x;
  return memory == Memory::channels_first  ? x.contiguous()
         : memory == Memory::channels_last ? x.movedim(1, -1).contiguous().movedim(-1, 1)
                                           : x.transpose(0, 1).contiguous().transpose(0, 1);
}

int64_t spatial_size(const Tensor& x) {
  int64_t spatial = 1;
  for (int64_t d = 2; d < x.dim(); ++d) spatial *= x.size(d);
  return spatial;
}

// Channel by channel, a batch is one long sample.
Shape shape_of(const Tensor& x, Memory memory) {
  const int64_t spatial = spatial_size(x);
  if (memory == Memory::channel_by_channel) return {1, x.size(1), x.size(0) * spatial, false};
  return {x.size(0), x.size(1), spatial, memory == Memory::channels_last};
}

// How to look at x, in the memory order that empty_like gives it if it is not dense. Where channels first and last are
// the same memory (S = 1), rows of channels are the better view; a single channel is one run. `joins`: whether samples
// may be looked at as one.
Memory memory_of(const Tensor& x, bool joins) {
  const bool first = x.is_contiguous(), last = !first && is_channels_last(x);
  if (!first && !last) {
    if (joins && lies(x, Memory::channel_by_channel)) return Memory::channel_by_channel;
    if (!x.is_non_overlapping_and_dense()) return memory_of(at::empty_like(x), joins);
  }
  if (x.size(1) == 1) return Memory::channels_first;
  return last || spatial_size(x) == 1 ? Memory::channels_last : Memory::channels_first;
}

// CUDA kernels count the rows of a sample in 32 bits (elements in 64), unless samples follow one another.
void check_shape(const Shape& s, const Chain& chain, const Tensor& x) {
  const bool joined = s.channels_last || s.N == 1 || (s.C == 1 && chain.granularity == Granularity::element);
  TORCH_CHECK(!x.is_cuda() || joined || s.S < (int64_t{1} << 31),
              "expected samples of fewer than 2^31 values per channel, but got shape ", x.sizes());
}

// Memory for results. On the CPU past the dispatcher, which costs a small layer more than its kernels do.
Tensor fresh(at::IntArrayRef size, at::ScalarType dtype, const Tensor& beside) {
  if (beside.is_cpu()) return Tensor(at::detail::empty_cpu(size, dtype));
  return at::empty(size, beside.options().dtype(dtype).memory_format(std::nullopt));
}
Tensor fresh_like(const Tensor& x) {
  if (!x.is_cpu() || !x.is_non_overlapping_and_dense()) return at::empty_like(x);
  return Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type()));
}

// The output's strides are those of empty_like(input), which the fake kernels call too (_operators.py).
Tensor restore_strides(const Tensor& y, const Tensor& input) {
  // What is dense keeps its strides: spares allocating a tensor just to look at its own.
  if (y.strides() == input.strides() && input.is_non_overlapping_and_dense()) return y;
  Tensor result = at::empty_like(input);
  return result.strides() == y.strides() ? y : result.copy_(y);
}

// ---- tensors ------------------------------------------------------------------------------------------------------
at::ScalarType opmath(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

bool is_supported(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kBFloat16 || t == at::kHalf;
}

void check_input(const char* name, const Tensor& x) {
  TORCH_CHECK(x.layout() == at::kStrided, name, ": expected a dense (strided) tensor, but got ", x.layout());
  TORCH_CHECK(is_supported(x.scalar_type()), name, ": expected float32, float64, bfloat16 or float16, but got ",
              x.scalar_type());
  TORCH_CHECK(x.dim() >= 2 && x.dim() <= 5, name, ": expected 2 to 5 dimensions (N, C, ...), but got ", x.dim());
  TORCH_CHECK(x.size(1) > 0, name, ": expected at least one channel, but got shape ", x.sizes());
}

// A per-channel vector of any floating dtype, as a dense (C,); undefined if absent.
Tensor channel_vector(const char* name, const OptionalTensor& v, const Tensor& x) {
  if (!v.has_value() || !v->defined()) return Tensor();
  TORCH_CHECK(v->device() == x.device(), name, ": expected a tensor on ", x.device(), ", but got one on ", v->device());
  TORCH_CHECK(is_supported(v->scalar_type()), name, ": expected float32, float64, bfloat16 or float16, but got ",
              v->scalar_type());
  TORCH_CHECK(v->numel() == x.size(1), name, " should contain ", x.size(1), " elements not ", v->numel());
  if (v->dim() == 1 && v->is_contiguous()) return *v;  // spares small layers two calls
  return v->reshape({x.size(1)}).contiguous();
}
Tensor in_opmath(const Tensor& v, const Tensor& x) {
  return !v.defined() || v.scalar_type() == opmath(x) ? v : v.to(opmath(x));
}
// CPU kernels read vectors in opmath type; CUDA kernels in any, which spares a launch for each.
Tensor parameter(const char* name, const OptionalTensor& v, const Tensor& x) {
  const Tensor vector = channel_vector(name, v, x);
  return x.is_cuda() ? vector : in_opmath(vector, x);
}

void check_seed(const Tensor& seed, c10::Device device) {
  TORCH_CHECK_VALUE(seed.scalar_type() == at::kLong && (seed.numel() == 1 || is_numbered(seed)),
                    "seed: expected an int64 scalar tensor, but got shape ", seed.sizes(), " of ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.device() == device, "seed: expected a tensor on ", device, ", but got one on ", seed.device());
}
Tensor seed_if_drawn(const OptionalTensor& seed, const Tensor& x, const Chain& chain) {
  if (!chain.draws()) return Tensor();
  TORCH_CHECK_VALUE(seed.has_value() && seed->defined(), "seed: expected an int64 scalar tensor, but got None");
  check_seed(*seed, x.device());
  return *seed;
}

// A saved mask has a layout of its own for each backend: on the CPU words of 32 adjacent bits, on CUDA the 8 bits of a
// Philox call in a byte. The number of dimensions says of which memory layout it is.
std::vector<int64_t> mask_size(const Shape& s, const Chain& chain, const Tensor& x) {
  const auto words = [](int64_t bits) { return (bits + 31) / 32; };
  if (x.is_cuda()) {
    const int64_t calls = (s.rows() + math::kRowsPerCall - 1) / math::kRowsPerCall;
    return s.channels_last ? std::vector<int64_t>{calls, s.C, 1} : std::vector<int64_t>{s.C, calls};
  }
  if (s.channels_last) return {s.N, s.S, words(s.C)};
  if (has_short_rows(s, chain)) {
    const int64_t block = channels_of_block(s), last = (s.C - 1) % block + 1;
    return {s.N, (s.C - 1) / block * words(block * s.S) + words(last * s.S)};
  }
  const PieceLayout pieces = piece_layout(s);
  return {s.C, pieces.count * words(pieces.length)};
}
at::ScalarType mask_dtype(const Tensor& x) { return x.is_cuda() ? at::kByte : at::kInt; }

// About a bit per element beside the input: where padding the channels of a row to whole words would cost much more,
// the bits are redrawn. The sizes of a mask hang on the batch by arithmetic only, and it is never empty for some
// batches: a compiled graph would be pinned to the others. (The fake kernel in _operators.py repeats this; opcheck
// compares them.)
bool worth_saving(const Shape& s, const Tensor& x) {
  return x.is_cuda() || !s.channels_last || s.C % 32 == 0 || s.C >= 512;
}

Tensor check_residual(const OptionalTensor& residual, const Tensor& x, Memory memory) {
  TORCH_CHECK_VALUE(residual.has_value() && residual->defined(),
                    "residual: expected a tensor for an order with 'add', but got None");
  TORCH_CHECK_VALUE(residual->sizes() == x.sizes(), "residual: expected shape ", x.sizes(), ", but got ",
                    residual->sizes());
  TORCH_CHECK_VALUE(residual->scalar_type() == x.scalar_type() && residual->device() == x.device(),
                    "residual: expected ", x.scalar_type(), " on ", x.device(), ", but got ", residual->scalar_type(),
                    " on ", residual->device());
  return to_memory(*residual, memory);
}
Tensor check_strength(const OptionalTensor& strength, const Tensor& x) {
  if (!strength.has_value() || !strength->defined()) return Tensor();
  TORCH_CHECK_VALUE(strength->numel() == 1 && is_supported(strength->scalar_type()) && strength->device() == x.device(),
                    "strength: expected a floating-point scalar tensor on ", x.device(), ", but got shape ",
                    strength->sizes(), " of ", strength->scalar_type(), " on ", strength->device());
  return *strength;
}
// The rows that count, as one dense vector (N*S,); undefined where all do.
Tensor check_valid(const OptionalTensor& valid, const Tensor& x) {
  if (!valid.has_value() || !valid->defined()) return Tensor();
  std::vector<int64_t> size = x.sizes().vec();
  size.erase(size.begin() + 1);
  TORCH_CHECK_VALUE(
      valid->scalar_type() == at::kBool && valid->sizes() == at::IntArrayRef(size) && valid->device() == x.device(),
      "valid: expected shape ", at::IntArrayRef(size), " of bool on ", x.device(), ", but got ", valid->sizes(), " of ",
      valid->scalar_type(), " on ", valid->device());
  return valid->contiguous();
}
Tensor check_act_weight(const OptionalTensor& weight, const Tensor& x) {
  if (!weight.has_value()) return Tensor();
  return parameter("prelu weight", weight->numel() == 1 ? weight->reshape({1}).expand({x.size(1)}) : *weight, x);
}

}  // namespace

std::pair<int64_t, int64_t> ghosts(const Settings& s, int64_t N) {
  if (!s.training || s.ghost_batch_size == 0 || s.ghost_batch_size >= N) return {std::max<int64_t>(N, 1), 1};
  return {s.ghost_batch_size, (N + s.ghost_batch_size - 1) / s.ghost_batch_size};
}

Forward check_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& residual, const OptionalTensor& act_weight, const OptionalTensor& seed,
                      const OptionalTensor& valid, const Settings& settings, bool eval_matched_stats, bool save_mask,
                      bool emits) {
  check_input("input", input);
  Forward q{};
  q.chain = make_chain(settings, act_weight);
  q.valid = check_valid(valid, input);
  q.chain.gaps = q.valid.defined();
  q.strength = check_strength(settings.strength, input);
  q.training = settings.training;
  q.eps = settings.eps;
  q.running_mean = parameter("running_mean", running_mean, input);  // torch's order of complaints
  q.running_var = parameter("running_var", running_var, input);
  q.weight = parameter("weight", weight, input);
  q.bias = parameter("bias", bias, input);
  q.act_weight = check_act_weight(act_weight, input);
  TORCH_CHECK(q.training || (q.running_mean.defined() && q.running_var.defined()),
              "running_mean and running_var: expected tensors when training=False, but got None");
  q.seed = seed_if_drawn(seed, input, q.chain);

  std::tie(q.ghost, q.groups) = ghosts(settings, input.size(0));
  const bool masked = save_mask && q.groups == 1 && (q.chain.saves_pass() || q.chain.saves_keep());
  const bool joins = q.groups == 1 && q.chain.granularity == Granularity::element && !is_numbered(seed);
  const Memory memory = memory_of(input, joins && !masked);
  q.x = to_memory(input, memory);
  if (emits) q.y = fresh_like(q.x);
  q.shape = shape_of(q.x, memory);
  if (q.groups == 1) q.ghost = std::max<int64_t>(q.shape.N, 1);
  check_shape(q.shape, q.chain, q.x);
  const bool adds = q.chain.after_at(Stage::add) >= 0;
  if (adds) q.residual = check_residual(residual, q.x, memory);
  TORCH_CHECK_VALUE(adds || !residual.has_value(), "residual: expected None for order '", settings.order, "'");
  const auto vectors = [&](bool wanted) {
    const int64_t size[] = {q.groups, q.shape.C};
    if (!wanted) return fresh({0}, opmath(q.x), q.x);
    return fresh(at::IntArrayRef(size + (q.groups == 1), size + 2), opmath(q.x), q.x);
  };
  q.mean = vectors(true);
  q.invstd = vectors(true);
  q.stat_var = vectors(true);
  q.stat_mean = vectors(eval_matched_stats && q.training && q.chain.before_has(Stage::drop));
  if (!emits) q.var = vectors(true);
  q.mask = fresh(masked && worth_saving(q.shape, q.x) ? mask_size(q.shape, q.chain, q.x) : std::vector<int64_t>{0},
                 mask_dtype(q.x), q.x);
  if (q.chain.gaps && q.mask.numel() > 0) q.mask.zero_();  // of rows that do not count nobody writes bits
  return q;
}

Backward check_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                        const Tensor& save_mean, const Tensor& save_invstd, const Tensor& mask,
                        const OptionalTensor& seed, const OptionalTensor& valid, const Settings& settings,
                        std::array<bool, 5> output_mask) {
  check_input("input", input);
  TORCH_CHECK(grad_output.sizes() == input.sizes(), "grad_output: expected shape ", input.sizes(), ", but got ",
              grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output: expected ", input.scalar_type(),
              ", but got ", grad_output.scalar_type());
  TORCH_CHECK(grad_output.device() == input.device(), "grad_output: expected a tensor on ", input.device(),
              ", but got one on ", grad_output.device());
  Backward q{};
  q.chain = make_chain(settings, act_weight);
  q.valid = check_valid(valid, input);
  q.chain.gaps = q.valid.defined();
  q.strength = check_strength(settings.strength, input);
  q.training = settings.training;
  q.weight = parameter("weight", weight, input);
  q.bias = parameter("bias", bias, input);
  q.act_weight = check_act_weight(act_weight, input);
  std::tie(q.ghost, q.groups) = ghosts(settings, input.size(0));
  const auto statistics = [&](const char* name, const Tensor& v) {
    if (q.groups == 1) return in_opmath(channel_vector(name, v, input), input);
    TORCH_CHECK(v.device() == input.device() && v.dim() == 2 && v.size(0) == q.groups && v.size(1) == input.size(1),
                name, ": expected shape [", q.groups, ", ", input.size(1), "] on ", input.device(), ", but got ",
                v.sizes(), " on ", v.device());
    return in_opmath(v.contiguous(), input);
  };
  q.mean = statistics("save_mean", save_mean);
  q.invstd = statistics("save_invstd", save_invstd);
  q.seed = seed_if_drawn(seed, input, q.chain);

  // A saved mask carries its own layout; x may come back in another one (save_on_cpu makes it contiguous).
  const bool masked = mask.numel() > 0;
  const Memory of_mask = mask.dim() == 3 ? Memory::channels_last : Memory::channels_first;
  const bool joins = q.groups == 1 && q.chain.granularity == Granularity::element && !is_numbered(seed);
  const Memory memory = masked ? of_mask : memory_of(input, joins);
  q.x = to_memory(input, memory);
  q.shape = shape_of(q.x, memory);
  if (q.groups == 1) q.ghost = std::max<int64_t>(q.shape.N, 1);
  check_shape(q.shape, q.chain, q.x);
  if (masked) {
    TORCH_CHECK(q.groups == 1 && (q.chain.saves_pass() || q.chain.saves_keep()) &&
                    mask.scalar_type() == mask_dtype(input) && mask.device() == input.device() &&
                    mask.sizes() == at::IntArrayRef(mask_size(q.shape, q.chain, input)),
                "mask: expected what forward returned for this input, but got shape ", mask.sizes(), " of ",
                mask.scalar_type(), " on ", mask.device());
    q.mask = mask.contiguous();
  }
  const bool adds = q.chain.after_at(Stage::add) >= 0;
  TORCH_CHECK_VALUE(adds || !residual.has_value(), "residual: expected None for order '", settings.order, "'");
  if (reads_residual(q.chain, mask)) q.residual = check_residual(residual, q.x, memory);
  q.grad_output = to_memory(grad_output, memory);
  if (output_mask[0]) q.grad_input = fresh_like(q.x);
  if (output_mask[3] && adds) q.grad_residual = fresh_like(q.x);
  const auto gradient = [&](at::ScalarType dtype) {
    return q.x.numel() == 0 ? at::zeros({q.shape.C}, q.x.options().dtype(dtype)) : fresh({q.shape.C}, dtype, q.x);
  };
  if (q.training || output_mask[1] || output_mask[2]) {
    q.grad_weight = gradient(q.weight.defined() ? q.weight.scalar_type() : opmath(q.x));
    q.grad_bias = gradient(q.bias.defined() ? q.bias.scalar_type() : opmath(q.x));
  }
  if (output_mask[4] && q.act_weight.defined()) {
    q.grad_act_weight = gradient(act_weight->numel() == 1 ? opmath(q.x) : q.act_weight.scalar_type());
    if (!q.chain.has_weight) q.grad_act_weight.zero_();
  }
  return q;
}

namespace {
// Rows of the sums of a first pass.
int64_t rows_of_sums(const Backward& q) { return q.chain.has_weight ? 5 : 2; }
}  // namespace

Backward check_sums(Backward q) {
  q.sums = at::zeros({rows_of_sums(q), q.shape.C}, q.x.options().dtype(at::kDouble));
  return q;
}

Backward check_given(Backward q, const Tensor& sums, const Tensor& count) {
  const auto check = [&](const char* name, const Tensor& t, at::IntArrayRef sizes) {
    TORCH_CHECK(t.scalar_type() == at::kDouble && t.sizes() == sizes && t.device() == q.x.device(), name,
                ": expected shape ", sizes, " of float64 on ", q.x.device(), ", but got ", t.sizes(), " of ",
                t.scalar_type(), " on ", t.device());
    return t.contiguous();
  };
  q.given = check("sums", sums, {rows_of_sums(q), q.shape.C});
  q.count = check("count", count, {});
  q.grad_weight = q.grad_bias = Tensor();  // of one process's values: from its own sums
  return q;
}

BackwardResult backward_result(const Backward& q, const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& act_weight,
                               std::array<bool, 5> output_mask) {
  const auto none = [&] { return fresh({0}, q.x.scalar_type(), q.x); };
  const auto vector = [&](const Tensor& grad, const OptionalTensor& parameter, bool wanted) {
    if (!wanted || !parameter.has_value() || !parameter->defined()) return none();
    const Tensor result = grad.to(parameter->scalar_type());
    return result.sizes() == parameter->sizes() ? result : result.view_as(*parameter);  // spares small layers a call
  };
  const auto elements = [&](const Tensor& grad) { return grad.defined() ? restore_strides(grad, input) : none(); };
  const bool shared = q.grad_act_weight.defined() && act_weight->numel() == 1;  // by all channels
  return {elements(q.grad_input), vector(q.grad_weight, weight, output_mask[1]),
          vector(q.grad_bias, bias, output_mask[2]), elements(q.grad_residual),
          vector(shared ? q.grad_act_weight.sum() : q.grad_act_weight, act_weight, q.grad_act_weight.defined())};
}

Tensor forward_result(const Forward& q, const Tensor& input) { return restore_strides(q.y, input); }

NoiseRequest check_noise(const Tensor& seed, at::IntArrayRef size, double p, std::string_view kind,
                         std::string_view granularity, at::ScalarType dtype) {
  NoiseRequest q{};
  set_noise(q.chain, kind, p, granularity, {});
  TORCH_CHECK_VALUE(size.size() >= 2, "size: expected (N, C, ...), but got ", size);
  for (int64_t n : size) TORCH_CHECK_VALUE(n >= 0, "size: expected no negative entry, but got ", size);
  TORCH_CHECK_VALUE(is_supported(dtype), "dtype: expected float32, float64, bfloat16 or float16, but got ", dtype);
  check_seed(seed, seed.device());
  std::vector<int64_t> own(size.begin(), size.end());
  if (q.chain.granularity != Granularity::element) std::fill(own.begin() + 2, own.end(), 1);
  if (q.chain.granularity == Granularity::sample) own[1] = std::min<int64_t>(own[1], 1);
  q.y = at::empty(own, seed.options().dtype(dtype));
  int64_t spatial = 1;
  for (size_t d = 2; d < own.size(); ++d) spatial *= own[d];
  q.shape = {own[0], own[1], spatial, false};
  check_shape(q.shape, q.chain, q.y);
  q.chain.granularity = Granularity::element;  // of a tensor whose S, and perhaps C, is 1: the same draws
  return q;
}

NoiseRequest check_dropout(const Tensor& input, const Tensor& seed, double p, std::string_view kind,
                           std::string_view granularity, const OptionalTensor& strength) {
  check_input("input", input);
  check_seed(seed, input.device());
  NoiseRequest q{};
  set_noise(q.chain, kind, p, granularity, strength);
  q.strength = check_strength(strength, input);
  const Memory memory = memory_of(input, q.chain.granularity == Granularity::element && !is_numbered(seed));
  q.x = to_memory(input, memory);
  q.shape = shape_of(q.x, memory);
  check_shape(q.shape, q.chain, q.x);
  q.y = fresh_like(q.x);
  return q;
}

Tensor dropout_result(const NoiseRequest& q, const Tensor& input) { return restore_strides(q.y, input); }

void check_update_stats(const Tensor& running_mean, const Tensor& running_var,
                        const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                        std::optional<double> momentum, const OptionalTensor& counts) {
  TORCH_CHECK((mean.dim() == 1 || mean.dim() == 2) && var.sizes() == mean.sizes(),
              "mean and var: expected one shape (C) or (groups, C), but got ", mean.sizes(), " and ", var.sizes());
  const int64_t C = mean.size(-1);
  const auto check = [&](const char* name, const Tensor& t, int64_t n) {
    TORCH_CHECK(is_supported(t.scalar_type()), name, ": expected float32, float64, bfloat16 or float16, but got ",
                t.scalar_type());
    TORCH_CHECK(t.numel() == n, name, " should contain ", n, " elements not ", t.numel());
    TORCH_CHECK(t.device() == mean.device(), name, ": expected a tensor on ", mean.device(), ", but got one on ",
                t.device());
  };
  check("running_mean", running_mean, C);
  check("running_var", running_var, C);
  check("mean", mean, mean.numel());
  check("var", var, mean.numel());
  if (counts.has_value()) {
    TORCH_CHECK(counts->scalar_type() == at::kDouble, "counts: expected float64, but got ", counts->scalar_type());
    check("counts", *counts, mean.numel() / C);
  }
  if (num_batches_tracked.has_value()) {
    TORCH_CHECK(num_batches_tracked->scalar_type() == at::kLong && num_batches_tracked->numel() == 1 &&
                    num_batches_tracked->device() == mean.device(),
                "num_batches_tracked: expected an int64 scalar tensor on ", mean.device(), ", but got shape ",
                num_batches_tracked->sizes(), " of ", num_batches_tracked->scalar_type(), " on ",
                num_batches_tracked->device());
  } else {
    TORCH_CHECK(momentum.has_value(), "momentum: expected a float when num_batches_tracked is None, but got None");
  }
}

// ---- registration -------------------------------------------------------------------------------------------------
namespace {

// Autograd lives in _autograd.py, around these operators. A call that reaches one directly with something to
// differentiate is refused: going on would return a result without a history, that is, a silent zero gradient.
void refuse(const Tensor& t) {
  if (!t.defined()) return;
  TORCH_CHECK(!(t.requires_grad() && at::GradMode::is_enabled()),
              "torch.ops.fusednorm operators have no derivative of their own: call "
              "fusednorm.functional.batch_norm_act_drop or a fusednorm module, or use torch.no_grad()");
  TORCH_CHECK(!t._fw_grad(0).defined(),
              "torch.ops.fusednorm operators have no forward-mode derivative of their own: call "
              "fusednorm.functional.batch_norm_act_drop or a fusednorm module");
}
void refuse(const OptionalTensor& t) {
  if (t.has_value()) refuse(*t);
}
template <class Other>
void refuse(const Other&) {}

template <class Name, class Signature>
struct NoDerivative;
template <class Name, class Result, class... Args>
struct NoDerivative<Name, Result(Args...)> {
  static Result call(c10::DispatchKeySet keys, Args... args) {
    (refuse(args), ...);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Name::value, "").template typed<Result(Args...)>();
    at::AutoDispatchBelowADInplaceOrView below;
    return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
  }
};
struct ForwardName {
  static constexpr const char* value = "fusednorm::forward";
};
struct BackwardName {
  static constexpr const char* value = "fusednorm::backward";
};
struct DropoutName {
  static constexpr const char* value = "fusednorm::dropout";
};
struct StatisticsName {
  static constexpr const char* value = "fusednorm::statistics";
};
struct SumsName {
  static constexpr const char* value = "fusednorm::gradient_sums";
};
struct GivenName {
  static constexpr const char* value = "fusednorm::backward_given";
};

}  // namespace

TORCH_LIBRARY(fusednorm, m) {
  m.def("draw_seed(Tensor like) -> Tensor", {at::Tag::nondeterministic_seeded});
  m.def(
      "forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? "
      "residual, Tensor? act_weight, Tensor? seed, bool training, float eps, str order, str act, float[] act_params, "
      "str noise, float p, str granularity, int ghost_batch_size, bool eval_matched_stats, bool save_mask, Tensor? "
      "valid=None, Tensor? strength=None) -> (Tensor output, Tensor save_mean, Tensor save_invstd, Tensor stat_var, "
      "Tensor stat_mean, Tensor mask)");
  m.def(
      "backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? act_weight, "
      "Tensor save_mean, Tensor save_invstd, Tensor mask, Tensor? seed, bool training, float eps, str order, str act, "
      "float[] act_params, str noise, float p, str granularity, int ghost_batch_size, bool[5] output_mask, Tensor? "
      "valid=None, Tensor? strength=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor "
      "grad_residual, Tensor grad_act_weight)");
  m.def(
      "statistics(Tensor input, Tensor? act_weight, Tensor? seed, str order, str act, float[] act_params, str noise, "
      "float p, str granularity, bool eval_matched_stats, Tensor? valid=None, Tensor? strength=None) -> (Tensor mean, "
      "Tensor var, Tensor stat_mean, Tensor stat_var)");
  m.def(
      "gradient_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? "
      "act_weight, Tensor save_mean, Tensor save_invstd, Tensor mask, Tensor? seed, float eps, str order, str act, "
      "float[] act_params, str noise, float p, str granularity, Tensor? valid=None, Tensor? strength=None) -> Tensor");
  m.def(
      "backward_given(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? "
      "act_weight, Tensor save_mean, Tensor save_invstd, Tensor mask, Tensor? seed, Tensor sums, Tensor count, float "
      "eps, str order, str act, float[] act_params, str noise, float p, str granularity, bool[3] output_mask, Tensor? "
      "valid=None, Tensor? strength=None) -> (Tensor grad_input, Tensor grad_residual, Tensor grad_act_weight)");
  m.def(
      "update_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, Tensor mean, "
      "Tensor var, SymInt count, SymInt last_count, float? momentum, Tensor? counts=None) -> ()");
  m.def("noise(Tensor seed, SymInt[] size, float p, str kind, str granularity, ScalarType dtype) -> Tensor");
  m.def("dropout(Tensor input, Tensor seed, float p, str kind, str granularity, Tensor? strength=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(fusednorm, Autograd, m) {
  m.impl("forward", &NoDerivative<ForwardName, ForwardSignature>::call);
  m.impl("backward", &NoDerivative<BackwardName, BackwardSignature>::call);
  m.impl("dropout", &NoDerivative<DropoutName, DropoutSignature>::call);
  m.impl("statistics", &NoDerivative<StatisticsName, StatisticsSignature>::call);
  m.impl("gradient_sums", &NoDerivative<SumsName, SumsSignature>::call);
  m.impl("backward_given", &NoDerivative<GivenName, GivenSignature>::call);
  m.impl("update_stats_", torch::CppFunction::makeFallthrough());  // of what requires no gradient
}

}  // namespace fusednorm

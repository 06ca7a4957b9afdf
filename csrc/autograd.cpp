// The call as eager programs make it: the operators, their place in autograd's graph and the update of the running
// statistics, in one. It spares small layers what an autograd Function costs in Python, which is more than their
// kernels. Its twin in fusednorm/_autograd.py is for tensors with a dispatch of their own and for programs that are
// compiled.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops.h"

namespace fusednorm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What a call is told beside the tensors that may need gradients, and what it returns.
struct Call {
  OptionalTensor running_mean, running_var, seed;
  Settings settings;
  bool eval_matched_stats, save_mask;
  ForwardResult result;
};

void run(Call& call, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
         const OptionalTensor& residual, const OptionalTensor& act_weight, bool save_mask) {
  static const auto op = find<ForwardSignature>("fusednorm::forward");
  const Settings& s = call.settings;
  call.result = op.call(input, weight, bias, call.running_mean, call.running_var, residual, act_weight, call.seed,
                        s.training, s.eps, s.order, s.act, s.act_params, s.noise, s.p, s.granularity,
                        s.ghost_batch_size, call.eval_matched_stats, save_mask, {}, {});
}

// Where the saved tensors alone do not say what a gradient depends on: it is to be differentiated again, or transforms
// or tangents are about. The kernels would make a constant of it.
bool needs_graph(const variable_list& saved, const Tensor& grad_output) {
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  const auto depends = [](const Tensor& t) {
    return t.defined() && ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(0).defined());
  };
  return depends(grad_output) || std::any_of(saved.begin(), saved.end(), depends);
}

struct BatchNormActDrop : torch::autograd::Function<BatchNormActDrop> {
  static constexpr bool is_traceable = true;  // by compiled autograd

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& act_weight,
                        Call* call) {
    run(*call, input, weight, bias, residual, act_weight, call->save_mask);
    const auto& [output, mean, invstd, var, clean_mean, mask] = call->result;
    const Settings& s = call->settings;
    const bool adds = residual.has_value();
    ctx->set_materialize_grads(false);
    // In one level: compiled autograd looks values up by what they are.
    std::vector<c10::IValue> settings{adds,
                                      s.training,
                                      s.eps,
                                      std::string(s.order),
                                      std::string(s.act),
                                      std::string(s.noise),
                                      s.p,
                                      std::string(s.granularity),
                                      s.ghost_batch_size};
    settings.insert(settings.end(), s.act_params.begin(), s.act_params.end());
    ctx->saved_data["settings"] = c10::ivalue::Tuple::create(std::move(settings));
    // Never the running statistics themselves: the next forward overwrites them.
    const bool reads = adds && reads_residual(make_chain(s, act_weight), mask);
    ctx->save_for_backward({input, weight.value_or(Tensor()), bias.value_or(Tensor()), reads ? *residual : Tensor(),
                            act_weight.value_or(Tensor()), mean, invstd, mask, call->seed.value_or(Tensor())});
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& grad_output = grads[0];
    variable_list results(6);
    if (!grad_output.defined()) return results;
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<c10::IValue> s = ctx->saved_data["settings"].toTuple()->elements().vec();
    const bool given[] = {true, saved[1].defined(), saved[2].defined(), s[0].toBool(), saved[4].defined()};
    std::array<bool, 5> wanted{};
    for (int i = 0, edge = 0; i < 5; ++i) wanted[i] = given[i] && ctx->needs_input_grad(edge++);

    static const auto kernels = find<BackwardSignature>("fusednorm::backward");
    static const auto graph = find<BackwardSignature>("fusednorm::differentiable_backward");
    const bool plain = needs_graph(saved, grad_output);
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const std::string_view order = s[3].toStringView();
    // As a word: stages behind it that do nothing this time make no difference worth a second rule.
    const bool ends_with_add = !plain && order.size() > 4 && order.substr(order.size() - 4) == "-add";
    std::array<bool, 5> computed = wanted;
    if (ends_with_add) computed[3] = false;
    std::vector<double> act_params;
    for (size_t i = 9; i < s.size(); ++i) act_params.push_back(s[i].toDouble());
    const auto [input, weight, bias, residual, act_weight] =
        (plain ? graph : kernels)
            .call(grad_output, saved[0], optional(saved[1]), optional(saved[2]), optional(saved[3]), optional(saved[4]),
                  saved[5], saved[6], saved[7], optional(saved[8]), s[1].toBool(), s[2].toDouble(), order,
                  s[4].toStringView(), act_params, s[5].toStringView(), s[6].toDouble(), s[7].toStringView(),
                  s[8].toInt(), computed, {}, {});
    if (wanted[0]) results[0] = input;
    if (wanted[1]) results[1] = weight;
    if (wanted[2]) results[2] = bias;
    if (wanted[3]) results[3] = ends_with_add ? grad_output : residual;
    if (wanted[4]) results[4] = act_weight;
    return results;
  }
};

Tensor batch_norm_act_drop(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, const OptionalTensor& residual,
                           const OptionalTensor& act_weight, const OptionalTensor& seed, bool training,
                           std::optional<double> momentum, double eps, std::string_view order, std::string_view act,
                           at::ArrayRef<double> act_params, std::string_view noise, double p,
                           std::string_view granularity, int64_t ghost_batch_size, bool eval_matched_stats,
                           bool save_mask) {
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(),
                    "running_mean and running_var must either both be None or neither be None");
  Call call{running_mean,
            running_var,
            seed,
            {training, eps, order, act, act_params, noise, p, granularity, ghost_batch_size},
            eval_matched_stats,
            save_mask,
            {}};
  if (!seed && p > 0 && make_chain(call.settings, act_weight).draws()) {
    static const auto draw = find<Tensor(const Tensor&)>("fusednorm::draw_seed");
    call.seed = draw.call(input);
  }
  const auto differentiable = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() && (input.requires_grad() || differentiable(weight) || differentiable(bias) ||
                                     differentiable(residual) || differentiable(act_weight))) {
    std::get<0>(call.result) = BatchNormActDrop::apply(input, weight, bias, residual, act_weight, &call);
  } else {
    run(call, input, weight, bias, residual, act_weight, false);
  }
  const auto& [output, mean, invstd, var, clean_mean, mask] = call.result;
  if (training && running_mean) {
    using Update = void(Tensor&, Tensor&, const std::optional<Tensor>&, const Tensor&, const Tensor&, int64_t, int64_t,
                        std::optional<double>, const std::optional<Tensor>&);
    static const auto update = find<Update>("fusednorm::update_stats_");
    Tensor running[] = {*running_mean, *running_var};
    const int64_t samples = input.size(0), values = samples > 0 ? input.numel() / input.size(1) / samples : 0;
    const auto [ghost, groups] = ghosts(call.settings, samples);
    update.call(running[0], running[1], num_batches_tracked,
                eval_matched_stats && clean_mean.size(0) ? clean_mean : mean, var, ghost * values,
                (samples - (groups - 1) * ghost) * values, momentum, std::nullopt);
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fusednorm, m) {
  m.def(
      "batch_norm_act_drop(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? "
      "running_var, Tensor(c!)? num_batches_tracked, Tensor? residual, Tensor? act_weight, Tensor? seed, bool "
      "training, float? momentum, float eps, str order, str act, float[] act_params, str noise, float p, str "
      "granularity, int ghost_batch_size, bool eval_matched_stats, bool save_mask) -> Tensor",
      &batch_norm_act_drop);
  // In Python: it is the reference that is differentiated.
  m.def(
      "differentiable_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? act_weight, Tensor save_mean, Tensor save_invstd, Tensor mask, Tensor? seed, bool training, float eps, "
      "str order, str act, float[] act_params, str noise, float p, str granularity, int ghost_batch_size, bool[5] "
      "output_mask, Tensor? valid=None, Tensor? strength=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fusednorm

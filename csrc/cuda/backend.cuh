// The host side of the kernels, for one storage type: which of them a call gets, in what shape, in what order. A
// training forward is two launches (one if resident), a backward likewise, whatever the chain and however many groups.
#pragma once

#include "backend.h"
#include "channels_first.cuh"
#include "channels_first_flat.cuh"
#include "channels_first_resident.cuh"
#include "channels_last.cuh"
#include "channels_last_staged.cuh"
#include "plan.h"

namespace fusednorm::cuda {

// Whether all of the tensors can be accessed V values at a time: their addresses, and the length of what is contiguous.
// Channels-last, a mask is read and written V bytes at a time.
template <int V, class T>
bool vectorises(const Shape& shape, std::initializer_list<const T*> tensors, const uint8_t* mask) {
  if (shape.channels_last && reinterpret_cast<uintptr_t>(mask) % V != 0) return false;
  for (const T* p : tensors) {
    if (reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) != 0) return false;
  }
  return (shape.channels_last ? shape.C : shape.S) % V == 0;
}

// The chain as kernels take it.
template <class A>
void chain_of(const Call& call, Stages<A>& q) {
  const Chain& chain = call.chain;
  Draw draw = Draw::each_sample;
  if (!chain.draws()) {
    draw = chain.multiplier == 0 ? Draw::all_dropped : Draw::none;
  } else if (chain.granularity == Granularity::element || call.shape.S == 1) {
    draw = Draw::each_row;  // S = 1: r is n, the same draws
  }
  const bool acts = chain.before_has(Stage::act) || chain.after_at(Stage::act) >= 0;
  q = {acts ? chain.activation : 0,  // an order may leave it out
       {static_cast<A>(chain.parameters[0]), static_cast<A>(chain.parameters[1])},
       draw,
       chain.threshold,
       static_cast<A>(chain.multiplier),
       call.seed};
}

// Whether Stages say it all.
inline bool is_plain(const Call& call) {
  const Chain& chain = call.chain;
  const bool ordered = chain.before[0] == Stage::none && chain.after_at(Stage::add) < 0 &&
                       (chain.after_at(Stage::drop) < 0 || chain.after_at(Stage::drop) > chain.after_at(Stage::act));
  const bool decides = !chain.draws() || (chain.noise == Noise::bernoulli && chain.granularity != Granularity::sample);
  const bool usual = !call.counting.bits && !call.live;
  return ordered && decides && usual && !chain.has_weight && call.groups == 1;
}

template <class A>
void chain_of(const Call& call, Program<A>& q) {
  const Chain& chain = call.chain;
  chain_of(call, static_cast<Stages<A>&>(q));
  const auto append = [](Steps& to, Steps step) {
    int at = 0;
    while (to >> at) at += 4;
    to |= step << at;
  };
  q.act_after = chain.after_at(Stage::act) >= 0;
  for (Stage stage : chain.before) append(q.before, static_cast<Steps>(stage));
  q.all = q.before;
  append(q.all, kNorm);
  q.to_norm = q.to_act = q.all;
  for (int i = 0; i < 3; ++i) {
    append(q.all, static_cast<Steps>(chain.after[i]));
    if (i < chain.after_at(Stage::act)) append(q.to_act, static_cast<Steps>(chain.after[i]));
  }
  for (Steps rest = q.all; rest; rest >>= 4) q.back = q.back << 4 | (rest & kStep);
  for (Steps rest = q.back; !is_norm(rest); rest >>= 4) append(q.back_to_norm, rest & kStep);
  q.noise = chain.noise;
  q.strength = chain.strength;
  q.has_weight = chain.has_weight && (q.act_after || chain.before_has(Stage::act));
  q.one_channel = chain.granularity == Granularity::sample;
  q.noisy_before = chain.before_has(Stage::drop);
  q.noisy = q.noisy_before || chain.after_at(Stage::drop) >= 0;
  q.saves_pass = chain.saves_pass();
  q.saves_keep = chain.saves_keep();
  q.live = call.live;
}

// With one channel, samples follow one another: one long sample, unless its noise or its groups ask where each begins.
inline Shape simplified(const Call& call) {
  Shape shape = call.shape;
  const bool joined = shape.S == 1 || call.chain.granularity == Granularity::element || !call.chain.draws();
  if (!shape.channels_last && shape.C == 1 && joined && call.groups == 1) shape = {1, 1, shape.rows(), false};
  return shape;
}

inline Cut whole(const Shape& shape) { return {shape.rows(), 1}; }
inline Cut group_of(const Call& call, const Shape& shape) {
  return call.groups == 1 ? whole(shape) : Cut{call.ghost * shape.S, call.groups};
}

// A kernel and its name.
template <class Arguments>
struct Kernel {
  const char* name;
  void (*code)(Arguments);
};

inline Launch launch_of(const Context& context, const Plan& plan, int chunks, size_t shared, unsigned cluster,
                        int64_t groups) {
  const dim3 grid(static_cast<unsigned>(plan.blocks_x * groups), static_cast<unsigned>(chunks));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  return {grid, block, shared, cluster, context.stream, context.machine.shared_per_block, false};
}
// A second kernel, `behind` a first one if that was launched: where clusters are, it can also be launched early.
template <class Arguments>
void run_second(const Context& context, bool behind, Kernel<Arguments> kernel, const Plan& plan, int chunks,
                size_t shared, const Arguments& arguments, int64_t groups) {
  Launch at = launch_of(context, plan, chunks, shared, 1, groups);
  at.early = behind && context.machine.max_cluster > 1;
  launch(kernel.name, at, kernel.code, arguments);
}
template <class Arguments>
void run(const Context& context, Kernel<Arguments> kernel, const Plan& plan, size_t shared,
         const Arguments& arguments) {
  run_second(context, false, kernel, plan, plan.chunks, shared, arguments, arguments.groups.count);
}

// Runs a kernel that keeps so many tensors on its shelf, if there is a plan for it and room for its clusters. `set`
// takes the plan into the arguments.
template <class T, class Arguments, class Set>
bool run_on_shelf(const Context& context, Kernel<Arguments> kernel, const Plan& teams, const Cut& part, int64_t unit,
                  int tensors, Arguments& arguments, Set set) {
  const auto bytes = [&](const Plan& plan) {
    return kResidentScratch + shelf_bytes(plan.chunk_rows, plan.threads_y, tensors, sizeof(T));
  };
  Plan plan;
  if (!plan_resident(teams, part, unit, context.machine, plan, bytes)) return false;
  // A block that leaves no room for another one has the threads of both.
  if (bytes(plan) > half_of_shared(context.machine) && 2 * context.machine.threads <= kResidentThreads<T>) {
    plan.threads_x *= 2;
  }

  const Launch at = launch_of(context, plan, plan.chunks, bytes(plan), plan.chunks, part.groups);
  if (!can_hold(kernel.name, at, kernel.code)) return false;
  set(plan);
  launch(kernel.name, at, kernel.code, arguments);
  return true;
}

// Flat kernels are for whole groups of as many channels as a vector has values.
template <class T>
bool is_flat(const Context& context, Draw draw, const Shape& shape, std::initializer_list<const T*> tensors) {
  constexpr int V = kVector<T>;
  for (const T* p : tensors) {
    if (!p || reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return !shape.channels_last && shape.S % V != 0 && shape.S > V && shape.S < kMostReciprocal && shape.N > 1 &&
         shape.C % V == 0 && shape.C * shape.S < INT32_MAX && context.machine.threads >= kWarp * V &&
         draw != Draw::each_sample;
}

// The kernels of a chain that is Stages, and of one that is a Program.
template <class Type, int Vector>
struct Plain {
  using T = Type;
  static constexpr int V = Vector, kColumns = V, kFirstBlocks = kBlocks<T>;
  static constexpr bool resident = true, flat = V < kVector<T>;
  using Forward = ForwardArguments<T>;
  static constexpr Kernel<Forward> statistics{"channels_first_statistics", channels_first_statistics<T, V>};
  static constexpr Kernel<Forward> apply{"channels_first_apply", channels_first_apply<T, V>};
  static constexpr Kernel<Forward> resident_forward{"channels_first_resident_forward",
                                                    channels_first_resident_forward<T, V>};
  static constexpr Kernel<Forward> column_statistics{"channels_last_statistics", channels_last_statistics<T, V>};
  static constexpr Kernel<Forward> column_apply{"channels_last_apply", channels_last_apply<T, V>};
  using Backward = BackwardArguments<T>;
  static constexpr Kernel<Backward> sums{"channels_first_gradient_sums", channels_first_gradient_sums<T, V>};
  static constexpr Kernel<Backward> gradient{"channels_first_input_gradient", channels_first_input_gradient<T, V>};
  static constexpr Kernel<Backward> resident_backward{"channels_first_resident_backward",
                                                      channels_first_resident_backward<T, V>};
  static constexpr Kernel<Backward> column_sums{"channels_last_gradient_sums", channels_last_gradient_sums<T, V>};
  static constexpr Kernel<Backward> column_gradient{"channels_last_input_gradient", channels_last_input_gradient<T, V>};
};
template <class Type, int Vector>
struct Staged {
  using T = Type;
  static constexpr int V = Vector, kColumns = V < kStagedColumns ? V : kStagedColumns, kFirstBlocks = kBackwardBlocks;
  static constexpr bool resident = V >= 4, flat = false;  // of less, kernels with a shelf would spill
  using Forward = StagedForwardArguments<T>;
  static constexpr Kernel<Forward> statistics{"channels_first_staged_statistics",
                                              channels_first_staged_statistics<T, V>};
  static constexpr Kernel<Forward> apply{"channels_first_staged_apply", channels_first_staged_apply<T, V>};
  static constexpr Kernel<Forward> resident_forward{"channels_first_staged_resident_forward",
                                                    channels_first_staged_resident_forward<T, V>};
  static constexpr Kernel<Forward> column_statistics{"channels_last_staged_statistics",
                                                     channels_last_staged_statistics<T, kColumns>};
  static constexpr Kernel<Forward> column_apply{"channels_last_staged_apply", channels_last_staged_apply<T, kColumns>};
  using Backward = StagedBackwardArguments<T>;
  static constexpr Kernel<Backward> sums{"channels_first_staged_gradient_sums",
                                         channels_first_staged_gradient_sums<T, V>};
  static constexpr Kernel<Backward> gradient{"channels_first_staged_input_gradient",
                                             channels_first_staged_input_gradient<T, V>};
  static constexpr Kernel<Backward> resident_backward{"channels_first_staged_resident_backward",
                                                      channels_first_staged_resident_backward<T, V>};
  static constexpr Kernel<Backward> column_sums{"channels_last_staged_gradient_sums",
                                                channels_last_staged_gradient_sums<T, kColumns>};
  static constexpr Kernel<Backward> column_gradient{"channels_last_staged_input_gradient",
                                                    channels_last_staged_input_gradient<T, kColumns>};
};

// What forward, backward and noise have in common.
template <class Arguments>
Arguments arguments_of(const Call& call) {
  Arguments q{};
  q.shape = simplified(call);
  q.samples = samples_of(q.shape);
  chain_of(call, q.chain);
  q.counting = call.counting;
  q.training = call.training;
  return q;
}
template <class Arguments>
void apply_plan(Arguments& q, const Cut& part, const Plan& plan) {
  q.chunks = {part.rows, plan.chunk_rows, plan.chunks};
  q.groups = {part.groups, static_cast<unsigned>(plan.blocks_x), q.shape.rows()};
}

// Room for partial sums, `pairs` for each channel of each chunk.
template <class Arguments, class A = typename Arguments::A>
Pair<A>* partials(const Context& context, const Arguments& q, int pairs) {
  const int64_t channels = q.groups.count * q.chunks.count * q.shape.C;
  return static_cast<Pair<A>*>(context.workspace(sizeof(Pair<A>) * static_cast<size_t>(pairs * channels)));
}

// Shared memory of channels-last kernels.
template <int V, class A>
size_t column_bytes(const Plan& plan, const Stages<A>&) {
  return column_scratch<A, V>(plan.threads_x * plan.threads_y, plan.threads_x);
}
template <int V, class A>
size_t column_bytes(const Plan& plan, const Program<A>& program) {
  const bool numbers = program.noise == Noise::uniform || program.noise == Noise::gaussian;
  return column_bytes<V>(plan, static_cast<const Stages<A>&>(program)) +
         (numbers ? multiplier_bytes(V, plan.threads_x * plan.threads_y) : 0);
}

template <class Kernels, class T>
void run_forward(const Context& context, const Call& call, const Forward<T>& p) {
  auto q = arguments_of<typename Kernels::Forward>(call);
  q.p = p;
  q.eps = static_cast<opmath_t<T>>(call.eps);
  const Cut part = group_of(call, q.shape);
  const auto set = [&](const Plan& plan) { apply_plan(q, part, plan); };
  const auto run_both = [&](const Plan& plan, size_t shared, auto first, auto second) {
    set(plan);
    if (q.training) {
      q.partials[0] = partials(context, q, 1);
      if (p.stat_mean) q.partials[1] = partials(context, q, 1);
      run(context, first, plan, shared, q);
    }
    // Without a result, the second kernel only finishes the statistics.
    run_second(context, q.training, second, plan, p.y ? plan.chunks : 1, shared, q, part.groups);
  };

  if (q.shape.channels_last) {
    const Plan plan = plan_channels_last(q.shape, part, Kernels::kColumns, sizeof(T), context.machine);
    const size_t shared = column_bytes<Kernels::kColumns>(plan, q.chain);
    return run_both(plan, shared, Kernels::column_statistics, Kernels::column_apply);
  }
  if constexpr (Kernels::flat) {
    constexpr Kernel<typename Kernels::Forward> flat{"channels_first_flat_forward", channels_first_flat_forward<T>};
    if (q.training && p.y && is_flat<T>(context, q.chain.draw, q.shape, {p.x, p.y}) &&
        run_on_shelf<T>(context, flat, plan_flat(q.shape, kVector<T>, context.machine), part, 8 * q.shape.S, 1, q,
                        set)) {
      return;
    }
  }
  if constexpr (Kernels::resident) {
    const Plan teams = plan_teams(q.shape, part, sizeof(T), context.machine);
    if (q.training && p.y && run_on_shelf<T>(context, Kernels::resident_forward, teams, part, kTileRows, 1, q, set))
      return;
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), Kernels::kFirstBlocks, context.machine);
  run_both(plan, kTeamScratch, Kernels::statistics, Kernels::apply);
}

template <class Kernels, class T>
void run_backward(const Context& context, const Call& call, const Backward<T>& p) {
  auto q = arguments_of<typename Kernels::Backward>(call);
  q.p = p;
  const Cut part = group_of(call, q.shape);
  const bool elements = p.dx || p.grad_residual;
  const bool parameters = p.grad_weight.data || p.grad_bias.data || p.grad_act_weight.data;
  const bool gathers = !p.given && (call.training || parameters);
  const bool resident = gathers && elements && part.groups == 1;
  const auto set = [&](const Plan& plan) { apply_plan(q, part, plan); };
  const auto run_both = [&](const Plan& plan, size_t shared, auto first, auto second) {
    set(plan);
    if (gathers) {
      q.partials = partials(context, q, q.gathers(2) ? kSums / 2 : 1);
      run(context, first, plan, shared, q);
    }
    // Without gradients of elements, the second kernel only finishes those of the parameters.
    run_second(context, gathers, second, plan, elements ? plan.chunks : 1, shared, q, elements ? part.groups : 1);
  };

  if (q.shape.channels_last) {
    const Plan plan = plan_channels_last(q.shape, part, Kernels::kColumns, sizeof(T), context.machine);
    const size_t shared = column_bytes<Kernels::kColumns>(plan, q.chain);
    return run_both(plan, shared, Kernels::column_sums, Kernels::column_gradient);
  }
  if constexpr (Kernels::flat) {
    constexpr Kernel<typename Kernels::Backward> flat{"channels_first_flat_backward", channels_first_flat_backward<T>};
    if (resident && is_flat<T>(context, q.chain.draw, q.shape, {p.x, p.g, p.dx}) &&
        run_on_shelf<T>(context, flat, plan_flat(q.shape, kVector<T>, context.machine), part, 8 * q.shape.S, 2, q,
                        set)) {
      return;
    }
  }
  if constexpr (Kernels::resident) {
    const Plan teams = plan_teams(q.shape, part, sizeof(T), context.machine);
    if (resident && run_on_shelf<T>(context, Kernels::resident_backward, teams, part, kTileRows, 2, q, set)) return;
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), kBackwardBlocks, context.machine);
  run_both(plan, kTeamScratch, Kernels::sums, Kernels::gradient);
}

template <class Kernels, class T>
void run_noise(const Context& context, const Call& call, const T* x, T* y) {
  constexpr int V = Kernels::V, kColumns = Kernels::kColumns;
  auto q = arguments_of<typename Kernels::Forward>(call);
  q.p.x = x;
  q.p.y = y;
  const Cut part = whole(q.shape);
  if (q.shape.channels_last) {
    const Plan plan = plan_channels_last(q.shape, part, kColumns, sizeof(T), context.machine);
    apply_plan(q, part, plan);
    const Kernel<typename Kernels::Forward> kernel{"channels_last_noise", channels_last_noise<T, kColumns>};
    return run(context, kernel, plan, column_bytes<kColumns>(plan, q.chain), q);
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), kBackwardBlocks, context.machine);
  apply_plan(q, part, plan);
  run(context, Kernel<typename Kernels::Forward>{"channels_first_noise", channels_first_noise<T, V>}, plan, 0, q);
}

// ---- what backend.h offers ----------------------------------------------------------------------------------------
// f(V) with as many values at a time as the tensors allow, `Most` or half of that, and so on down to one.
template <int Most, class T, class F>
void with_vector(const Shape& shape, std::initializer_list<const T*> tensors, const uint8_t* mask, F f) {
  if constexpr (Most > 1) {
    if (!vectorises<Most>(shape, tensors, mask)) return with_vector<Most / 2, T>(shape, tensors, mask, f);
  }
  f(std::integral_constant<int, Most>{});
}
// Programs in float64 are there for completeness.
template <class T>
constexpr int kStagedVector = sizeof(T) == 8 ? 1 : kVector<T>;

template <class T>
void forward(const Context& context, const Call& call, const Forward<T>& p) {
  const Shape shape = simplified(call);
  if (is_plain(call)) {
    with_vector<kVector<T>, T>(shape, {p.x, p.y}, p.mask,
                               [&](auto vector) { run_forward<Plain<T, vector>>(context, call, p); });
  } else {
    with_vector<kStagedVector<T>, T>(shape, {p.x, p.y, p.residual}, p.mask,
                                     [&](auto vector) { run_forward<Staged<T, vector>>(context, call, p); });
  }
}

template <class T>
void backward(const Context& context, const Call& call, const Backward<T>& p) {
  const Shape shape = simplified(call);
  if (is_plain(call)) {
    with_vector<kVector<T>, T>(shape, {p.x, p.g, p.dx}, p.mask,
                               [&](auto vector) { run_backward<Plain<T, vector>>(context, call, p); });
  } else {
    with_vector<kStagedVector<T>, T>(shape, {p.x, p.g, p.dx, p.residual, p.grad_residual}, p.mask,
                                     [&](auto vector) { run_backward<Staged<T, vector>>(context, call, p); });
  }
}

template <class T>
void noise(const Context& context, const Call& call, const T* x, T* y) {
  with_vector<kStagedVector<T>, T>(simplified(call), {x, y}, nullptr,
                                   [&](auto vector) { run_noise<Staged<T, vector>>(context, call, x, y); });
}

}  // namespace fusednorm::cuda

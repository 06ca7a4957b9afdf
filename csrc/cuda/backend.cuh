// The host side of the kernels, for one storage type: which of them a call gets, in what shape, in what order. A
// training forward is two launches (one if resident), a backward likewise, whatever the chain and however many groups.
#pragma once

#include "backend.h"
#include "channels_first.cuh"
#include "channels_first_flat.cuh"
#include "channels_first_resident.cuh"
#include "channels_first_staged.cuh"
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

template <class A>
Stages<A> stages_of(const Call& call) {
  const Chain& chain = call.chain;
  Draw draw = Draw::each_sample;
  if (!chain.draws()) {
    draw = chain.multiplier == 0 ? Draw::all_dropped : Draw::none;
  } else if (chain.granularity == Granularity::element || call.shape.S == 1) {
    draw = Draw::each_row;  // S = 1: r is n, the same draws
  }
  const bool acts = chain.before_has(Stage::act) || chain.after_at(Stage::act) >= 0;
  return {acts ? chain.activation : 0,  // an order may leave it out
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
  return ordered && decides && !chain.has_weight && call.groups == 1;
}

template <class A>
Program<A> program_of(const Call& call) {
  const Chain& chain = call.chain;
  Program<A> q{};
  static_cast<Stages<A>&>(q) = stages_of<A>(call);
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
  return q;
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

inline Launch launch_of(const Context& context, const Plan& plan, int chunks, size_t shared, unsigned cluster,
                        int64_t groups) {
  const dim3 grid(static_cast<unsigned>(plan.blocks_x * groups), static_cast<unsigned>(chunks));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  return {grid, block, shared, cluster, context.stream, context.machine.shared_per_block, false};
}
// A second kernel, `behind` a first one if that was launched: where clusters are, it can also be launched early.
template <class Arguments>
void run_second(const Context& context, bool behind, const char* name, const Plan& plan, int chunks, size_t shared,
                void (*kernel)(Arguments), const Arguments& arguments, int64_t groups = 1) {
  Launch at = launch_of(context, plan, chunks, shared, 1, groups);
  at.early = behind && context.machine.max_cluster > 1;
  launch(name, at, kernel, arguments);
}
template <class Arguments>
void run(const Context& context, const char* name, const Plan& plan, int chunks, size_t shared,
         void (*kernel)(Arguments), const Arguments& arguments, int64_t groups = 1) {
  run_second(context, false, name, plan, chunks, shared, kernel, arguments, groups);
}

// Runs a kernel that keeps so many tensors on its shelf, if there is a plan for it and room for its clusters. `set`
// takes the plan into the arguments.
template <class T, class Arguments, class Set>
bool run_on_shelf(const Context& context, const char* name, const Plan& teams, const Cut& part, int64_t unit,
                  int tensors, void (*kernel)(Arguments), Arguments& arguments, Set set) {
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
  if (!can_hold(name, at, kernel)) return false;
  set(plan);
  launch(name, at, kernel, arguments);
  return true;
}
template <class T, class Arguments, class Set>
bool run_resident(const Context& context, const char* name, const Shape& shape, const Cut& part, int tensors,
                  void (*kernel)(Arguments), Arguments& arguments, Set set) {
  return run_on_shelf<T>(context, name, plan_teams(shape, part, sizeof(T), context.machine), part, kTileRows, tensors,
                         kernel, arguments, set);
}

template <class A>
Pair<A>* partials(const Context& context, const Plan& plan, int64_t C) {
  return static_cast<Pair<A>*>(context.workspace(sizeof(Pair<A>) * static_cast<size_t>(plan.chunks * C)));
}

// Flat kernels, for whole groups of as many channels as a vector has values.
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
template <class T, class Arguments, class Set>
bool run_flat(const Context& context, const char* name, const Shape& shape, int tensors, void (*kernel)(Arguments),
              Arguments& arguments, Set set) {
  return run_on_shelf<T>(context, name, plan_flat(shape, kVector<T>, context.machine), whole(shape), 8 * shape.S,
                         tensors, kernel, arguments, set);
}

template <class T, int V>
void forward(const Context& context, const Call& call, const Forward<T>& p) {
  using A = opmath_t<T>;
  ForwardArguments<T> q{};
  q.shape = simplified(call);
  q.samples = samples_of(q.shape);
  q.stages = stages_of<A>(call);
  q.p = p;
  q.eps = static_cast<A>(call.eps);
  q.training = call.training;
  const auto cut = [&](const Plan& plan) { q.chunks = {q.shape.rows(), plan.chunk_rows, plan.chunks}; };

  if (q.shape.channels_last) {
    const Plan plan = plan_channels_last(q.shape, whole(q.shape), V, sizeof(T), context.machine);
    const size_t scratch = column_scratch<A, V>(plan.threads_x * plan.threads_y, plan.threads_x);
    cut(plan);
    if (q.training) {
      q.partials = partials<A>(context, plan, q.shape.C);
      run(context, "channels_last_statistics", plan, plan.chunks, scratch, channels_last_statistics<T, V>, q);
    }
    run_second(context, q.training, "channels_last_apply", plan, plan.chunks, scratch, channels_last_apply<T, V>, q);
    return;
  }
  if (q.training && V < kVector<T> && is_flat<T>(context, q.stages.draw, q.shape, {p.x, p.y}) &&
      run_flat<T>(context, "channels_first_flat_forward", q.shape, 1, channels_first_flat_forward<T>, q, cut)) {
    return;
  }
  if (q.training && run_resident<T>(context, "channels_first_resident_forward", q.shape, whole(q.shape), 1,
                                    channels_first_resident_forward<T, V>, q, cut)) {
    return;
  }
  const Plan plan = plan_channels_first(q.shape, whole(q.shape), sizeof(T), kBlocks<T>, context.machine);
  cut(plan);
  if (q.training) {
    q.partials = partials<A>(context, plan, q.shape.C);
    run(context, "channels_first_statistics", plan, plan.chunks, kTeamScratch, channels_first_statistics<T, V>, q);
  }
  run_second(context, q.training, "channels_first_apply", plan, plan.chunks, kTeamScratch, channels_first_apply<T, V>,
             q);
}

template <class T, int V>
void backward(const Context& context, const Call& call, const Backward<T>& p) {
  using A = opmath_t<T>;
  BackwardArguments<T> q{};
  q.shape = simplified(call);
  q.samples = samples_of(q.shape);
  q.stages = stages_of<A>(call);
  q.p = p;
  q.training = call.training;
  const bool gathers = call.training || p.grad_weight.data || p.grad_bias.data;
  const auto cut = [&](const Plan& plan) { q.chunks = {q.shape.rows(), plan.chunk_rows, plan.chunks}; };
  const auto chunks_of_dx = [&](const Plan& plan) { return p.dx ? plan.chunks : 1; };  // 1: only to merge the sums

  if (q.shape.channels_last) {
    const Plan plan = plan_channels_last(q.shape, whole(q.shape), V, sizeof(T), context.machine);
    const size_t scratch = column_scratch<A, V>(plan.threads_x * plan.threads_y, plan.threads_x);
    cut(plan);
    if (gathers) {
      q.partials = partials<A>(context, plan, q.shape.C);
      run(context, "channels_last_gradient_sums", plan, plan.chunks, scratch, channels_last_gradient_sums<T, V>, q);
    }
    run_second(context, gathers, "channels_last_input_gradient", plan, chunks_of_dx(plan), scratch,
               channels_last_input_gradient<T, V>, q);
    return;
  }
  if (gathers && p.dx && V < kVector<T> && is_flat<T>(context, q.stages.draw, q.shape, {p.x, p.g, p.dx}) &&
      run_flat<T>(context, "channels_first_flat_backward", q.shape, 2, channels_first_flat_backward<T>, q, cut)) {
    return;
  }
  if (gathers && p.dx &&
      run_resident<T>(context, "channels_first_resident_backward", q.shape, whole(q.shape), 2,
                      channels_first_resident_backward<T, V>, q, cut)) {
    return;
  }
  const Plan plan = plan_channels_first(q.shape, whole(q.shape), sizeof(T), kBackwardBlocks, context.machine);
  cut(plan);
  if (gathers) {
    q.partials = partials<A>(context, plan, q.shape.C);
    run(context, "channels_first_gradient_sums", plan, plan.chunks, kTeamScratch, channels_first_gradient_sums<T, V>,
        q);
  }
  run_second(context, gathers, "channels_first_input_gradient", plan, chunks_of_dx(plan), kTeamScratch,
             channels_first_input_gradient<T, V>, q);
}

// ---- programs -----------------------------------------------------------------------------------------------------
// Resident where 4 values go at a time or more, as on most maps: staged kernels of less would spill.
template <int V>
constexpr bool kStagedResident = V >= 4;

// What forward, backward and noise have in common.
template <class Arguments, class T>
Arguments staged_arguments(const Call& call) {
  Arguments q{};
  q.shape = simplified(call);
  q.samples = samples_of(q.shape);
  q.program = program_of<opmath_t<T>>(call);
  q.training = call.training;
  return q;
}
template <class Arguments>
void apply_plan(Arguments& q, const Cut& part, const Plan& plan) {
  q.chunks = {part.rows, plan.chunk_rows, plan.chunks};
  q.groups = {part.groups, static_cast<unsigned>(plan.blocks_x), q.shape.rows()};
}

template <class T, int V>
size_t column_bytes(const Plan& plan, const Program<opmath_t<T>>& program) {
  const int threads = plan.threads_x * plan.threads_y;
  const bool numbers = program.noise == Noise::uniform || program.noise == Noise::gaussian;
  return column_scratch<opmath_t<T>, V>(threads, plan.threads_x) + (numbers ? multiplier_bytes(V, threads) : 0);
}

template <class T, int V>
void forward_staged(const Context& context, const Call& call, const Forward<T>& p) {
  using A = opmath_t<T>;
  auto q = staged_arguments<StagedForwardArguments<T>, T>(call);
  q.p = p;
  q.eps = static_cast<A>(call.eps);
  const Cut part = group_of(call, q.shape);
  const auto gather = [&](const Plan& plan) {
    Plan all = plan;
    all.chunks = 1;
    const int64_t pairs = part.groups * plan.chunks * q.shape.C;
    q.partials = partials<A>(context, all, pairs);
    if (p.stat_mean) q.matched_partials = partials<A>(context, all, pairs);
  };

  if (q.shape.channels_last) {
    constexpr int kV = V < kStagedColumns ? V : kStagedColumns;
    const Plan plan = plan_channels_last(q.shape, part, kV, sizeof(T), context.machine);
    const size_t shared = column_bytes<T, kV>(plan, q.program);
    apply_plan(q, part, plan);
    if (q.training) {
      gather(plan);
      run(context, "channels_last_staged_statistics", plan, plan.chunks, shared, channels_last_staged_statistics<T, kV>,
          q, part.groups);
    }
    run_second(context, q.training, "channels_last_staged_apply", plan, plan.chunks, shared,
               channels_last_staged_apply<T, kV>, q, part.groups);
    return;
  }
  const auto set = [&](const Plan& plan) { apply_plan(q, part, plan); };
  if constexpr (kStagedResident<V>) {
    if (q.training && run_resident<T>(context, "channels_first_staged_resident_forward", q.shape, part, 1,
                                      channels_first_staged_resident_forward<T, V>, q, set)) {
      return;
    }
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), kBackwardBlocks, context.machine);
  apply_plan(q, part, plan);
  if (q.training) {
    gather(plan);
    run(context, "channels_first_staged_statistics", plan, plan.chunks, kTeamScratch,
        channels_first_staged_statistics<T, V>, q, part.groups);
  }
  run_second(context, q.training, "channels_first_staged_apply", plan, plan.chunks, kTeamScratch,
             channels_first_staged_apply<T, V>, q, part.groups);
}

template <class T, int V>
void backward_staged(const Context& context, const Call& call, const Backward<T>& p) {
  using A = opmath_t<T>;
  auto q = staged_arguments<StagedBackwardArguments<T>, T>(call);
  q.p = p;
  const Cut part = group_of(call, q.shape);
  const bool elements = p.dx || p.grad_residual;
  const bool gathers = call.training || p.grad_weight.data || p.grad_bias.data || p.grad_act_weight.data;
  const auto gather = [&](const Plan& plan) {
    const int64_t values = (q.program.has_weight ? kSums : 2) * part.groups * plan.chunks * q.shape.C;
    q.partials = static_cast<A*>(context.workspace(sizeof(A) * static_cast<size_t>(values)));
  };
  // Without gradients of elements, the second kernel only finishes those of the parameters.
  const auto second = [&](const Plan& plan) { return elements ? plan.chunks : 1; };
  const int64_t second_groups = elements ? part.groups : 1;

  if (q.shape.channels_last) {
    constexpr int kV = V < kStagedColumns ? V : kStagedColumns;
    const Plan plan = plan_channels_last(q.shape, part, kV, sizeof(T), context.machine);
    const size_t shared = column_bytes<T, kV>(plan, q.program);
    apply_plan(q, part, plan);
    if (gathers) {
      gather(plan);
      run(context, "channels_last_staged_gradient_sums", plan, plan.chunks, shared,
          channels_last_staged_gradient_sums<T, kV>, q, part.groups);
    }
    run_second(context, gathers, "channels_last_staged_input_gradient", plan, second(plan), shared,
               channels_last_staged_input_gradient<T, kV>, q, second_groups);
    return;
  }
  const auto set = [&](const Plan& plan) { apply_plan(q, part, plan); };
  if constexpr (kStagedResident<V>) {
    if (gathers && elements && part.groups == 1 &&
        run_resident<T>(context, "channels_first_staged_resident_backward", q.shape, part, 2,
                        channels_first_staged_resident_backward<T, V>, q, set)) {
      return;
    }
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), kBackwardBlocks, context.machine);
  apply_plan(q, part, plan);
  if (gathers) {
    gather(plan);
    run(context, "channels_first_staged_gradient_sums", plan, plan.chunks, kTeamScratch,
        channels_first_staged_gradient_sums<T, V>, q, part.groups);
  }
  run_second(context, gathers, "channels_first_staged_input_gradient", plan, second(plan), kTeamScratch,
             channels_first_staged_input_gradient<T, V>, q, second_groups);
}

template <class T, int V>
void noise_alone(const Context& context, const Call& call, const T* x, T* y) {
  auto q = staged_arguments<StagedForwardArguments<T>, T>(call);
  q.p.x = x;
  q.p.y = y;
  const Cut part = whole(q.shape);
  if (q.shape.channels_last) {
    constexpr int kV = V < kStagedColumns ? V : kStagedColumns;
    const Plan plan = plan_channels_last(q.shape, part, kV, sizeof(T), context.machine);
    apply_plan(q, part, plan);
    run(context, "channels_last_noise", plan, plan.chunks, column_bytes<T, kV>(plan, q.program),
        channels_last_noise<T, kV>, q);
    return;
  }
  const Plan plan = plan_channels_first(q.shape, part, sizeof(T), kBackwardBlocks, context.machine);
  apply_plan(q, part, plan);
  run(context, "channels_first_noise", plan, plan.chunks, 0, channels_first_noise<T, V>, q);
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
    with_vector<kVector<T>, T>(shape, {p.x, p.y}, p.mask, [&](auto vector) { forward<T, vector>(context, call, p); });
  } else {
    with_vector<kStagedVector<T>, T>(shape, {p.x, p.y, p.residual}, p.mask,
                                     [&](auto vector) { forward_staged<T, vector>(context, call, p); });
  }
}

template <class T>
void backward(const Context& context, const Call& call, const Backward<T>& p) {
  const Shape shape = simplified(call);
  if (is_plain(call)) {
    with_vector<kVector<T>, T>(shape, {p.x, p.g, p.dx}, p.mask,
                               [&](auto vector) { backward<T, vector>(context, call, p); });
  } else {
    with_vector<kStagedVector<T>, T>(shape, {p.x, p.g, p.dx, p.residual, p.grad_residual}, p.mask,
                                     [&](auto vector) { backward_staged<T, vector>(context, call, p); });
  }
}

template <class T>
void noise(const Context& context, const Call& call, const T* x, T* y) {
  with_vector<kStagedVector<T>, T>(simplified(call), {x, y}, nullptr,
                                   [&](auto vector) { noise_alone<T, vector>(context, call, x, y); });
}

}  // namespace fusednorm::cuda

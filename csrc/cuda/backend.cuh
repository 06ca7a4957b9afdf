// The host side of the kernels, for one storage type: which of them a call gets, in what shape, in what order. A
// training forward is two launches (one if resident), a backward likewise.
#pragma once

#include "backend.h"
#include "channels_first.cuh"
#include "channels_first_resident.cuh"
#include "channels_last.cuh"
#include "plan.h"

namespace fusednorm::cuda {

template <class T>
constexpr int kVector = 16 / sizeof(T);

// Whether all of the tensors can be accessed V values at a time: their addresses, and the length of what is contiguous.
template <class T>
bool vectorises(const Shape& shape, std::initializer_list<const T*> tensors) {
  for (const T* p : tensors) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return (shape.channels_last ? shape.C : shape.S) % kVector<T> == 0;
}

template <class A>
Stages<A> stages_of(const Call& call) {
  const Chain& chain = call.chain;
  const bool one_draw_each = chain.noise == Noise::channel && call.shape.S == 1;  // r is n: the same draws
  return {chain.activation,
          {static_cast<A>(chain.parameters[0]), static_cast<A>(chain.parameters[1])},
          one_draw_each ? Noise::element : chain.noise,
          chain.threshold,
          static_cast<A>(chain.multiplier),
          call.seed};
}

// With one channel, samples follow one another: one long sample, unless its noise asks where each begins.
inline Shape simplified(const Call& call) {
  Shape shape = call.shape;
  if (!shape.channels_last && shape.C == 1 && (shape.S == 1 || call.chain.noise != Noise::channel)) {
    shape = {1, 1, shape.rows(), false};
  }
  return shape;
}

template <class Arguments>
void run(const Context& context, const char* name, const Plan& plan, int chunks, size_t shared, unsigned cluster,
         void (*kernel)(Arguments), const Arguments& arguments) {
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(chunks));
  const dim3 block(static_cast<unsigned>(plan.threads_x), static_cast<unsigned>(plan.threads_y));
  launch(name, Launch{grid, block, shared, cluster, context.stream}, kernel, arguments);
}

template <class A>
Pair<A>* partials(const Context& context, const Plan& plan, int64_t C) {
  return static_cast<Pair<A>*>(context.workspace(sizeof(Pair<A>) * static_cast<size_t>(plan.chunks * C)));
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
    const Plan plan = plan_channels_last(q.shape, V, context.machine);
    const size_t scratch = sizeof(A) * V * plan.threads_x * plan.threads_y;
    cut(plan);
    if (q.training) {
      q.partials = partials<A>(context, plan, q.shape.C);
      run(context, "channels_last_statistics", plan, plan.chunks, scratch, 1, channels_last_statistics<T, V>, q);
    }
    run(context, "channels_last_apply", plan, plan.chunks, scratch, 1, channels_last_apply<T, V>, q);
    return;
  }
  Plan plan;
  if (q.training && plan_resident(q.shape, sizeof(T), sizeof(T), kResidentScratch, context.machine, plan)) {
    cut(plan);
    const size_t shelf =
        shelf_bytes<T>(most_visits(plan.chunk_rows, plan.threads_x), plan.threads_x * plan.threads_y, 1);
    run(context, "channels_first_resident_forward", plan, plan.chunks, kResidentScratch + shelf, plan.chunks,
        channels_first_resident_forward<T, V>, q);
    return;
  }
  plan = plan_channels_first(q.shape, sizeof(T), kForwardBlocks, context.machine);
  cut(plan);
  if (q.training) {
    q.partials = partials<A>(context, plan, q.shape.C);
    run(context, "channels_first_statistics", plan, plan.chunks, kTeamScratch, 1, channels_first_statistics<T, V>, q);
  }
  run(context, "channels_first_apply", plan, plan.chunks, kTeamScratch, 1, channels_first_apply<T, V>, q);
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
    const Plan plan = plan_channels_last(q.shape, V, context.machine);
    const size_t scratch = sizeof(A) * V * plan.threads_x * plan.threads_y;
    cut(plan);
    if (gathers) {
      q.partials = partials<A>(context, plan, q.shape.C);
      run(context, "channels_last_gradient_sums", plan, plan.chunks, scratch, 1, channels_last_gradient_sums<T, V>, q);
    }
    run(context, "channels_last_input_gradient", plan, chunks_of_dx(plan), scratch, 1,
        channels_last_input_gradient<T, V>, q);
    return;
  }
  Plan plan;
  if (gathers && p.dx &&
      plan_resident(q.shape, sizeof(T), 2 * sizeof(T) + 1.0 / 8, kResidentScratch, context.machine, plan)) {
    cut(plan);
    const size_t shelf =
        shelf_bytes<T>(most_visits(plan.chunk_rows, plan.threads_x), plan.threads_x * plan.threads_y, 2);
    run(context, "channels_first_resident_backward", plan, plan.chunks, kResidentScratch + shelf, plan.chunks,
        channels_first_resident_backward<T, V>, q);
    return;
  }
  plan = plan_channels_first(q.shape, sizeof(T), kBackwardBlocks, context.machine);
  cut(plan);
  if (gathers) {
    q.partials = partials<A>(context, plan, q.shape.C);
    run(context, "channels_first_gradient_sums", plan, plan.chunks, kTeamScratch, 1, channels_first_gradient_sums<T, V>,
        q);
  }
  run(context, "channels_first_input_gradient", plan, chunks_of_dx(plan), kTeamScratch, 1,
      channels_first_input_gradient<T, V>, q);
}

template <class T>
void forward(const Context& context, const Call& call, const Forward<T>& p) {
  vectorises<T>(simplified(call), {p.x, p.y}) ? forward<T, kVector<T>>(context, call, p)
                                              : forward<T, 1>(context, call, p);
}

template <class T>
void backward(const Context& context, const Call& call, const Backward<T>& p) {
  vectorises<T>(simplified(call), {p.x, p.g, p.dx}) ? backward<T, kVector<T>>(context, call, p)
                                                    : backward<T, 1>(context, call, p);
}

template <class T>
void noise(const Context& context, const Call& call, T* m) {
  ForwardArguments<T> q{};
  q.shape = simplified(call);
  q.samples = samples_of(q.shape);
  q.stages = stages_of<opmath_t<T>>(call);
  q.p.y = m;
  const Plan plan = plan_channels_first(q.shape, sizeof(T), kForwardBlocks, context.machine);
  q.chunks = {q.shape.rows(), plan.chunk_rows, plan.chunks};
  run(context, "channels_first_noise", plan, plan.chunks, 0, 1, channels_first_noise<T>, q);
}

}  // namespace fusednorm::cuda

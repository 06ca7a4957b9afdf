// The kernels, once for every level: the vectors of its instruction set, what is computed with them, and the table of
// all.

#include "../math/activations.h"
#include "../math/noise.h"
#include "../math/norm.h"

namespace fusednorm::cpu::FN_LEVEL {
namespace {

using math::Seed;
#include "simd.h"

}  // namespace
}  // namespace fusednorm::cpu::FN_LEVEL

namespace fusednorm::math {
namespace {
template <class A>
struct Lanes<cpu::FN_LEVEL::Vec<A>> {
  using element = A;
  using mask = cpu::FN_LEVEL::Mask<A>;
};
}  // namespace
}  // namespace fusednorm::math

namespace fusednorm::cpu::FN_LEVEL {
namespace {

#include "kernels/blocks.h"
#include "kernels/norm.h"
#include "kernels/elementwise.h"
#include "kernels/moments.h"
#include "kernels/noise.h"

// ---- the table
template <class T, Span span, class List>
struct Table;
template <class T, Span span, class... Activations>
struct Table<T, span, math::List<Activations...>> {
  // PReLU is a stage of its own: its parameter may differ from channel to channel.
  template <class Activation>
  using Fused = std::conditional_t<std::is_same_v<Activation, math::Prelu>, math::Identity, Activation>;
  static constexpr void (*forward[])(const Apply<T>&) = {&apply<T, Fused<Activations>, span>...};
  static constexpr void (*sums[])(const Backward<T>&) = {&gradient_sums<T, Fused<Activations>, span>...};
  static constexpr void (*backward[])(const Backward<T>&) = {&input_gradient<T, Fused<Activations>, span>...};
};
template <class T>
constexpr KernelsFor<T> kernels_for() {
  using Run = Table<T, kRun, math::Activations>;
  using Columns = Table<T, kColumns, math::Activations>;
  return {{Run::forward, Columns::forward},
          {Run::sums, Columns::sums},
          {Run::backward, Columns::backward},
          &scale<T>,
          &convert<T, opmath_t<T>>,
          &convert<opmath_t<T>, T>,
          &moments_run<T>,
          &moments_columns<T>};
}

template <class A, Span span, class List>
struct StageTable;
template <class A, Span span, class... Activations>
struct StageTable<A, span, math::List<Activations...>> {
  // Only PReLU tells the spans apart.
  template <class Activation>
  static constexpr Span span_of = std::is_same_v<Activation, math::Prelu> ? span : kRun;
  static constexpr void (*value[])(const Elementwise<A>&) = {&stage_value<A, Activations, span_of<Activations>>...};
  static constexpr void (*gradient[])(const Elementwise<A>&) = {
      &stage_gradient<A, Activations, span_of<Activations>>...};
};
template <class A>
constexpr ElementwiseFor<A> elementwise_for() {
  using Run = StageTable<A, kRun, math::Activations>;
  using Columns = StageTable<A, kColumns, math::Activations>;
  return {{Run::value, Columns::value},
          {Run::gradient, Columns::gradient},
          {&weight_sums<A, kRun>, &weight_sums<A, kColumns>}};
}

}  // namespace
}  // namespace fusednorm::cpu::FN_LEVEL

namespace fusednorm::cpu {
extern constexpr Kernels FN_LEVEL_TABLE = {
    FN_LEVEL_NAME,
    &FN_LEVEL::merge_moments,
    &FN_LEVEL::fold_moments,
    &FN_LEVEL::fold_sums,
    FN_LEVEL::kernels_for<float>(),
    FN_LEVEL::kernels_for<double>(),
    FN_LEVEL::kernels_for<BFloat16>(),
    FN_LEVEL::kernels_for<Float16>(),
    FN_LEVEL::elementwise_for<float>(),
    FN_LEVEL::elementwise_for<double>(),
    &FN_LEVEL::keep_run,
    &FN_LEVEL::keep_columns,
    {FN_LEVEL::uniform_run, FN_LEVEL::gaussian_run},
    {FN_LEVEL::uniform_columns, FN_LEVEL::gaussian_columns},
    &FN_LEVEL::philox_lanes,
};
}  // namespace fusednorm::cpu

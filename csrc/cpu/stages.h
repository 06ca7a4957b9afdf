// A chain over one tile: what the drivers do between cutting a tensor into tiles and sharing them among threads.
//
// The fused kernels take x through norm-[act]-[drop] where it stands. Whatever else a chain has runs in stages, each a
// kernel over the tile, in buffers of opmath type that stay in the first-level cache: a stage costs little beside the
// memory traffic, and chains need no kernels of their own. PReLU and noise in floats are always stages; noise in bits
// joins the kernel of the activation before it.
#pragma once

#include <cstdlib>

#include "drivers.h"
#include "tile_noise.h"

namespace fusednorm::cpu {

template <class E>
struct View {  // rows ld apart
  E* p;
  int64_t ld;
  int64_t ahead = 0;  // elements from here to what is read soon after, in memory; or 0
  bool past = false;  // written past the caches: to memory, and not read soon
  operator View<const E>() const { return {p, ld, ahead}; }
};

// y = x * m over a tile; x.p null: ones.
template <class E>
void multiply(View<const E> x, View<E> y, double multiplier, int64_t rows, int64_t cols, const Draws& d) {
  Scale<E> q{};
  q.rows = rows;
  q.cols = cols;
  q.x = x.p;
  q.ldx = x.ld;
  q.y = y.p;
  q.ldy = y.ld;
  q.m = d.m;
  q.ldm = d.ldm;
  q.multiplier = static_cast<opmath_t<E>>(multiplier);
  q.keep = d.keep;
  q.ldkeep = d.ldkeep;
  q.past = y.past;
  kernels_for<E>().scale(q);
}

// A chain, and how it runs in one direction.
struct Plan {
  // `gate`: a saved bit stands for the activation, and perhaps for the noise.
  enum Step : uint8_t { none, add, act, drop, gate };
  struct Steps {
    Step at[3];
    int count;
    bool has(Step step) const { return std::find(at, at + count, step) != at + count; }
  };
  // The steps [begin, end) that one kernel takes: [add] and then [act] [drop or gate], or [drop] [act].
  struct Segment {
    bool add, act, drop_first;
    Step drop;
    int begin, end;
  };

  Chain chain;
  bool is_backward;
  Steps before, after;
  bool bits;                   // noise is bits, or one multiplier for all
  bool saves_act, saves_drop;  // what a bit of the mask stands for
  int saves_at;                // the step whose kernel writes the mask; -1: the noise is drawn into it before the norm
  bool masked;
  Segment norm;
  bool staged;
  // Whether the first pass leaves its work where the second pass writes: forward u, or backward the gradient behind the
  // norm. The second pass then draws nothing, and finds no steps there.
  bool once;

  // `masked`: a forward that saves a mask, or a backward that reads it. `reuses`: the first pass may write where the
  // second will, in full precision.
  Plan(const Chain& c, bool backward, bool masked, bool reuses)
      : chain(c), is_backward(backward), before{}, after{}, masked(masked), norm{}, once(false) {
    const int act_at = c.after_at(Stage::act), drop_at = c.after_at(Stage::drop);
    bits = c.noise == Noise::bernoulli || c.noise == Noise::constant;
    saves_drop = c.saves_keep();
    // The decision of a noise that stands next to an activation of one bit is joined with it.
    saves_act =
        c.saves_pass() || (saves_drop && c.one_bit && act_at >= 0 && drop_at >= 0 && std::abs(act_at - drop_at) == 1);
    saves_at = saves_act && saves_drop ? std::max(act_at, drop_at) : saves_act ? act_at : drop_at;
    const bool gated = is_backward && masked && saves_act;
    const auto step = [](Stage stage) { return stage == Stage::add ? add : stage == Stage::act ? act : drop; };
    for (int i = 0; i < 2 && c.before[i] != Stage::none; ++i) before.at[before.count++] = step(c.before[i]);
    for (int i = 0; i < 3 && c.after[i] != Stage::none; ++i) {
      if (gated && i == saves_at) {
        after.at[after.count++] = gate;
      } else if (!(gated && (i == act_at || (i == drop_at && saves_drop)))) {
        after.at[after.count++] = step(c.after[i]);
      }
    }
    norm = norm_segment();
    const bool ends_in_add = is_backward && norm.end + 1 == after.count && after.at[norm.end] == add;
    staged = before.count > 0 || !(norm.end == after.count || ends_in_add);
    if (is_backward) {
      once = reuses && staged && norm.end < after.count && !ends_in_add;
      if (once && !norm.act) norm = {};  // its noise, if any, is taken in the first pass, too
    } else {
      once = reuses && before.has(drop) && !bits;
    }
  }

  // The second pass, where the first has left its work.
  Plan second() const {
    Plan plan = *this;
    if (once) (is_backward ? plan.after.count : plan.before.count) = is_backward ? norm.end : 0;
    return plan;
  }

  Segment segment(const Steps& steps, int i) const {
    Segment s{};
    s.begin = i;
    const auto next = [&](Step step) { return i < steps.count && steps.at[i] == step; };
    const auto take = [&](Step step) { return next(step) ? ++i, true : false; };
    const auto take_drop = [&] {
      if (next(drop) || next(gate)) s.drop = steps.at[i++];
    };
    s.add = take(add);
    s.act = take(act);
    // PReLU stands alone: the gradient of its weight needs what comes in and goes out.
    if (!(s.act && chain.has_weight)) take_drop();
    s.drop_first = !s.act && s.drop == drop && !chain.has_weight && take(act);
    s.act = s.act || s.drop_first;
    s.end = i;
    return s;
  }

  int64_t tile_elements(int64_t fused) const {
    return staged ? std::min(fused, is_backward ? kStageElements / 2 : kStageElements) : fused;
  }
  bool drops() const { return before.has(drop) || after.has(drop); }
  // Backward: the mask is the noise.
  bool mask_is_noise() const { return masked && saves_drop && !saves_act; }

 private:
  // What the norm's own kernel takes along: [act] [drop in bits].
  Segment norm_segment() const {
    Segment s{};
    const auto next = [&](Step step) { return s.end < after.count && after.at[s.end] == step; };
    s.act = next(act) && !chain.has_weight;
    s.end += s.act;
    if (next(gate) || (next(drop) && bits)) s.drop = after.at[s.end++];
    return s;
  }
};

// The parts of a tile of one thread, in first-level cache. They begin at different places of a page: a store delays the
// loads from the same place of another.
template <class A>
struct Workspace {
  struct Part {
    alignas(64) A values[kStageElements + 320 / sizeof(A)];
    operator A*() { return values; }
  };
  Part x, entering, u, v, g, residual;
};

template <class T>
struct Tile {
  using A = opmath_t<T>;
  Span span;
  int64_t rows, cols;
  Affine<A> affine;
  const A* act_weight;  // per-channel, like the affine map; or null
  Draws draws;
  const uint32_t* mask;  // backward: the saved bits, or null
  int64_t ldmask;
};

// Where backward leaves its results; null: not wanted.
template <class T>
struct Gradients {
  using A = opmath_t<T>;
  View<T> dx, residual;
  double* act_weight;  // [1 or cols] +=
  const A *a, *b, *c;  // per-channel; b as in Backward
};

template <class T>
class Stages {
 public:
  using A = opmath_t<T>;
  using In = View<const A>;
  using Out = View<A>;
  static constexpr bool converts = !std::is_same_v<T, A>;

  Stages(const Plan& plan, const Tile<T>& tile, Workspace<A>& workspace)
      : plan_(plan), chain_(plan.chain), tile_(tile), w_(workspace), ld_(padded(tile.cols)) {}

  // u = before(x), without the noise if asked.
  In ahead(View<const T> x, bool noisy = true) { return before(widened(x, w_.x), noisy).u; }

  void forward(View<const T> x, View<const T> residual, View<T> y, uint32_t* save, int64_t ldsave) {
    if (!plan_.staged) return norm<T>(x, y, plan_.norm, save, ldsave);
    const auto saves = [&](const Plan::Segment& s) {
      return plan_.masked && s.begin <= plan_.saves_at && plan_.saves_at < s.end ? save : nullptr;
    };
    const auto target = [&](int end) { return last(end == plan_.after.count, y, w_.v); };
    Out z = target(plan_.norm.end);
    norm<A>(before(widened(x, w_.x)).u, z, plan_.norm, saves(plan_.norm), ldsave);
    for (int i = plan_.norm.end; i < plan_.after.count;) {
      const Plan::Segment s = plan_.segment(plan_.after, i);
      uint32_t* const to = saves(s);
      const Out next = target(s.end);
      value(z, residual, next, s, to, ldsave);
      // The noise of an earlier kernel joins the bits of this activation.
      if (to && plan_.saves_act && plan_.saves_drop && s.drop == Plan::none) join(to, ldsave);
      z = next;
      i = s.end;
    }
    narrow(z, y);
  }

  void gradient_sums(View<const T> x, View<const T> residual, View<const T> g, double* sum_dz, double* sum_dz_xmu,
                     const Gradients<T>& to) {
    const auto sums = [&](auto u, auto dz) {
      auto q = norm_gradient(u, dz);
      q.sum_dz = sum_dz;
      q.sum_dz_xmu = sum_dz_xmu;
      using E = std::remove_const_t<std::remove_pointer_t<decltype(u.p)>>;
      kernels_for<E>().gradient_sums[tile_.span][norm_activation()](q);
    };
    if (!plan_.staged) return sums(x, g);
    const In u = before(widened(x, w_.x)).u, dz = behind_norm(u, residual, g, to, true);
    sums(u, dz);
  }

  void gradient(View<const T> x, View<const T> residual, View<const T> g, const Gradients<T>& to) {
    const auto input_gradient = [&](auto u, auto dz, auto dx) {
      auto q = norm_gradient(u, dz);
      q.dx = dx.p;
      q.lddx = dx.ld;
      q.past = dx.past;
      q.a = to.a;
      q.b = to.b;
      q.c = to.c;
      using E = std::remove_const_t<std::remove_pointer_t<decltype(u.p)>>;
      kernels_for<E>().input_gradient[tile_.span][norm_activation()](q);
    };
    if (!plan_.staged) {
      if (to.residual.p) copy(g, to.residual);
      if (to.dx.p) input_gradient(x, g, to.dx);
      return;
    }
    const Before b = before(widened(x, w_.x));
    const In dz = behind_norm(b.u, residual, g, to);
    const bool sums_before = to.act_weight && plan_.before.has(Plan::act);
    if (!to.dx.p && !sums_before) return;
    const auto target = [&](int segment) { return last(to.dx.p && segment == 0, to.dx, w_.g); };
    Out du = target(b.count);
    input_gradient(b.u, dz, du);
    for (int i = b.count - 1; i >= 0; --i) {
      const Plan::Segment& s = b.segments[i];
      if (s.act && to.act_weight) weight_sums(b.entering, du, to.act_weight);
      const Out next = target(i);
      value_gradient(b.entering, du, next, s);
      du = next;
    }
    if (to.dx.p) narrow(du, to.dx);
  }

 private:
  struct Before {
    In u, entering;  // the kernel of the activation
    Plan::Segment segments[2];
    int count;
  };

  Before before(In x, bool noisy = true) {
    Before b{x, x, {}, 0};
    for (int i = 0; i < plan_.before.count; i = b.segments[b.count++].end) {
      Plan::Segment& s = b.segments[b.count] = plan_.segment(plan_.before, i);
      if (s.act) b.entering = b.u;
      if (!noisy) s.drop = Plan::none;
      if (!s.act && s.drop == Plan::none) continue;
      // Only where two kernels run, and the second has the activation, is what enters it not x.
      const Out out{s.end < plan_.before.count && !s.act ? w_.entering : w_.u, ld_};
      value(b.u, {}, out, s, nullptr, 0);
      b.u = out;
    }
    return b;
  }

  // From grad_output to the gradient behind the norm's own kernel; in to.dx if the second pass is to find it there.
  In behind_norm(In u, View<const T> residual, View<const T> grad_output, const Gradients<T>& to, bool leaves = false) {
    Plan::Segment segments[3];
    int count = 0;
    In v{};  // what enters the kernel of the activation
    for (int i = plan_.norm.end; i < plan_.after.count; i = segments[count++].end) {
      segments[count] = plan_.segment(plan_.after, i);
      if (segments[count].act) v = entering(u, residual, segments[count]);
    }
    In g = widened(grad_output, w_.g);
    const Out out = last(leaves && to.dx.p, to.dx, w_.g);
    while (count-- > 0) {
      const Plan::Segment& s = segments[count];
      if (s.act && to.act_weight) weight_sums(v, g, to.act_weight);
      if (s.act || s.drop != Plan::none) {
        value_gradient(s.act ? v : g, g, out, s);
        g = out;
      }
      if (s.add && to.residual.p) leave(g, to.residual);
    }
    return g;
  }

  // What enters the kernel of segment s behind its addition, as forward computed it.
  In entering(In u, View<const T> residual, const Plan::Segment& s) {
    const Out out{w_.v, ld_};
    norm<A>(u, out, plan_.norm, nullptr, 0);
    for (int i = plan_.norm.end; i < s.begin;) {
      const Plan::Segment earlier = plan_.segment(plan_.after, i);
      value(out, residual, out, earlier, nullptr, 0);
      i = earlier.end;
    }
    if (s.add) value(out, residual, out, {true, false, false, Plan::none, 0, 0}, nullptr, 0);
    return out;
  }

  int activation(bool act) const { return act ? chain_.activation : 0; }
  int norm_activation() const { return activation(plan_.norm.act); }

  // The multiplier and the bits of a drop, a gate, or neither.
  template <class Arguments>
  void set_factor(Arguments& q, Plan::Step step) const {
    q.multiplier = 1;
    if (step == Plan::drop || (step == Plan::gate && plan_.saves_drop))
      q.multiplier = static_cast<A>(chain_.multiplier);
    if (step == Plan::drop) {
      q.keep = tile_.draws.keep;
      q.ldkeep = tile_.draws.ldkeep;
    } else if (step == Plan::gate) {
      q.keep = tile_.mask;
      q.ldkeep = tile_.ldmask;
    }
  }

  // What every kernel of a chain is told.
  template <class Arguments, class E>
  Arguments arguments(View<const E> x) const {
    Arguments q{};
    q.rows = tile_.rows;
    q.cols = tile_.cols;
    q.x = x.p;
    q.ldx = x.ld;
    std::copy_n(chain_.parameters, 2, q.activation);
    return q;
  }

  // ---- one kernel each
  template <class E>
  void norm(View<const E> x, View<E> y, const Plan::Segment& s, uint32_t* save, int64_t ldsave) {
    auto q = arguments<Apply<E>>(x);
    q.y = y.p;
    q.ldy = y.ld;
    q.ahead = x.ahead;
    q.affine = tile_.affine;
    q.past = y.past;
    set_factor(q, s.drop);
    q.save = save;
    q.ldsave = ldsave;
    kernels_for<E>().apply[tile_.span][activation(s.act)](q);
  }

  template <class E>
  cpu::Backward<E> norm_gradient(View<const E> u, View<const E> g) const {
    auto q = arguments<cpu::Backward<E>>(u);
    q.g = g.p;
    q.ldg = g.ld;
    q.aheadx = u.ahead;
    q.aheadg = g.ahead;
    q.affine = tile_.affine;
    set_factor(q, plan_.norm.drop);
    return q;
  }

  Elementwise<A> elementwise(In x, Out y, const Plan::Segment& s) const {
    auto q = arguments<Elementwise<A>>(x);
    q.y = y.p;
    q.ldy = y.ld;
    q.ahead = x.ahead;
    q.past = y.past;
    q.act_weight = tile_.act_weight;
    q.factor_first = s.drop_first && s.drop != Plan::none;
    set_factor(q, s.drop);
    if (s.drop == Plan::drop) {
      q.m = tile_.draws.m;
      q.ldm = tile_.draws.ldm;
    }
    return q;
  }
  void value(In x, View<const T> residual, Out y, const Plan::Segment& s, uint32_t* save, int64_t ldsave) {
    Elementwise<A> q = elementwise(x, y, s);
    if (s.add) {
      const In add = widened(residual, w_.residual);
      q.add = add.p;
      q.ldadd = add.ld;
      q.aheadadd = add.ahead;
    }
    q.save = save;
    q.ldsave = ldsave;
    elementwise_for<A>().value[tile_.span][activation(s.act)](q);
  }
  void value_gradient(In x, In g, Out y, const Plan::Segment& s) {
    Elementwise<A> q = elementwise(x, y, s);
    q.g = g.p;
    q.ldg = g.ld;
    q.aheadg = g.ahead;
    elementwise_for<A>().gradient[tile_.span][activation(s.act)](q);
  }
  void weight_sums(In x, In g, double* sum) {
    Elementwise<A> q = elementwise(x, {}, {});
    q.g = g.p;
    q.ldg = g.ld;
    q.sum = sum;
    elementwise_for<A>().weight_sums[tile_.span](q);
  }

  void join(uint32_t* save, int64_t ldsave) const {
    for (int64_t row = 0; row < tile_.rows; ++row) {
      const uint32_t* keep = tile_.draws.keep + row * tile_.draws.ldkeep;
      for (int64_t i = 0; i < words_of(tile_.cols); ++i) save[row * ldsave + i] &= keep[i];
    }
  }

  // ---- between storage and opmath type
  In widened(View<const T> x, A* buffer) const {
    if constexpr (converts) {
      if (!x.p) return {};
      kernels_for<T>().widen(x.p, x.ld, x.ahead, buffer, ld_, tile_.rows, tile_.cols, false);
      return {buffer, ld_};
    } else {
      return x;
    }
  }
  // Where a kernel writes: only the last one to memory, which is slow to take what the next would read back.
  Out last(bool is_last, View<T> y, A* buffer) const {
    if constexpr (!converts) {
      if (is_last) return y;
    }
    return {buffer, ld_};
  }
  void narrow(In x, View<T> y) const {
    if constexpr (converts) leave(x, y);
  }
  void copy(View<const T> x, View<T> y) const {
    for (int64_t row = 0; row < tile_.rows; ++row) std::copy_n(x.p + row * x.ld, tile_.cols, y.p + row * y.ld);
  }
  void leave(In x, View<T> y) const {
    kernels_for<T>().narrow(x.p, x.ld, x.ahead, y.p, y.ld, tile_.rows, tile_.cols, y.past);
  }

  const Plan& plan_;
  const Chain& chain_;
  const Tile<T>& tile_;
  Workspace<A>& w_;
  int64_t ld_;
};

}  // namespace fusednorm::cpu

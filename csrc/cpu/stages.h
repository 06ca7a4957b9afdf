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
  operator View<const E>() const { return {p, ld}; }
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
  kernels_for<E>().scale(q);
}

// A chain, and how it runs in one direction.
struct Plan {
  // `gate`: a saved bit stands for the activation, and perhaps for the noise.
  enum Step : uint8_t { none, add, act, drop, gate };
  // The steps that one kernel takes, up to `end`: [add] [act] [drop or gate].
  struct Segment {
    bool add, act;
    Step drop;
    int end;
  };

  Chain chain;
  Step steps[3];  // behind the norm
  int count;
  bool bits;                   // noise is bits, or one multiplier for all
  bool saves_act, saves_drop;  // what a bit of the mask stands for
  int saves_at;                // the step whose kernel writes the mask; -1: the noise is drawn into it before the norm
  bool masked;
  Segment norm;
  bool staged;

  // `masked`: a forward that saves a mask, or a backward that reads it.
  Plan(const Chain& c, bool is_backward, bool masked) : chain(c), count(0), masked(masked) {
    const int act_at = c.after_at(Stage::act), drop_at = c.after_at(Stage::drop);
    bits = c.noise == Noise::bernoulli || c.noise == Noise::constant;
    saves_drop = c.saves_keep();
    // The decision of a noise that stands next to an activation of one bit is joined with it.
    saves_act = c.saves_pass() ||
                (saves_drop && c.one_bit && act_at >= 0 && drop_at >= 0 && std::abs(act_at - drop_at) == 1);
    saves_at = saves_act && saves_drop ? std::max(act_at, drop_at) : saves_act ? act_at : drop_at;
    const bool gated = is_backward && masked && saves_act;
    for (int i = 0; i < 3 && c.after[i] != Stage::none; ++i) {
      if (gated && i == saves_at) {
        steps[count++] = gate;
      } else if (!(gated && (i == act_at || (i == drop_at && saves_drop)))) {
        steps[count++] = c.after[i] == Stage::add ? add : c.after[i] == Stage::act ? act : drop;
      }
    }
    norm = segment(0, true);
    const bool ends_in_add = is_backward && norm.end + 1 == count && steps[norm.end] == add;
    staged = c.before[0] != Stage::none || !(norm.end == count || ends_in_add);
  }

  Segment segment(int i, bool at_norm) const {
    Segment s{};
    const auto next = [&](Step step) { return i < count && steps[i] == step; };
    s.add = !at_norm && next(add);
    i += s.add;
    s.act = next(act) && !(at_norm && chain.has_weight);
    i += s.act;
    if (next(gate) || (next(drop) && bits)) s.drop = steps[i++];
    s.end = i;
    return s;
  }

  int64_t tile_elements(int64_t fused) const { return staged ? std::min(fused, kStageElements) : fused; }
  bool drops() const { return chain.before_has(Stage::drop) || chain.after_at(Stage::drop) >= 0; }
  // Backward: whether the mask is the noise, and where not, whether there is any to draw.
  bool mask_is_noise() const { return masked && saves_drop && !saves_act; }
  bool backward_draws() const { return drops() && !(masked && saves_drop); }
};

// The parts of a tile of one thread, in first-level cache.
template <class A>
struct Workspace {
  alignas(64) A x[kStageElements], entering[kStageElements], u[kStageElements], v[kStageElements], g[kStageElements],
      residual[kStageElements];
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
  const A *a, *b, *c;  // per-channel
};

template <class T>
class Stages {
 public:
  using A = opmath_t<T>;
  using In = View<const A>;
  using Out = View<A>;
  static constexpr bool converts = !std::is_same_v<T, A>;

  Stages(const Plan& plan, const Tile<T>& tile, Workspace<A>& workspace)
      : plan_(plan),
        chain_(plan.chain),
        tile_(tile),
        w_(workspace),
        ld_(tile.span == kRun ? kStageElements : padded(tile.cols)) {}

  // u = before(x), without the noise if asked.
  In ahead(View<const T> x, bool noisy = true) { return before(widened(x, w_.x), noisy).u; }

  void forward(View<const T> x, View<const T> residual, View<T> y, uint32_t* save, int64_t ldsave) {
    if (!plan_.staged) return norm<T>(x, y, plan_.norm, save, ldsave);
    Out out = in_place(y, w_.v);
    const auto saves = [&](int begin, int end) {
      return plan_.masked && begin <= plan_.saves_at && plan_.saves_at < end ? save : nullptr;
    };
    norm<A>(before(widened(x, w_.x)).u, out, plan_.norm, saves(0, plan_.norm.end), ldsave);
    for (int i = plan_.norm.end; i < plan_.count;) {
      const Plan::Segment s = plan_.segment(i, false);
      if (s.end == i) {
        multiply(out, out);
        ++i;
        continue;
      }
      uint32_t* const to = saves(i, s.end);
      value(out, s.add ? widened(residual, w_.residual) : In{}, out, s.act, s.drop == Plan::drop, to, ldsave);
      // The noise of an earlier kernel joins the bits of this activation.
      if (to && plan_.saves_act && plan_.saves_drop && s.drop == Plan::none) join(to, ldsave);
      i = s.end;
    }
    narrow(out, y);
  }

  void gradient_sums(View<const T> x, View<const T> residual, View<const T> g, double* sum_dz, double* sum_dz_xmu) {
    const auto sums = [&](auto u, auto dz) {
      auto q = norm_gradient(u, dz);
      q.sum_dz = sum_dz;
      q.sum_dz_xmu = sum_dz_xmu;
      using E = std::remove_const_t<std::remove_pointer_t<decltype(u.p)>>;
      kernels_for<E>().gradient_sums[tile_.span][norm_activation()](q);
    };
    if (!plan_.staged) return sums(x, g);
    const In u = before(widened(x, w_.x)).u;
    sums(u, behind_norm(u, residual, g, {}));
  }

  void gradient(View<const T> x, View<const T> residual, View<const T> g, const Gradients<T>& to) {
    const auto input_gradient = [&](auto u, auto dz, auto dx) {
      auto q = norm_gradient(u, dz);
      q.dx = dx.p;
      q.lddx = dx.ld;
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
    const bool sums_before = to.act_weight && chain_.before_has(Stage::act);
    if (!to.dx.p && !sums_before) return;
    Out du = to.dx.p ? in_place(to.dx, w_.g) : Out{w_.g, ld_};
    input_gradient(b.u, dz, du);
    for (int i = 1; i >= 0; --i) {
      if (chain_.before[i] == Stage::drop) {
        if (i == 1 && joins()) {
          value_gradient(b.entering, du, du, Plan::drop);
          break;
        }
        multiply(du, du);
      } else if (chain_.before[i] == Stage::act) {
        if (to.act_weight) weight_sums(b.entering, du, to.act_weight);
        value_gradient(b.entering, du, du, Plan::none);
      }
    }
    if (to.dx.p) narrow(du, to.dx);
  }

 private:
  struct Before {
    In u, entering;  // the activation
  };

  // An activation and the noise in bits behind it are one kernel, unless sums want the gradient between the two.
  bool joins() const { return plan_.bits && !chain_.has_weight; }

  Before before(In x, bool noisy = true) {
    Before b{x, x};
    for (int i = 0; i < 2; ++i) {
      if (chain_.before[i] == Stage::drop && noisy) {
        const Out out{chain_.before[1] == Stage::act ? w_.entering : w_.u, ld_};
        multiply(b.u, out);
        b.u = out;
      } else if (chain_.before[i] == Stage::act) {
        b.entering = b.u;
        const Out out{w_.u, ld_};
        const bool joined = noisy && chain_.before[1] == Stage::drop && joins();
        value(b.u, {}, out, true, joined, nullptr, 0);
        b.u = out;
        if (joined) break;
      }
    }
    return b;
  }

  // From grad_output to the gradient behind the norm's own kernel.
  In behind_norm(In u, View<const T> residual, View<const T> grad_output, const Gradients<T>& to) {
    const int first = plan_.norm.end;
    In v{};  // what enters the activation
    for (int i = first; i < plan_.count; ++i) {
      if (plan_.steps[i] == Plan::act) v = entering(u, residual, i);
    }
    In g = widened(grad_output, w_.g);
    const Out out{w_.g, ld_};
    for (int i = plan_.count - 1; i >= first; --i) {
      const Plan::Step step = plan_.steps[i];
      if (step == Plan::add) {
        if (to.residual.p) leave(g, to.residual);
        continue;
      }
      if (step == Plan::act) {
        if (to.act_weight) weight_sums(v, g, to.act_weight);
        value_gradient(v, g, out, Plan::none);
      } else if (step == Plan::drop && i > first && plan_.steps[i - 1] == Plan::act && joins()) {
        value_gradient(v, g, out, Plan::drop);
        --i;
      } else {
        step == Plan::gate ? value_gradient(g, g, out, Plan::gate, false) : multiply(g, out);
      }
      g = out;
    }
    return g;
  }

  // What enters the activation at step `at`, as forward computed it.
  In entering(In u, View<const T> residual, int at) {
    const Out out{w_.v, ld_};
    norm<A>(u, out, plan_.norm, nullptr, 0);
    for (int i = plan_.norm.end; i < at; ++i) {
      if (plan_.steps[i] == Plan::add) {
        value(out, widened(residual, w_.residual), out, false, false, nullptr, 0);
      } else {
        multiply(out, out);
      }
    }
    return out;
  }

  int activation(bool act) const { return act ? chain_.activation : 0; }
  int norm_activation() const { return activation(plan_.norm.act); }

  // The multiplier and the bits of a drop, a gate, or neither.
  template <class Arguments>
  void set_factor(Arguments& q, Plan::Step step) const {
    q.multiplier = 1;
    if (step == Plan::drop || (step == Plan::gate && plan_.saves_drop)) q.multiplier = static_cast<A>(chain_.multiplier);
    if (step == Plan::drop) {
      q.keep = tile_.draws.keep;
      q.ldkeep = tile_.draws.ldkeep;
    } else if (step == Plan::gate) {
      q.keep = tile_.mask;
      q.ldkeep = tile_.ldmask;
    }
  }

  // ---- one kernel each
  template <class E>
  void norm(View<const E> x, View<E> y, const Plan::Segment& s, uint32_t* save, int64_t ldsave) {
    Apply<E> q{};
    q.rows = tile_.rows;
    q.cols = tile_.cols;
    q.x = x.p;
    q.ldx = x.ld;
    q.y = y.p;
    q.ldy = y.ld;
    q.affine = tile_.affine;
    std::copy_n(chain_.parameters, 2, q.activation);
    set_factor(q, s.drop);
    q.save = save;
    q.ldsave = ldsave;
    kernels_for<E>().apply[tile_.span][activation(s.act)](q);
  }

  template <class E>
  cpu::Backward<E> norm_gradient(View<const E> u, View<const E> g) const {
    cpu::Backward<E> q{};
    q.rows = tile_.rows;
    q.cols = tile_.cols;
    q.x = u.p;
    q.ldx = u.ld;
    q.g = g.p;
    q.ldg = g.ld;
    q.affine = tile_.affine;
    std::copy_n(chain_.parameters, 2, q.activation);
    set_factor(q, plan_.norm.drop);
    return q;
  }

  Elementwise<A> elementwise(In x, Out y) const {
    Elementwise<A> q{};
    q.rows = tile_.rows;
    q.cols = tile_.cols;
    q.x = x.p;
    q.ldx = x.ld;
    q.y = y.p;
    q.ldy = y.ld;
    std::copy_n(chain_.parameters, 2, q.activation);
    q.act_weight = tile_.act_weight;
    return q;
  }
  void value(In x, In add, Out y, bool act, bool drop, uint32_t* save, int64_t ldsave) {
    Elementwise<A> q = elementwise(x, y);
    q.add = add.p;
    q.ldadd = add.ld;
    set_factor(q, drop ? Plan::drop : Plan::none);
    q.save = save;
    q.ldsave = ldsave;
    elementwise_for<A>().value[tile_.span][activation(act)](q);
  }
  void value_gradient(In x, In g, Out y, Plan::Step drop, bool act = true) {
    Elementwise<A> q = elementwise(x, y);
    q.g = g.p;
    q.ldg = g.ld;
    set_factor(q, drop);
    elementwise_for<A>().gradient[tile_.span][activation(act)](q);
  }
  void weight_sums(In x, In g, double* sum) {
    Elementwise<A> q = elementwise(x, {});
    q.g = g.p;
    q.ldg = g.ld;
    q.sum = sum;
    elementwise_for<A>().weight_sums[tile_.span](q);
  }
  void multiply(In x, Out y) {
    cpu::multiply<A>(x, y, chain_.multiplier, tile_.rows, tile_.cols, tile_.draws);
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
      kernels_for<T>().widen(x.p, x.ld, buffer, ld_, tile_.rows, tile_.cols);
      return {buffer, ld_};
    } else {
      return x;
    }
  }
  Out in_place(View<T> y, A* buffer) const {
    if constexpr (converts) {
      return {buffer, ld_};
    } else {
      return y;
    }
  }
  void narrow(In x, View<T> y) const {
    if constexpr (converts) kernels_for<T>().narrow(x.p, x.ld, y.p, y.ld, tile_.rows, tile_.cols);
  }
  void copy(View<const T> x, View<T> y) const {
    for (int64_t row = 0; row < tile_.rows; ++row) std::copy_n(x.p + row * x.ld, tile_.cols, y.p + row * y.ld);
  }
  void leave(In x, View<T> y) const {
    if constexpr (converts) {
      narrow(x, y);
    } else {
      copy(x, y);
    }
  }

  const Plan& plan_;
  const Chain& chain_;
  const Tile<T>& tile_;
  Workspace<A>& w_;
  int64_t ld_;
};

}  // namespace fusednorm::cpu

// Runs a file of cases through backend.h: `cuda_host CASES RESULTS ORDER...`. Results of the first order go to a file;
// under every further one they must be the same bits.
//
// A case is a line and the bytes of its inputs. The line: an operation, key=value words, then the tensors, as
// in:NAME:DTYPE:COUNT with the DType's number (4: int64, 5: uint8), or out:..., or io:... for both, or
// blank:... for zeros that are neither. Every tensor lies in a block of the heap of exactly its size, outputs filled
// with something else in each order; `shift=1` moves (N, C, S) tensors by one element.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <vector>

#include "../math/activations.h"
#include "../math/noise.h"
#include "backend.h"
#include "device.cuh"

namespace fusednorm::cuda {
namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cerr << "cuda_host: " << message << std::endl;
  exit(2);
}

struct Free {
  void operator()(unsigned char* p) const { free(p); }
};
using Bytes = std::unique_ptr<unsigned char, Free>;

Bytes filled(size_t bytes, unsigned char with) {
  void* block;
  if (posix_memalign(&block, 256, bytes)) fail("out of memory");  // aligned as a GPU's allocator does
  Bytes p(static_cast<unsigned char*>(block));
  memset(p.get(), with, bytes);
  host::give_memory(p.get(), bytes);
  return p;
}

struct Tensor {
  bool in, out;
  DType type;
  size_t bytes, shift;
  std::string input;
  Bytes block;
  unsigned char* data() const { return block.get() + shift; }
};

class Case {
 public:
  explicit Case(std::istream& file, const std::string& line) : line_(line) {
    static constexpr size_t sizes[] = {4, 8, 2, 2, 8, 1};
    std::istringstream words(line);
    std::string word;
    words >> operation_;
    while (words >> word) {
      if (const size_t equals = word.find('='); equals != std::string::npos) {
        settings_[word.substr(0, equals)] = word.substr(equals + 1);
        continue;
      }
      std::replace(word.begin(), word.end(), ':', ' ');
      std::istringstream parts(word);
      std::string direction, name;
      int type;
      size_t count;
      parts >> direction >> name >> type >> count;
      const bool in = direction == "in" || direction == "io", out = direction == "out" || direction == "io";
      Tensor t{in, out, static_cast<DType>(type), count * sizes[type], 0, {}, {}};
      static const std::set<std::string> elements{"x", "y", "g", "dx", "residual", "dr"};
      if (elements.count(name)) t.shift = number("shift") * sizes[type];
      if (t.in) {
        t.input.resize(t.bytes);
        file.read(t.input.data(), static_cast<std::streamsize>(t.bytes));
      }
      names_.push_back(name);
      tensors_[name] = std::move(t);
    }
  }

  // The outputs, one after another.
  std::string run(unsigned char fill) {
    host::forget_memory();
    const auto blank = [](const auto& entry) { return !entry.second.in && !entry.second.out; };
    if (std::all_of(tensors_.begin(), tensors_.end(), blank)) fill = 0;  // only counted
    for (auto& [name, t] : tensors_) {
      t.block = filled(t.bytes + t.shift, t.in || t.out ? fill : 0);
      if (t.in) memcpy(t.data(), t.input.data(), t.bytes);
    }
    machine_ = {int(number("mp")), int(number("shared")), int(number("cluster")), int(number("threads")),
                static_cast<Residency>(int(number("residency")))};
    host::settings.max_threads = 2 * machine_.threads;  // of resident kernels
    host::settings.max_shared = machine_.shared_per_block;
    host::settings.max_cluster = machine_.max_cluster;
    host::settings.max_schedulable = number("crowded") != 0 ? 1 : 8;
    std::vector<Bytes> workspaces;
    context_ = {machine_, nullptr, [&](size_t bytes) -> void* {
                  workspaces.push_back(filled(bytes, fill));
                  return workspaces.back().get();
                }};
    start();
    std::string result;
    for (const std::string& name : names_) {
      const Tensor& t = tensors_[name];
      if (t.out) result.append(reinterpret_cast<const char*>(t.data()), t.bytes);
    }
    return result;
  }
  const std::string& line() const { return line_; }

 private:
  double number(const char* key) const {
    const auto at = settings_.find(key);
    return at == settings_.end() ? 0 : strtod(at->second.c_str(), nullptr);
  }
  template <class T>
  T* data(const char* name) {
    const auto at = tensors_.find(name);
    return at == tensors_.end() ? nullptr : reinterpret_cast<T*>(at->second.data());
  }
  DType type_of(const char* name) { return tensors_.count(name) ? tensors_[name].type : DType::float32; }
  Vector vector(const char* name) { return {data<void>(name), type_of(name)}; }
  MutableVector mutable_vector(const char* name) { return {data<void>(name), type_of(name)}; }

  template <class... Activations>
  void set_activation(Chain& chain, math::List<Activations...>) {
    int i = 0;
    const auto set = [&](const char* name, bool one_bit, bool has_weight) {
      if (settings_["act"] == name) {
        chain.activation = i;
        chain.one_bit = one_bit;
        chain.has_weight = has_weight;
      }
      ++i;
    };
    (set(Activations::name, Activations::one_bit, std::is_same_v<Activations, math::Prelu>), ...);
  }

  // As csrc/ops.cpp has them.
  static void set_noise(Chain& chain, const std::string& kind, double p, const std::string& granularity) {
    chain.granularity = granularity == "channel"  ? Granularity::channel
                        : granularity == "sample" ? Granularity::sample
                                                  : Granularity::element;
    chain.noise = Noise::constant;
    chain.multiplier = kind == "bernoulli" && p == 1 ? 0 : 1;
    if (p == 0 || chain.multiplier == 0) return;
    chain.noise = kind == "uniform" ? Noise::uniform : kind == "gaussian" ? Noise::gaussian : Noise::bernoulli;
    chain.threshold = math::keep_threshold(p);
    if (kind == "bernoulli") chain.multiplier = math::keep_scale(chain.threshold);
    chain.strength = static_cast<float>(kind == "gaussian" ? std::sqrt(p) : p);
  }
  static void set_stages(Chain& chain, std::string order) {
    std::replace(order.begin(), order.end(), '-', ' ');
    std::istringstream words(order);
    std::string word;
    Stage *before = chain.before, *after = nullptr;
    while (words >> word) {
      const Stage stage = word == "add" ? Stage::add : word == "act" ? Stage::act : Stage::drop;
      const bool live = stage == Stage::act    ? chain.activation != 0
                        : stage == Stage::drop ? chain.draws() || chain.multiplier != 1
                                               : true;
      if (word == "norm") {
        after = chain.after;
      } else if (live) {
        *(after ? after : before)++ = stage;
      }
    }
    if (chain.after_at(Stage::drop) < 0 && !chain.before_has(Stage::drop)) {
      chain.noise = Noise::constant;
      chain.multiplier = 1;
    }
  }

  Call call() {
    Call c{};
    c.shape = {int64_t(number("N")), int64_t(number("C")), int64_t(number("S")), number("last") != 0};
    set_activation(c.chain, math::Activations{});
    c.chain.parameters[0] = number("a");
    c.chain.parameters[1] = number("b");
    // Of a strength that is known to the device only, any for which there is noise.
    set_noise(c.chain, settings_["kind"], number("live") != 0 ? 0.5 : number("p"), settings_["granularity"]);
    if (operation_ == "layer") set_stages(c.chain, settings_["order"]);
    c.training = number("training") != 0;
    c.eps = number("eps");
    c.ghost = c.training && number("ghost") ? int64_t(number("ghost")) : c.shape.N;
    c.groups = (c.shape.N + c.ghost - 1) / c.ghost;
    c.seed = data<int64_t>("seed");
    c.counting = {data<uint8_t>("bits"), data<int64_t>("before")};
    const auto* value = data<double>("value");
    const auto* sample = data<int64_t>("sample");
    if (value || sample) {
      auto* live = static_cast<Live*>(context_.workspace(sizeof(Live)));
      const int64_t draws = c.chain.granularity == Granularity::element ? c.shape.S : 1;
      realise(context_, {c.chain, value, sample, draws, live});
      c.live = live;
      c.chain.threshold = 1;  // nobody looks
      c.chain.multiplier = 7;
      c.chain.strength = 9;
    }
    return c;
  }

  // What a layer's first pass and its second one give each other goes this way where they are called apart.
  template <class A>
  Vector room(int64_t n) {
    return {context_.workspace(sizeof(A) * static_cast<size_t>(n)),
            sizeof(A) == sizeof(double) ? DType::float64 : DType::float32};
  }

  template <class T>
  void layer() {
    Call c = call();
    const bool split = number("split") != 0;
    Forward<T> p{data<T>("x"),
                 data<T>("y"),
                 vector("weight"),
                 vector("bias"),
                 vector("running_mean"),
                 vector("running_var"),
                 data<void>("mean"),
                 data<void>("invstd"),
                 data<void>("stat_var"),
                 data<uint8_t>("mask"),
                 data<T>("residual"),
                 vector("act_weight"),
                 data<void>("stat_mean"),
                 nullptr};
    if (split) {
      using A = opmath_t<T>;
      const int64_t C = c.shape.C;
      Call first = c;
      std::fill(std::begin(first.chain.after), std::end(first.chain.after), Stage::none);
      if (!first.chain.before_has(Stage::drop)) {
        first.chain.noise = Noise::constant;
        first.chain.multiplier = 1;
      }
      Forward<T> statistics = p;
      statistics.y = nullptr;
      statistics.mask = nullptr;
      statistics.mean = const_cast<void*>((p.running_mean = room<A>(C)).data);
      statistics.var = const_cast<void*>((p.running_var = room<A>(C)).data);
      forward<T>(context_, first, statistics);
      p.stat_mean = nullptr;
      p.stat_var = const_cast<void*>(room<A>(C).data);  // of which the statistics know more
      c.training = false;
    }
    forward<T>(context_, c, p);
    c.training = number("training") != 0;
    if (!data<T>("g")) return;
    // As ops.cpp hands it over: where a saved mask says what the activation does, without the residual.
    const bool adds_first = c.chain.after_at(Stage::act) > c.chain.after_at(Stage::add);
    const bool said = data<uint8_t>("mask") && c.chain.saves_pass();
    const T* residual = adds_first && !said ? data<T>("residual") : nullptr;
    Backward<T> b{data<T>("x"),
                  data<T>("g"),
                  data<T>("dx"),
                  vector("weight"),
                  vector("bias"),
                  data<void>("mean"),
                  data<void>("invstd"),
                  mutable_vector("dw"),
                  mutable_vector("db"),
                  data<uint8_t>("mask"),
                  residual,
                  data<T>("dr"),
                  vector("act_weight"),
                  mutable_vector("da"),
                  nullptr,
                  nullptr,
                  nullptr};
    if (split) {
      Backward<T> first = b;
      first.dx = first.grad_residual = nullptr;
      first.grad_act_weight = {};
      first.sums = static_cast<double*>(const_cast<void*>(room<double>(5 * c.shape.C).data));
      backward<T>(context_, c, first);
      for (int64_t i = 0; i < 2 * c.shape.C; ++i) first.sums[i] *= 2;  // two processes with the same values
      b.given = first.sums;
      b.count = data<double>("count");
      b.grad_weight = b.grad_bias = {};
      if (!b.dx && !b.grad_residual && !b.grad_act_weight.data) return;
    }
    backward<T>(context_, c, b);
  }
  template <class T>
  void run_typed() {
    operation_ == "layer" ? layer<T>() : noise<T>(context_, call(), data<T>("x"), data<T>("y"));
  }

  void start() {
    if (operation_ == "update_statistics") {
      return update_statistics(
          context_,
          {mutable_vector("running_mean"), mutable_vector("running_var"), data<int64_t>("batches"), vector("mean"),
           vector("var"), int64_t(number("C")), int64_t(number("groups")), int64_t(number("count")),
           int64_t(number("last_count")), number("cumulative") != 0, number("momentum"), data<double>("counts")});
    }
    if (operation_ == "draw_seed") {
      const int64_t* state = data<int64_t>("state");  // seed, offset, offset within a graph
      const bool captured = number("captured") != 0;
      const uint64_t seed = captured ? 0 : state[0], offset = captured ? 0 : state[1];
      return draw_seed(context_, {seed, offset, state, state + 1, uint64_t(state[2]), captured, data<int64_t>("y")});
    }
    switch (type_of("y")) {
      case DType::float32:
        return run_typed<float>();
#if !defined(FN_ONLY_FLOAT32)
      case DType::float64:
        return run_typed<double>();
      case DType::bfloat16:
        return run_typed<BFloat16>();
      case DType::float16:
        return run_typed<Float16>();
#endif
      default:
        fail("this build has no such type");
    }
  }

  std::string line_, operation_;
  std::map<std::string, std::string> settings_;
  std::map<std::string, Tensor> tensors_;
  std::vector<std::string> names_;
  Machine machine_;
  Context context_;
};

}  // namespace
}  // namespace fusednorm::cuda

int main(int count, char** words) {
  using namespace fusednorm::cuda;
  if (count < 4) fail("usage: cuda_host CASES RESULTS ORDER...");
  std::ifstream file(words[1], std::ios::binary);
  std::ofstream results(words[2], std::ios::binary);
  std::string line;
  while (std::getline(file, line)) {
    Case c(file, line);
    std::string expected;
    for (int i = 3; i < count; ++i) {
      host::set_order(words[i]);
      std::cerr << "case " << words[i] << ": " << line << std::endl;  // whatever comes after it was its doing
      const std::string result = c.run(i % 2 ? 0xFF : 0x5A);
      if (i == 3) results << (expected = result);
      if (result == expected) continue;
      size_t at = 0;
      while (result[at] == expected[at]) ++at;
      fail("byte " + std::to_string(at) + " of the results differs from that in the order " + words[3]);
    }
  }
  for (const std::string& kernel : host::launched) std::cout << kernel << "\n";
  return results.flush() ? 0 : 2;
}

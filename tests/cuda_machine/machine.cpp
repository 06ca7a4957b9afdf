// A warp runs until its lanes wait; which one goes on then is the order's choice.
#include "machine.h"

#include <algorithm>
#include <random>

#include "../cuda/scheduler.h"
#include "counts.h"
#include "instructions.h"

namespace machine {

const char* running = "";

namespace {

constexpr int64_t kMostSteps = 10'000'000;  // of a warp

std::map<uint64_t, size_t>& allowed() {
  static std::map<uint64_t, size_t> all;
  return all;
}

// ---- a cluster ------------------------------------------------------------------------------------------------------
void step(Warp& w) {
  const Kernel& kernel = *w.block->kernel;
  const Mask runs = w.in(State::runs);
  uint32_t pc = ~0u;
  for_lanes(runs, [&](int i) { pc = std::min(pc, w.pc[i]); });
  Mask active = 0;
  for_lanes(runs, [&](int i) { active |= Mask{w.pc[i] == pc} << i; });
  if (pc / 16 >= kernel.code.size()) fail("the code is left");
  const Instruction& in = kernel.code[pc / 16];
  if (counting()) count_step(w, in);
  for_lanes(active, [&](int i) { w.pc[i] = pc + 16; });
  const Mask taking = active & w.test(in.guard);
  if (taking) in.execute(w, in, taking);
}

bool all_wait(const Warp& w, State where) { return !(~w.in(State::exited) & ~w.in(where)); }

// Lets those go on that all have come to a barrier; whether there are any.
bool release(std::vector<Block>& cluster) {
  bool found = false;
  const auto go_on = [&](std::vector<Warp*> warps, State from) {
    bool waits = false;
    for (const Warp* w : warps) {
      if (!all_wait(*w, from)) return;
      waits = waits || w->in(from);
    }
    for (Warp* w : warps) w->put(w->in(from), State::runs);
    found = found || waits;
  };
  std::vector<Warp*> all;
  for (Block& block : cluster) {
    std::vector<Warp*> own;
    for (Warp& w : block.warps) own.push_back(&w);
    go_on(own, State::at_barrier);
    all.insert(all.end(), own.begin(), own.end());
  }
  go_on(all, State::at_cluster);
  return found;
}

}  // namespace

void run(std::vector<Block>& cluster, uint64_t seed) {
  std::mt19937_64 random(seed);
  using fusednorm::cuda::host::Order;
  const Order order = fusednorm::cuda::host::settings.order;
  std::vector<Warp*> all;
  for (Block& block : cluster) {
    for (Warp& w : block.warps) all.push_back(&w);
  }
  while (true) {
    std::vector<Warp*> ready;
    for (Warp* w : all) {
      if (w->in(State::runs)) ready.push_back(w);
    }
    if (ready.empty()) {
      if (release(cluster)) continue;
      for (const Warp* w : all) {
        if (!all_wait(*w, State::exited)) fail(std::string(running) + ": a deadlock");
      }
      return;
    }
    const size_t which = order == Order::forward   ? 0
                         : order == Order::reverse ? ready.size() - 1
                                                   : random() % ready.size();
    Warp& w = *ready[which];
    while (w.in(State::runs)) {
      step(w);
      if (++w.steps > kMostSteps) fail(std::string(running) + ": does not end");
    }
    const std::vector<Warp>& own = w.block->warps;
    w.block->ended = std::all_of(own.begin(), own.end(), [](const Warp& w) { return all_wait(w, State::exited); });
  }
}

// ---- names ----------------------------------------------------------------------------------------------------------
Handler handler(const std::string& name) {
  static const std::map<std::string, Handler> all = [] {
    std::map<std::string, Handler> found;
    for (const Named* named :
         {integer_instructions(), floating_instructions(), memory_instructions(), control_instructions()}) {
      for (; named->name; ++named) found[named->name] = named->handler;
    }
    return found;
  }();
  const auto at = all.find(name);
  return at == all.end() ? nullptr : at->second;
}

void refuse(const Instruction& in, const std::string& why) {
  char at[32];
  snprintf(at, sizeof at, "/*%04x*/ ", in.pc);
  fail(std::string(running) + ": " + at + in.text + ": " + why);
}
void report(const Warp& w, const Instruction& in, int lane, const std::string& what) {
  char at[160];
  const Block& block = *w.block;
  const unsigned thread = static_cast<unsigned>(w.index * kLanes + lane);
  snprintf(at, sizeof at, "block (%u, %u), thread (%u, %u): ", block.id[0], block.id[1], thread % block.size[0],
           thread / block.size[0]);
  refuse(in, at + what);
}

void allow(const void* from, size_t bytes) { allowed()[reinterpret_cast<uint64_t>(from)] = bytes; }
void forget() { allowed().clear(); }
unsigned char* global(uint64_t address, size_t bytes) {
  auto next = allowed().upper_bound(address);
  if (next == allowed().begin()) return nullptr;
  const auto [from, size] = *--next;
  return address + bytes <= from + size ? reinterpret_cast<unsigned char*>(address) : nullptr;
}

}  // namespace machine

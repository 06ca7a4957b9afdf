// Where a warp's lanes go: branches, calls, and the places where they wait for one another.
#include "../cuda/scheduler.h"
#include "instructions.h"
#include "machine.h"

namespace machine {
namespace {

using I = const Instruction&;

void jump(Warp& w, Mask lanes, uint64_t to) {
  for_lanes(lanes, [&](int i) { w.pc[i] = static_cast<uint32_t>(to); });
}

// Lanes that wait for others of their warp go on once all of those are there that have not ended.
void release(Warp& w) {
  const Mask gone = w.in(State::exited);
  for (int n = 0; n < 16; ++n) {
    Mask waiting = 0;
    for_lanes(w.in(State::at_reconvergence), [&](int i) { waiting |= Mask{w.waits_for[i] == n} << i; });
    if (waiting && !(w.reconvergence[n] & ~waiting & ~gone)) w.put(waiting, State::runs);
  }
  const Mask waiting = w.in(State::at_warp);
  Mask wanted = 0;
  for_lanes(waiting, [&](int i) { wanted |= static_cast<Mask>(w.waits_for[i]); });
  if (waiting && !(wanted & ~waiting & ~gone)) w.put(waiting, State::runs);
}

void bra(Warp& w, I in, Mask active) {
  const Operand& to = in.operands.back();
  Mask taken = active;
  if (in.has(Mod::DIV) || in.has(Mod::CONV)) {  // whether all the lanes of a mask are here: unless, or if
    const Mask together = w.read(in.operands[0])[0] & ~w.in(State::exited);
    if ((active == together) == in.has(Mod::DIV)) taken = 0;
  } else {
    for (size_t i = 0; i + 1 < in.operands.size(); ++i) taken &= w.test(in.operands[i]);
  }
  jump(w, taken, to.value);
}

void call(Warp& w, I in, Mask active) { jump(w, active, in.operands.back().value); }
void ret(Warp& w, I in, Mask active) {
  const Lanes to = w.read(in.operands[0]);
  for_lanes(active, [&](int i) { w.pc[i] = to[i]; });
}

void brx(Warp& w, I in, Mask active) {
  const Lanes to = w.read(in.operands[0]), more = w.read(in.operands[1]);
  for_lanes(active, [&](int i) { w.pc[i] = in.pc + 16 + to[i] + more[i]; });
}

void exit_lanes(Warp& w, I, Mask active) {
  w.put(active, State::exited);
  release(w);
}

void wait_for_grid(Warp&, I, Mask active) { fusednorm::cuda::host::waits += __builtin_popcount(active); }

int barrier_of(I in) { return std::atoi(in.operands[0].name.c_str() + 1); }
void bssy(Warp& w, I in, Mask active) { w.reconvergence[barrier_of(in)] = active; }
void bsync(Warp& w, I in, Mask active) {
  for_lanes(active, [&](int i) { w.waits_for[i] = barrier_of(in); });
  w.put(active, State::at_reconvergence);
  release(w);
}
void break_off(Warp& w, I in, Mask active) {
  w.reconvergence[barrier_of(in)] &= ~active;
  release(w);
}

void warpsync(Warp& w, I in, Mask active) {
  const bool named = !in.operands.empty() && in.operands[0].kind == Operand::Kind::general;
  const Lanes mask = named ? w.read(in.operands[0]) : Lanes{};
  for_lanes(active, [&](int i) { w.waits_for[i] = static_cast<int>(named ? mask[i] : ~Mask{0}); });
  w.put(active, State::at_warp);
  release(w);
}

void bar(Warp& w, I in, Mask active) {
  const auto& o = in.operands;
  if (o.size() > 1) {  // for so many threads
    const Lanes threads = w.read(o[1]);
    for_lanes(active, [&](int i) {
      expect(threads[i] == w.block->size[0] * w.block->size[1], in, "waits for a part of the block");
    });
  }
  w.put(active, State::at_barrier);
}
void cluster_wait(Warp& w, I, Mask active) { w.put(active, State::at_cluster); }

// Fences and hints: what one thread writes the others read at once here.
void nothing(Warp&, I, Mask) {}

void s2r(Warp& w, I in, Mask active) {
  const std::string& name = in.operands[1].name;
  const Block& block = *w.block;
  Lanes found{};
  for (int i = 0; i < kLanes; ++i) {
    const unsigned thread = static_cast<unsigned>(w.index * kLanes + i);
    if (name == "SR_TID.X")
      found[i] = thread % block.size[0];
    else if (name == "SR_TID.Y")
      found[i] = thread / block.size[0];
    else if (name == "SR_CTAID.X")
      found[i] = block.id[0];
    else if (name == "SR_CTAID.Y")
      found[i] = block.id[1];
    else if (name == "SR_CgaCtaId")
      found[i] = block.rank;
    else if (name == "SR_SWINHI")
      found[i] = kSharedWindow;
    else if (name == "SR_LANEID")
      found[i] = static_cast<uint32_t>(i);
    else
      refuse(in, "reads a register that is not known here");
  }
  w.write(in.operands[0], found, active);
}

}  // namespace

const Named* control_instructions() {
  static const Named all[] = {
      {"BRA", bra},
      {"BRX", brx},
      {"PREEXIT", nothing},
      {"ACQBULK", wait_for_grid},
      {"CALL", call},
      {"RET", ret},
      {"EXIT", exit_lanes},
      {"BSSY", bssy},
      {"BSYNC", bsync},
      {"BREAK", break_off},
      {"WARPSYNC", warpsync},
      {"BAR", bar},
      {"UCGABAR_WAIT", cluster_wait},
      {"S2R", s2r},
      {"S2UR", s2r},
      {"UCGABAR_ARV", nothing},
      {"ENDCOLLECTIVE", nothing},
      {"MEMBAR", nothing},
      {"ERRBAR", nothing},
      {"CGAERRBAR", nothing},
      {"CCTL", nothing},
      {"NOP", nothing},
      {"YIELD", nothing},
      {"DEPBAR", nothing},
      {nullptr, nullptr},
  };
  return all;
}

}  // namespace machine

// Loads and stores: global, shared (of the block, or of another one of its cluster), local and constant memory;
// shuffles.
#include <set>
#include <string.h>

#include "counts.h"
#include "instructions.h"
#include "machine.h"

namespace machine {
namespace {

using I = const Instruction&;

size_t width(I in) {
  if (in.has(Mod::QUAD)) return 16;
  if (in.has(Mod::DOUBLE)) return 8;
  if (in.has(Mod::U8) || in.has(Mod::S8)) return 1;
  return in.has(Mod::U16) || in.has(Mod::S16) ? 2 : 4;
}

uint64_t address(const Warp& w, const Operand& at, int lane) {
  uint64_t found = at.value;
  if (at.base != kZero) {
    found += at.wide ? uint64_t{w.general[at.base + 1][lane]} << 32 | w.general[at.base][lane]
                     : uint64_t{w.general[at.base][lane]} * static_cast<uint64_t>(at.scale);
  }
  if (at.uniform != kUniformZero) found += w.uniform[at.uniform];
  return at.wide ? found : static_cast<uint32_t>(found);
}

void into_registers(Warp& w, I in, const Operand& to, int lane, const unsigned char* from) {
  if (to.index == kZero) return;
  const size_t bytes = width(in);
  uint32_t words[4] = {};
  memcpy(words, from, bytes);
  if (in.has(Mod::S8)) words[0] = static_cast<uint32_t>(static_cast<int8_t>(words[0]));
  if (in.has(Mod::S16)) words[0] = static_cast<uint32_t>(static_cast<int16_t>(words[0]));
  for (size_t k = 0; k < (bytes + 3) / 4; ++k) w.general[to.index + k][lane] = words[k];
}
void out_of_registers(const Warp& w, I in, const Operand& from, int lane, unsigned char* to) {
  uint32_t words[4] = {};
  for (size_t k = 0; k < (width(in) + 3) / 4; ++k) words[k] = from.index == kZero ? 0 : w.general[from.index + k][lane];
  memcpy(to, words, width(in));
}

// ---- where an address is --------------------------------------------------------------------------------------------
unsigned char* shared(Warp& w, I in, uint32_t at, int lane) {
  const size_t bytes = width(in);
  const unsigned rank = at >> kRankShift;
  const uint32_t offset = at & ((1u << kRankShift) - 1);
  std::vector<Block>& cluster = *w.block->cluster;
  if (rank >= cluster.size()) report(w, in, lane, "reads a block that is not in the cluster");
  Block& block = cluster[rank];
  if (block.ended) report(w, in, lane, "reads the shared memory of a block that has ended");
  if (offset < kSharedStart || offset - kSharedStart + bytes > block.shared.size()) {
    report(w, in, lane, "is outside of shared memory");
  }
  return block.shared.data() + (offset - kSharedStart);
}

// Passes that shared memory takes: each of its 32 banks gives 4 bytes in one.
int64_t passes(const std::vector<uint32_t>& words) {
  std::map<uint32_t, std::set<uint32_t>> banks;
  size_t most = 0;
  for (uint32_t word : words) {
    auto& bank = banks[word % 32];
    bank.insert(word);
    most = std::max(most, bank.size());
  }
  return static_cast<int64_t>(most);
}
void count_shared(I in, const Lanes& at, Mask active) {
  if (!counting()) return;
  int64_t moved = 0, parts = 0;
  const size_t bytes = width(in);
  const int lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;  // that are served together
  for (int first = 0; first < kLanes; first += lanes) {
    std::vector<uint32_t> words;
    for_lanes(active, [&](int i) {
      if (i < first || i >= first + lanes) return;
      for (size_t k = 0; k < (bytes + 3) / 4; ++k) words.push_back(static_cast<uint32_t>(at[i] / 4 + k));
      moved += static_cast<int64_t>(bytes);
    });
    parts += passes(words);
  }
  count_access(in, moved, parts);
}
void count_global(Warp& w, I in, const Pairs& at, Mask active) {
  if (!counting()) return;
  std::set<uint64_t> sectors;
  for_lanes(active, [&](int i) { sectors.insert(at[i] / 32); });
  const int64_t bytes = static_cast<int64_t>(width(in)) * __builtin_popcount(active);
  count_access(in, bytes, static_cast<int64_t>(sectors.size()));
  if (in.opcode[0] == 'L') count_load(w, in.operands[0], (width(in) + 3) / 4, bytes);
}

// ---- instructions ---------------------------------------------------------------------------------------------------
// Calls move(lane, place) for each lane's place in memory.
template <class Move>
void at_generic(Warp& w, I in, const Operand& where, Mask active, Move move) {
  Pairs at{};
  bool shares = false;
  for_lanes(active, [&](int i) {
    at[i] = address(w, where, i);
    if (at[i] % width(in)) report(w, in, i, "is not aligned");
    if (at[i] >> 32 == kSharedWindow) {
      shares = true;
      move(i, shared(w, in, static_cast<uint32_t>(at[i]), i));
    } else {
      unsigned char* place = global(at[i], width(in));
      if (!place) report(w, in, i, "is outside of all tensors");
      move(i, place);
    }
  });
  if (!shares) count_global(w, in, at, active);
}
template <class Move>
void at_shared(Warp& w, I in, const Operand& where, Mask active, Move move) {
  Lanes at{};
  for_lanes(active, [&](int i) {
    at[i] = static_cast<uint32_t>(address(w, where, i));
    if (at[i] % width(in)) report(w, in, i, "is not aligned");
    move(i, shared(w, in, at[i], i));
  });
  count_shared(in, at, active);
}
template <class Move>
void at_local(Warp& w, I in, const Operand& where, Mask active, Move move) {
  for_lanes(active, [&](int i) {
    const uint64_t at = address(w, where, i);
    if (at + width(in) > w.local[i].size()) w.local[i].resize(at + width(in), 0xff);
    move(i, w.local[i].data() + at);
  });
}

#define MACHINE_ACCESS(load, store, at)                                                          \
  void load(Warp& w, I in, Mask active) {                                                        \
    at(w, in, in.operands[1], active,                                                            \
       [&](int i, unsigned char* place) { into_registers(w, in, in.operands[0], i, place); });   \
  }                                                                                              \
  void store(Warp& w, I in, Mask active) {                                                       \
    at(w, in, in.operands[0], active,                                                            \
       [&](int i, unsigned char* place) { out_of_registers(w, in, in.operands[1], i, place); }); \
  }
MACHINE_ACCESS(load_generic, store_generic, at_generic)
MACHINE_ACCESS(load_shared, store_shared, at_shared)
MACHINE_ACCESS(load_local, store_local, at_local)
#undef MACHINE_ACCESS

void load_constant(Warp& w, I in, Mask active) {
  const Operand& from = in.operands[1];
  const size_t bytes = width(in);
  const auto& others = w.block->kernel->constants;
  const auto other = others.find(from.index);
  expect(from.index == 0 || other != others.end(), in, "reads a bank that is not there");
  const std::vector<unsigned char>& bank = from.index == 0 ? w.block->constants : other->second;
  Pairs found{};
  for_lanes(active, [&](int i) {
    const uint64_t at = address(w, from, i);
    if (at + bytes > bank.size()) report(w, in, i, "is outside of the arguments");
    memcpy(&found[i], bank.data() + at, bytes);
  });
  if (bytes == 8) {
    w.write_pair(in.operands[0], found, active);
  } else {
    Lanes low;
    for (int i = 0; i < kLanes; ++i) low[i] = static_cast<uint32_t>(found[i]);
    w.write(in.operands[0], low, active);
  }
}

void shfl(Warp& w, I in, Mask active) {
  const auto& o = in.operands;
  const Lanes from = w.read(o[2]), by = w.read(o[3]), clamp = w.read(o[4]);
  Lanes found{};
  for_lanes(active, [&](int i) {
    expect((clamp[i] & 0x1f) == 0x1f && clamp[i] >> 8 == 0, in, "divides the warp");
    expect(in.has(Mod::BFLY) || in.has(Mod::IDX), in, "shuffles in a way that is not known here");
    const unsigned source = in.has(Mod::BFLY) ? static_cast<unsigned>(i) ^ (by[i] & 31) : by[i] & 31;
    if (!(active >> source & 1)) report(w, in, i, "reads a lane that does not take part");
    found[i] = from[source];
  });
  w.write(o[1], found, active);
  w.set(o[0], ~Mask{0}, active);
}

}  // namespace

const Named* memory_instructions() {
  static const Named all[] = {
      {"LDG", load_generic},  {"STG", store_generic},  {"LD", load_generic}, {"ST", store_generic},
      {"LDS", load_shared},   {"STS", store_shared},   {"LDL", load_local},  {"STL", store_local},
      {"LDC", load_constant}, {"ULDC", load_constant}, {"SHFL", shfl},       {nullptr, nullptr},
  };
  return all;
}

}  // namespace machine

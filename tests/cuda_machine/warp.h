// A warp's registers, and how instructions read and write them: 32 lanes at a time.
#pragma once

#include <stdint.h>

#include <array>
#include <bit>

#include "code.h"

namespace machine {

constexpr int kLanes = 32;
using Mask = uint32_t;  // a bit for each lane
using Lanes = std::array<uint32_t, kLanes>;
using Pairs = std::array<uint64_t, kLanes>;

struct Block;

enum class State : uint8_t { runs, exited, at_reconvergence, at_warp, at_barrier, at_cluster };

struct Pending {     // a load whose value nobody has read yet
  int first, count;  // registers
  int64_t bytes;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  int64_t steps = 0;                 // instructions so far
  std::array<Lanes, 256> general{};  // the last one stays 0
  std::array<uint32_t, 64> uniform{};
  std::array<Mask, 8> predicate{};
  std::array<bool, 8> uniform_predicate{};
  std::array<uint32_t, kLanes> pc{};
  std::array<State, kLanes> state{};
  std::array<Mask, 16> reconvergence{};  // of BSSY: who has to come
  std::array<int, kLanes> waits_for{};   // its number, or the lanes of a WARPSYNC
  std::array<std::vector<unsigned char>, kLanes> local;
  std::vector<Pending> pending;  // if anybody counts

  Mask in(State which) const {
    Mask found = 0;
    for (int i = 0; i < kLanes; ++i) found |= Mask{state[i] == which} << i;
    return found;
  }
  void put(Mask lanes, State which) {
    for (int i = 0; i < kLanes; ++i) {
      if (lanes >> i & 1) state[i] = which;
    }
  }

  // ---- reading: 32 bits as an integer, with ~ and -, or as a float, with | | and - of its sign
  Lanes read(const Operand& from) const;
  Lanes read_float(const Operand& from) const;
  Pairs read_pair(const Operand& from) const;
  Pairs read_double(const Operand& from) const;
  Mask test(const Operand& from) const;
  // ---- writing, in the lanes of a mask
  void write(const Operand& to, const Lanes& values, Mask lanes);
  void write_pair(const Operand& to, const Pairs& values, Mask lanes);
  void set(const Operand& to, Mask values, Mask lanes);
};

// ---- values as bits -------------------------------------------------------------------------------------------------
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline uint64_t bits_of(double value) { return std::bit_cast<uint64_t>(value); }

// f(lane) for the lanes of a mask.
template <class F>
void for_lanes(Mask lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

}  // namespace machine

// Blocks and clusters that run together.
#pragma once

#include <stdint.h>

#include <map>
#include <vector>

#include "warp.h"

namespace machine {

constexpr uint32_t kSharedStart = 1024;     // what the system keeps of a block's shared memory lies before
constexpr int kRankShift = 24;              // a shared address has the block's rank in its cluster above this
constexpr uint32_t kSharedWindow = 0x7fff;  // upper half of a generic address in shared memory

struct Block {
  unsigned size[2], id[2];
  unsigned rank = 0;
  std::vector<Block>* cluster = nullptr;
  std::vector<unsigned char> shared;     // from kSharedStart on
  std::vector<unsigned char> constants;  // bank 0: sizes, then the arguments
  const Kernel* kernel = nullptr;
  std::vector<Warp> warps;
  bool ended = false;
};

// Runs a cluster's blocks to their end.
void run(std::vector<Block>& cluster, uint64_t seed);
extern const char* running;  // the kernel, for reports

// Global memory that the kernels may touch.
void allow(const void* from, size_t bytes);
void forget();
unsigned char* global(uint64_t address, size_t bytes);  // null where they may not

// Names the instruction, the kernel, the block and the thread, and ends the process.
[[noreturn]] void report(const Warp& warp, const Instruction& instruction, int lane, const std::string& what);

}  // namespace machine

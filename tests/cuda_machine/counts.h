// What is counted while kernels run, where FN_MACHINE_COUNTS names a file for it: per instruction how many warps
// execute it, and what its accesses come to; how many bytes a warp has asked for at once; how a launch was cut.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "warp.h"

namespace machine {

struct Row {
  int64_t executed = 0;  // by warps
  int64_t requests = 0, bytes = 0;
  int64_t parts = 0;  // sectors of 32 bytes of global memory, passes of shared memory
};

struct Launched {
  unsigned grid[2] = {}, block[2] = {}, cluster = 0;
  size_t shared = 0;
  int64_t blocks = 0;     // that were executed
  int64_t in_flight = 0;  // bytes of loads that a warp has asked for and not used yet, at most
  const Kernel* kernel = nullptr;
  std::vector<Row> rows;  // at pc / 16
};

bool counting();
// Counts go to this launch until the next one.
Launched& count_launch(const std::string& name, Launched next);
void count_step(Warp& w, const Instruction& in);
void count_load(Warp& w, const Operand& to, size_t registers, int64_t bytes);
void count_access(const Instruction& in, int64_t bytes, int64_t parts);

}  // namespace machine

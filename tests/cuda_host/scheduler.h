// The CUDA execution model on one CPU thread: a fiber per CUDA thread, and the places where fibers meet. What it keeps
// and what it cannot see is in README.md. device.cuh puts the names of csrc/cuda/device.cuh on top of this.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <set>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fusednorm::cuda::host {

// ---- what a kernel asks for -----------------------------------------------------------------------------------------
struct Position {
  dim3 thread, block, block_size, grid_size;
};
extern const Position* here;  // of the running fiber

struct Site {  // a line of a kernel, for reports and to tell one barrier from another
  const char* file;
  int line;
};

void block_barrier(Site site);
void cluster_barrier(Site site);
// Gives `mine` to the warp and takes what lane `source` gave. Orders no memory, as on a GPU.
void exchange(const char* what, const void* mine, void* theirs, size_t bytes, int source, Site site);
int lane();
unsigned char* shared(size_t offset, Site site);
unsigned cluster_rank();
const void* cluster_peer(const void* p, unsigned rank, Site site);
void check_alignment(const void* p, size_t alignment, Site site);

// Names the kernel, the block and the thread, and ends the process.
[[noreturn]] void report(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
constexpr int kReported = 3;  // its exit code

// ---- launches -------------------------------------------------------------------------------------------------------
struct Grid {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;  // blocks along grid.y
};
struct Kernel {
  const char* name;
  void (*body)(const void*);  // for one thread,
  const void* bound;          // of this
  // What tests/cuda_machine has instead, which executes the same kernel's machine code.
  const void* function;
  const void* arguments;
  size_t bytes;
};
// Runs the kernel on every thread of the grid, to the end.
void run(const Kernel& kernel, const Grid& grid);
inline std::set<std::string> launched;  // the kernels that ran so far
inline std::atomic<int64_t> waits;      // of a kernel's threads for the kernel in front to end
inline void expect_waits(const char* kernel, bool early) {
  if (!early || waits > 0) return;
  fprintf(stderr, "%s is launched early and does not wait\n", kernel);
  exit(kReported);
}

// Global memory: of a case that begins there is none, then what it is given. A sanitizer knows that by itself.
void forget_memory();
void give_memory(const void* from, size_t bytes);

// ---- settings -------------------------------------------------------------------------------------------------------
enum class Order { forward, reverse, random };
struct Settings {
  Order order = Order::forward;
  uint64_t seed = 0;  // of a random order
  int max_threads = 256;
  int max_shared = 227 * 1024;
  int max_cluster = 8;
  int max_schedulable = 8;  // blocks of a cluster that find room, as where a process has a part of a GPU
  int seconds = 60;         // processor time that a launch may take
};
inline Settings settings;
// "forward", "reverse" or "random:SEED"
inline void set_order(const char* name) {
  settings.order = !strcmp(name, "forward")   ? Order::forward
                   : !strcmp(name, "reverse") ? Order::reverse
                                              : Order::random;
  settings.seed = settings.order == Order::random ? strtoull(strchr(name, ':') + 1, nullptr, 10) : 0;
}

}  // namespace fusednorm::cuda::host

// What the CUDA backend offers to cuda.cpp, which knows tensors, and to the tests, which have no GPU: calls on plain
// pointers. No torch and no CUDA header here. Instantiated for the four storage types, one file each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "../call.h"

namespace fusednorm::cuda {

enum class DType : int { float32, float64, bfloat16, float16 };

// Which kernels a channels-first call gets: plan.h has the rule behind `automatic`.
enum class Residency : int { automatic, never, always_if_it_fits };

struct Machine {
  int multiprocessors;
  int shared_per_block;  // bytes that a block may ask for
  int max_cluster;       // blocks; 1: no clusters
  int threads;           // of a block, at most: 32, 64, 128 or 256
  Residency residency;
};

// Where and with what a call's kernels run. `workspace(bytes)` gives device memory that outlives the call's kernels,
// aligned to 16 bytes.
struct Context {
  Machine machine;
  void* stream;
  std::function<void*(size_t)> workspace;
};

// Rows of a batch that count: bit r of `bits`, 8 rows to a byte as to a Philox call; how many of them there are before
// each byte, and behind the last one. No bits: all count.
struct Counting {
  const uint8_t* bits;
  const int64_t* before;
};

// What of a noise is known on the device only: its strength, as chains have it as numbers, and where draws begin of a
// batch that is part of a larger one: at which row there, or sample.
struct Live {
  uint32_t threshold;
  float strength;
  double multiplier;
  int64_t first;
};

struct Call {
  Shape shape;
  Chain chain;
  bool training;
  double eps;
  int64_t ghost, groups;  // samples of a group whose statistics are its own; ghost >= N: one group
  const int64_t* seed;    // one value in device memory, or null: no live noise
  Counting counting;
  const Live* live;  // in device memory; or null: the strength is the chain's, and draws begin at 0
};

struct Vector {  // (C,) of any storage type, or null
  const void* data;
  DType type;
};
struct MutableVector {
  void* data;
  DType type;
};

// A = float, double for T = double; G groups. The mask holds the bits of each Philox call's 8 rows as a byte:
// (C, ceil(N*S / 8)) channels-first, (ceil(N*S / 8), C) channels-last; null: not saved, redraw. With one group only.
template <class T>
struct Forward {
  const T* x;                        // (N, C, S) in the shape's layout
  T* y;                              // same, or null: statistics alone
  Vector weight, bias;               // (C,) or null
  Vector running_mean, running_var;  // (C,), used when not training
  void *mean, *invstd, *stat_var;    // (G, C) of A, out
  uint8_t* mask;                     // out, or null
  const T* residual;                 // as x, or null
  Vector act_weight;                 // (C,) or null
  void* stat_mean;                   // (G, C) of A, out: with stat_var, of u without its noise; or null
  void* var;                         // (G, C) of A, out: of u, noise and all; or null
};

template <class T>
struct Backward {
  const T *x, *g;                        // (N, C, S) in the shape's layout
  T* dx;                                 // same, or null: not needed
  Vector weight, bias;                   // (C,) or null
  const void *mean, *invstd;             // (G, C) of A
  MutableVector grad_weight, grad_bias;  // (C,) out, or null
  const uint8_t* mask;
  const T* residual;              // as x, or null: not needed
  T* grad_residual;               // same, out, or null
  Vector act_weight;              // (C,) or null
  MutableVector grad_act_weight;  // (C,) out, or null
  double* sums;                 // (2, C), with PReLU (5, C), out: what the first pass gathers; or null. One group only
  const double *given, *count;  // the same from elsewhere, and one value: of how many values; or null
};

// Whether the kernels that run on the current device, which has clusters, were compiled for them.
bool compiled_for_clusters();

// The numel of the shape is not 0. Launch failures throw std::runtime_error.
template <class T>
void forward(const Context& context, const Call& call, const Forward<T>& p);
template <class T>
void backward(const Context& context, const Call& call, const Backward<T>& p);

// x * m, or m itself where x is null, in the shape's layout.
template <class T>
void noise(const Context& context, const Call& call, const T* x, T* y);

// The running statistics of torch's batch_norm, group after group; count = values per channel of a group (of the last
// one: last_count), or as `counts` says; it may be 0.
struct UpdateStatistics {
  MutableVector running_mean, running_var;  // (C,)
  int64_t* num_batches_tracked;             // one value, or null
  Vector mean, var;                         // (G, C)
  int64_t C, groups, count, last_count;
  bool cumulative;  // momentum=None: the plain average, from num_batches_tracked
  double momentum;
  const double* counts;  // (G,) in device memory, or null
};
void update_statistics(const Context& context, const UpdateStatistics& p);

// That, from a strength's value and the number of the batch's first sample, both in device memory or null.
struct Realise {
  Chain chain;
  const double* p;
  const int64_t* sample;
  int64_t draws;  // of a sample, in a channel
  Live* to;
};
void realise(const Context& context, const Realise& p);

// One seed from the state of torch's generator: (seed, offset) are values, or under graph capture addresses.
struct DrawSeed {
  uint64_t seed, offset;                           // when not captured
  const int64_t *captured_seed, *captured_offset;  // else
  uint64_t offset_in_graph;                        // added to *captured_offset
  bool captured;
  int64_t* out;
};
void draw_seed(const Context& context, const DrawSeed& p);

}  // namespace fusednorm::cuda

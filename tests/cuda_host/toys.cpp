// Small kernels, right and wrong, that test the model itself: `toys NAME ORDER` runs one and says whether its result is
// the expected one. `toys convert` answers how the 16-bit types round.
#include <stdio.h>
#include <stdlib.h>

#include <functional>
#include <map>
#include <vector>

#include "device.cuh"

namespace fusednorm::cuda {
namespace {

struct Toy {
  int* data;
  int n;
};

// ---- a block: sums over shared memory -------------------------------------------------------------------------------
// `Missing` is the barrier that is left out.
template <int Missing>
FN_KERNEL(64, 1)
block_sum(Toy q) {
  int* scratch = shared_memory<int>();
  const int i = threadIdx.x;
  scratch[i] = q.data[blockIdx.x * blockDim.x + i];
  if (Missing != 1) barrier();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (i < half) scratch[i] += scratch[i + half];
    if (Missing != 2) barrier();
  }
  const int sum = scratch[0];
  if (Missing != 3) barrier();
  scratch[i] = -1;
  q.data[blockIdx.x * blockDim.x + i] = sum;
}

// A race without a consequence: every thread writes the same.
FN_KERNEL(64, 1) two_writers(Toy q) { q.data[blockIdx.x * blockDim.x] = 7; }

FN_KERNEL(64, 1) two_blocks(Toy q) {
  if (threadIdx.x == 0) q.data[0] = q.data[0] | (1 << blockIdx.x);
}

FN_KERNEL(64, 1) unset(Toy q) { q.data[threadIdx.x] = shared_memory<float>()[threadIdx.x] != 0.0f ? 1 : 0; }

// ---- meetings -------------------------------------------------------------------------------------------------------
FN_KERNEL(64, 1) divergent(Toy) {
  if (threadIdx.x < 32) {
    barrier();
  } else {
    barrier();
  }
}

FN_KERNEL(64, 1) early_return(Toy q) {
  if (q.data[threadIdx.x] == 5) return;
  barrier();
}

template <bool Returns>
FN_KERNEL(64, 1)
absent_lanes(Toy q) {
  if (threadIdx.x % 32 < 16) q.data[threadIdx.x] = shuffle(q.data[threadIdx.x], 0);
  if (!Returns) barrier();
}

FN_KERNEL(64, 1) warp_sum(Toy q) {
  int v = q.data[threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  q.data[threadIdx.x] = v + 1000 * shuffle(static_cast<int>(threadIdx.x), 3);
}

// A shuffle is no barrier.
FN_KERNEL(64, 1) shuffle_for_barrier(Toy q) {
  int* scratch = shared_memory<int>();
  scratch[threadIdx.x] = q.data[threadIdx.x];
  const int none = shuffle(0, 0);
  q.data[threadIdx.x] = scratch[threadIdx.x ^ 1] + none;
}

FN_KERNEL(64, 1) spins(Toy q) {
  volatile int* flag = q.data;
  while (*flag != -1) {
  }
}

// ---- memory ---------------------------------------------------------------------------------------------------------
template <bool Writes>
FN_KERNEL(64, 1)
shared_overrun(Toy q) {
  int* p = shared_memory<int>() + threadIdx.x + 1;
  if (Writes) *p = 1;
  if (!Writes && threadIdx.x == 63) q.data[0] = *p;
}

FN_KERNEL(64, 1) global_overrun(Toy q) { q.data[threadIdx.x] = q.data[q.n - 63 + threadIdx.x]; }

FN_KERNEL(64, 1) misaligned(Toy q) {
  if (threadIdx.x == 5) store<2>(q.data + 8, load<2>(q.data + threadIdx.x));
}

// ---- clusters -------------------------------------------------------------------------------------------------------
template <int Missing>
FN_KERNEL(64, 1)
cluster_exchange(Toy q) {
  int* scratch = shared_memory<int>();
  scratch[threadIdx.x] = blockIdx.y;
  if (Missing != 1) cluster_barrier();
  int sum = 0;
  for (unsigned rank = 0; rank < 4; ++rank) sum += 1 << 4 * (cluster_peer(scratch, rank)[threadIdx.x ^ 1] & 7);
  if (Missing != 2) cluster_barrier();
  q.data[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = sum + cluster_rank();
}

// ---- all of them ----------------------------------------------------------------------------------------------------
struct Run {
  void (*kernel)(Toy);
  Launch at;
  std::function<int(int)> expected;  // of element i, which begins as i % 7
};

int at(int i) { return i % 7; }
int sum(int first, int count) { return count ? at(first) + sum(first + 1, count - 1) : 0; }

const std::map<std::string, Run>& toys() {
  const auto same = [](int i) { return at(i); };
  const auto block = [](int i) { return sum(i / 64 * 64, 64); };
  const auto peers = [](int i) { return (i / 128 < 4 ? 0x1111 : 0x11110000) + i / 128 % 4; };
  const Launch one{1, 64, 256, 1, nullptr}, many{9, 64, 256, 1, nullptr};
  const Launch clusters{dim3(2, 8), 64, 256, 4, nullptr};
  static const std::map<std::string, Run> all{
      {"block_sum", {block_sum<0>, many, block}},
      {"block_sum_1", {block_sum<1>, many, block}},
      {"block_sum_2", {block_sum<2>, many, block}},
      {"block_sum_3", {block_sum<3>, many, block}},
      {"two_writers", {two_writers, many, [](int i) { return i % 64 ? at(i) : 7; }}},
      {"two_blocks", {two_blocks, {2, 64, 0, 1, nullptr}, [](int i) { return i ? at(i) : 3; }}},
      {"unset", {unset, one, [](int) { return 1; }}},
      {"divergent", {divergent, one, same}},
      {"early_return", {early_return, one, same}},
      {"absent_lanes", {absent_lanes<false>, one, same}},
      {"absent_lanes_return", {absent_lanes<true>, one, same}},
      {"warp_sum", {warp_sum, one, [](int i) { return sum(i / 32 * 32, 32) + 1000 * (i / 32 * 32 + 3); }}},
      {"shuffle_for_barrier", {shuffle_for_barrier, one, [](int i) { return at(i ^ 1); }}},
      {"spins", {spins, one, same}},
      {"shared_overrun_write", {shared_overrun<true>, one, same}},
      {"shared_overrun_read", {shared_overrun<false>, one, same}},
      {"global_overrun", {global_overrun, one, same}},
      {"misaligned", {misaligned, {1, 32, 0, 1, nullptr}, same}},
      {"cluster", {cluster_exchange<0>, clusters, peers}},
      {"cluster_1", {cluster_exchange<1>, clusters, peers}},
      {"cluster_2", {cluster_exchange<2>, clusters, peers}},
      {"too_many_threads", {unset, {1, 512, 4096, 1, nullptr}, same}},
      {"too_much_shared", {unset, {1, 64, 1 << 20, 1, nullptr}, same}},
  };
  return all;
}

// Floats from stdin; to stdout their bits as BFloat16 and as Float16, then all 65536 values of both, widened.
int convert() {
  std::vector<uint16_t> narrowed[2];
  float v;
  while (fread(&v, sizeof(v), 1, stdin) == 1) {
    narrowed[0].push_back(narrow<BFloat16>(v).bits);
    narrowed[1].push_back(narrow<Float16>(v).bits);
  }
  for (const auto& half : narrowed) fwrite(half.data(), 2, half.size(), stdout);
  for (int type = 0; type < 2; ++type) {
    for (unsigned bits = 0; bits < 65536; ++bits) {
      v = type ? widen(Float16{static_cast<uint16_t>(bits)}) : widen(BFloat16{static_cast<uint16_t>(bits)});
      fwrite(&v, sizeof(v), 1, stdout);
    }
  }
  return 0;
}

int run(const Run& toy) {
  const int n = toy.at.grid.x * toy.at.grid.y * toy.at.block.x;
  std::vector<int> data(n);
  for (int i = 0; i < n; ++i) data[i] = at(i);
  launch("toy", toy.at, toy.kernel, Toy{data.data(), n});
  for (int i = 0; i < n; ++i) {
    if (data[i] == toy.expected(i)) continue;
    printf("wrong: [%d] is %d, expected %d\n", i, data[i], toy.expected(i));
    return 1;
  }
  puts("right");
  return 0;
}

}  // namespace
}  // namespace fusednorm::cuda

int main(int count, char** words) {
  using namespace fusednorm::cuda;
  if (count == 2 && words[1] == std::string("convert")) return convert();
  if (count != 3 || !toys().count(words[1])) return 2;
  host::settings.seconds = 1;
  host::set_order(words[2]);
  return run(toys().at(words[1]));
}

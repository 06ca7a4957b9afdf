// Launches, in the place of the fibers of tests/cuda_host: the kernel's machine code is looked up by its name, and run
// one cluster after another.
#include <cxxabi.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "../cuda/scheduler.h"
#include "counts.h"
#include "instructions.h"
#include "machine.h"

namespace machine {
namespace {

constexpr uint32_t kArguments = 0x210, kStack = 0x28;  // in bank 0

template <class T>
void store(std::vector<unsigned char>& bytes, size_t at, T value) {
  memcpy(bytes.data() + at, &value, sizeof value);
}

// As the source spells it, without spaces, like channels_first_apply<BFloat16,8>: of a host's symbol and of the
// device's.
std::string spelled(const std::string& symbol) {
  int status;
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  if (status) return symbol;
  std::string name = text;
  free(text);
  // Between the last :: and the ( that are in no template's arguments.
  size_t from = 0;
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth == 0 && (name.compare(i, 2, "::") == 0 || name[i] == ' ')) from = i + (name[i] == ' ' ? 1 : 2);
    if (depth == 0 && name[i] == '(') {
      name = name.substr(from, i - from);
      break;
    }
  }
  const std::pair<const char*, const char*> same[] = {
      {"__nv_bfloat16", "BFloat16"}, {"__half", "Float16"}, {"fusednorm::cuda::", ""}};
  for (const auto& [theirs, ours] : same) {
    for (size_t at; (at = name.find(theirs)) != std::string::npos;) name.replace(at, strlen(theirs), ours);
  }
  name.erase(std::remove(name.begin(), name.end(), ' '), name.end());
  return name;
}

const std::map<std::string, Kernel>& listing() {
  static const std::map<std::string, Kernel> all = [] {
    std::map<std::string, Kernel> found;
    const char* files = getenv("FN_MACHINE_CODE");
    if (!files) fail("FN_MACHINE_CODE: expected the listings, separated by colons");
    std::string rest = files;
    while (!rest.empty()) {
      const size_t end = std::min(rest.find(':'), rest.size());
      for (auto& [symbol, kernel] : read_listing(rest.substr(0, end))) found[spelled(symbol)] = std::move(kernel);
      rest.erase(0, end + 1);
    }
    return found;
  }();
  return all;
}

}  // namespace
}  // namespace machine

namespace fusednorm::cuda::host {

const Position* here = nullptr;

namespace {
std::string kernel_name(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || !info.dli_sname) machine::fail("a kernel without a name: link with -rdynamic");
  return machine::spelled(info.dli_sname);
}
}  // namespace

void forget_memory() { machine::forget(); }
void give_memory(const void* from, size_t bytes) { machine::allow(from, bytes); }

void run(const Kernel& kernel, const Grid& grid) {
  using namespace machine;
  const std::string name = kernel_name(kernel.function);
  launched.insert(name);
  running = kernel.name;
  const auto code = listing().find(name);
  if (code == listing().end()) fail(std::string(kernel.name) + ": not in the listings: " + name);
  std::vector<unsigned char> constants(kArguments + kernel.bytes);
  const unsigned sizes[] = {grid.block.x, grid.block.y, grid.block.z, grid.grid.x, grid.grid.y, grid.grid.z};
  for (size_t i = 0; i < 6; ++i) store(constants, 4 * i, sizes[i]);
  store(constants, kStack, 0x10000u);  // it grows down
  memcpy(constants.data() + kArguments, kernel.arguments, kernel.bytes);
  const auto most = [](const char* name, unsigned all) {  // to count, a few blocks are enough
    const char* given = getenv(name);
    return given ? std::min(static_cast<unsigned>(atoi(given)), all) : all;
  };
  const unsigned columns = most("FN_MACHINE_COLUMNS", grid.grid.x);
  const unsigned chunks = most("FN_MACHINE_CHUNKS", grid.grid.y / grid.cluster);
  if (columns == 0 || chunks == 0) waits = 1;  // nobody is there to wait
  Launched* launch = nullptr;
  if (counting()) {
    launch = &count_launch(
        name,
        {{grid.grid.x, grid.grid.y}, {grid.block.x, grid.block.y}, grid.cluster, grid.shared, 0, 0, &code->second, {}});
  }
  const unsigned clusters = grid.grid.x * (grid.grid.y / grid.cluster);
  for (unsigned n = 0; n < clusters; ++n) {
    const unsigned which = settings.order == Order::reverse ? clusters - 1 - n : n;
    if (which % grid.grid.x >= columns || which / grid.grid.x >= chunks) continue;
    if (launch) launch->blocks += grid.cluster;
    std::vector<Block> cluster(grid.cluster);
    for (unsigned rank = 0; rank < grid.cluster; ++rank) {
      Block& block = cluster[rank];
      block = {{grid.block.x, grid.block.y},
               {which % grid.grid.x, which / grid.grid.x * grid.cluster + rank},
               rank,
               &cluster,
               std::vector<unsigned char>(grid.shared, 0xff),
               constants,
               &code->second,
               {},
               false};
      const unsigned threads = grid.block.x * grid.block.y;
      block.warps.resize((threads + kLanes - 1) / kLanes);
      for (size_t w = 0; w < block.warps.size(); ++w) {
        block.warps[w].index = static_cast<int>(w);
        block.warps[w].block = &block;
        for (unsigned i = 0; i < kLanes; ++i) {
          block.warps[w].state[i] = w * kLanes + i < threads ? State::runs : State::exited;
        }
      }
    }
    machine::run(cluster, settings.seed + n);
  }
}

// The kernels are linked in for what launches them; as functions they do not run.
[[noreturn]] static void not_here() { machine::fail("a kernel was called as a function"); }
void block_barrier(Site) { not_here(); }
void cluster_barrier(Site) { not_here(); }
void exchange(const char*, const void*, void*, size_t, int, Site) { not_here(); }
int lane() { not_here(); }
unsigned char* shared(size_t, Site) { not_here(); }
unsigned cluster_rank() { not_here(); }
const void* cluster_peer(const void*, unsigned, Site) { not_here(); }
void check_alignment(const void*, size_t, Site) { not_here(); }

}  // namespace fusednorm::cuda::host

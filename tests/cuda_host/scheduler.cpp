// Fibers, the order in which they run, and what is reported of them. Compiled without -fsanitize, and told by FN_ASAN
// or FN_TSAN of the rest: the order that this file gives to fibers must not count as a synchronisation.
#include "scheduler.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <memory>
#include <new>
#include <queue>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(FN_UCONTEXT)
#define FN_UCONTEXT
#endif
#if defined(FN_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(FN_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FN_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace fusednorm::cuda::host {

const Position* here = nullptr;

namespace {

// ---- sanitizers -----------------------------------------------------------------------------------------------------
#if defined(FN_ASAN)
void poison(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
void unpoison(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
void poison(const void*, size_t) {}
void unpoison(const void*, size_t) {}
#endif
#if defined(FN_TSAN)
constexpr bool kTsan = true;
void release(void* what) { __tsan_release(what); }
void acquire(void* what) { __tsan_acquire(what); }
#else
constexpr bool kTsan = false;
void release(void*) {}
void acquire(void*) {}
#endif
constexpr int kResident = kTsan ? 3 : 8;  // independent blocks that run interleaved; TSan needs a megabyte for a fiber

// ---- fibers ---------------------------------------------------------------------------------------------------------
constexpr size_t kStack = 256 * 1024, kPage = 4096;

struct Context {
#if !defined(FN_UCONTEXT)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
};

#if !defined(FN_UCONTEXT)
// Saves what a function must preserve and the stack pointer, and goes on where another stack left off.
extern "C" void fusednorm_switch(void** from, void* to);
asm(R"(
.text
.type fusednorm_switch, @function
fusednorm_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fusednorm_switch, . - fusednorm_switch
)");
void prepare(Context& c, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  memset(top, 0, 64);
  top[6] = reinterpret_cast<void*>(entry);
  c.stack_pointer = top;
}
void jump(Context& from, Context& to) { fusednorm_switch(&from.stack_pointer, to.stack_pointer); }
#else
void prepare(Context& c, unsigned char* stack, void (*entry)()) {
  getcontext(&c.context);
  c.context.uc_stack.ss_sp = stack;
  c.context.uc_stack.ss_size = kStack;
  makecontext(&c.context, entry, 0);
}
void jump(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

void switch_to(Context& from, Context& to, bool for_ever = false) {
  (void)for_ever;
#if defined(FN_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(FN_ASAN)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  jump(from, to);
#if defined(FN_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// ---- the grid -------------------------------------------------------------------------------------------------------
struct Fiber;
struct Cluster;

// Where a set of fibers meets: a warp, a block or a cluster.
struct Gate {
  explicit Gate(const char* members) : members(members) {}
  const char* members;
  unsigned size = 0;
  unsigned returned = 0;    // that will never come
  unsigned generation = 0;  // meetings so far
  const char* what = "";    // of the meeting that is gathering
  Site site{};
  std::vector<Fiber*> waiting;
  char synchronises[2] = {};  // TSan knows a meeting by one of these addresses; two, for it may overtake slow leavers
  void resize(unsigned n) {
    size = n;
    waiting.reserve(n);  // fibers must not allocate: TSan would see them share the memory of this vector
  }
};

struct Warp {
  Gate gate{"warp"};
  unsigned char slots[2][32][16];  // two, for lanes that are slow to take
  uint64_t key;
};

constexpr size_t kRedZone = 256;
constexpr unsigned char kRed = 0xA5, kUnset = 0xFF;  // kUnset: NaN of any type

struct Block {
  dim3 index;
  unsigned rank;
  Cluster* cluster;
  Gate gate{"block"};
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  unsigned char* arena = nullptr;  // shared memory between two red zones
  unsigned peers = 0;              // bit r: has an address in block r since the cluster last met
  uint64_t key;
  unsigned char* shared() const { return arena + kRedZone; }
  bool ended() const { return gate.returned == gate.size; }
};

struct Cluster {
  Gate gate{"cluster"};
  std::vector<Block> blocks;
};

struct Fiber {
  Context context;
  Position position;
  Block* block;
  Warp* warp;
  unsigned thread;
  unsigned char* stack;
  const Gate* waits = nullptr;
  bool starved, done = false;
};

struct Running {
  const char* kernel = "";
  const Grid* grid = nullptr;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  Fiber* fiber = nullptr;
  Gate* complete = nullptr;  // whose fibers have all arrived
  Context scheduler;
  // TSan only. What the scheduler did before fibers begin is before all that they do, and that before the launch's end.
  // What belonged to a fiber is used again after the launch, for within it that would look like a race or hide one; and
  // used again it must be: TSan takes a quarter of a millisecond to make a fiber.
  char begin, end;
  std::vector<void*> tsan_fibers, old_tsan_fibers;
  uint64_t random = 0;
  using Ready = std::pair<uint64_t, Fiber*>;
  std::priority_queue<Ready, std::vector<Ready>, std::greater<>> ready;
  std::vector<unsigned char*> stacks;  // to be used again
  std::vector<std::unique_ptr<Cluster>> old_clusters;
  std::vector<unsigned char*> old_stacks;
} running;

uint64_t draw() {  // splitmix64
  uint64_t z = running.random += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

// ---- the order ------------------------------------------------------------------------------------------------------
// The runnable fiber with the smallest key runs, until it meets others or returns.
void make_ready(Fiber* f) {
  uint64_t key = f->block->index.x + f->block->index.y * uint64_t{running.grid->grid.x};
  key = (key << 11) + f->thread;
  if (settings.order == Order::reverse) key = ~key;
  if (settings.order == Order::random) {
    // By whole blocks, by warps or by threads; the starved run when nobody else can.
    const uint64_t low = draw() >> 33;
    key = settings.seed % 3 == 0 ? f->block->key ^ low : settings.seed % 3 == 1 ? f->warp->key ^ low : draw() >> 1;
    if (f->starved) key |= uint64_t{1} << 63;
  }
  f->waits = nullptr;
  running.ready.push({key, f});
}

// ---- reports --------------------------------------------------------------------------------------------------------
[[noreturn]] void end_process(const std::string& text) {
  fflush(stdout);
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) _exit(kReported + 1);
  _exit(kReported);
}

std::string where(const Fiber& f) {
  char text[200];
  const Position& p = f.position;
  snprintf(text, sizeof(text), "block (%u, %u, %u), thread (%u, %u, %u)", p.block.x, p.block.y, p.block.z, p.thread.x,
           p.thread.y, p.thread.z);
  return text;
}
std::string line_of(Site site) {
  if (!site.file) return "";
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}
[[noreturn]] void report_fiber(const Fiber* f, Site site, const std::string& message) {
  const std::string at = line_of(site);
  end_process("cuda_host: " + std::string(running.kernel) + (f ? ", " + where(*f) : "") +
              (at.empty() ? "" : ", " + at) + ": " + message + "\n");
}
std::string describe(const Gate& g) { return std::string(g.what) + " of the " + g.members + " at " + line_of(g.site); }

[[noreturn]] void report_deadlock(const std::vector<Fiber*>& stuck) {
  std::string text = "deadlock";
  const Gate* last = nullptr;
  int lines = 0;
  for (const Fiber* f : stuck) {
    if (f->waits == last || ++lines > 6) continue;
    last = f->waits;
    text += "\n  " + where(*f) + " waits with " + std::to_string(last->waiting.size() - 1) + " others of " +
            std::to_string(last->size) + " for the " + describe(*last);
  }
  report_fiber(nullptr, {}, text);
}

void out_of_time(int) {
  report_fiber(running.fiber, {}, "did not end within " + std::to_string(settings.seconds) + " s of processor time");
}

// ---- meetings -------------------------------------------------------------------------------------------------------
bool differ(const char* what, Site site, const Gate& gate) {
  return strcmp(what, gate.what) || site.line != gate.site.line || strcmp(site.file, gate.site.file);
}

void meet(Gate& gate, const char* what, Site site, bool orders_memory) {
  Fiber* self = running.fiber;
  if (gate.returned) {
    report_fiber(self, site,
                 std::string(what) + ": " + std::to_string(gate.returned) + " of the " + std::to_string(gate.size) +
                     " threads of the " + gate.members + " have returned");
  }
  if (!gate.waiting.empty() && differ(what, site, gate)) {
    report_fiber(self, site,
                 std::string("divergence: this thread came to a ") + what + " while " + where(*gate.waiting[0]) +
                     " waits for the " + describe(gate));
  }
  gate.what = what;
  gate.site = site;
  void* mine = &gate.synchronises[gate.generation % 2];
  if (orders_memory) release(mine);
  gate.waiting.push_back(self);
  self->waits = &gate;
  if (gate.waiting.size() == gate.size) {
    ++gate.generation;
    running.complete = &gate;
  }
  switch_to(self->context, running.scheduler);
  if (orders_memory) acquire(mine);
}

void depart(Gate& gate, const Fiber& f) {
  if (!gate.waiting.empty()) {
    report_fiber(&f, {}, "returned while " + where(*gate.waiting[0]) + " waits for the " + describe(gate));
  }
  ++gate.returned;
}

void run_fiber() {
#if defined(FN_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &running.scheduler.bottom, &running.scheduler.size);
#endif
  acquire(&running.begin);
  running.body(running.arguments);
  release(&running.end);
  running.fiber->done = true;
  switch_to(running.fiber->context, running.scheduler, true);
}

// ---- blocks come and go ---------------------------------------------------------------------------------------------
unsigned char* new_stack() {
  if (!running.stacks.empty()) {
    unsigned char* stack = running.stacks.back();
    running.stacks.pop_back();
    unpoison(stack, kStack);
    return stack;
  }
  void* memory =
      mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory) + kPage;
}

void start(Fiber& f, Block& block, unsigned thread) {
  const dim3 size = running.grid->block;
  f.block = &block;
  f.warp = &block.warps[thread / 32];
  f.thread = thread;
  f.position = {dim3(thread % size.x, thread / size.x % size.y, thread / size.x / size.y), block.index, size,
                running.grid->grid};
  f.stack = new_stack();
  f.context.bottom = f.stack;
  f.context.size = kStack;
  prepare(f.context, f.stack, run_fiber);
#if defined(FN_TSAN)
  if (running.tsan_fibers.empty()) running.tsan_fibers.push_back(__tsan_create_fiber(0));
  f.context.tsan = running.tsan_fibers.back();
  running.tsan_fibers.pop_back();
#endif
}

std::unique_ptr<Cluster> admit(uint64_t number) {
  const Grid& g = *running.grid;
  const unsigned threads = g.block.x * g.block.y * g.block.z;
  auto cluster = std::make_unique<Cluster>();
  cluster->gate.resize(threads * g.cluster);
  cluster->blocks.resize(g.cluster);
  const uint64_t rows = g.grid.y / g.cluster;
  const dim3 first(number % g.grid.x, number / g.grid.x % rows * g.cluster, number / g.grid.x / rows);
  // One thread, warp or block in each cluster of a random order may be starved.
  const uint64_t kind = draw() % 4, victim = draw();
  for (unsigned rank = 0; rank < g.cluster; ++rank) {
    Block& b = cluster->blocks[rank];
    b.cluster = cluster.get();
    b.rank = rank;
    b.index = dim3(first.x, first.y + rank, first.z);
    b.key = draw() >> 1;
    b.gate.resize(threads);
    b.warps.resize((threads + 31) / 32);
    for (Warp& w : b.warps) {
      w.gate.resize(32);
      w.key = draw() >> 1;
    }
    // 16 bytes beyond a multiple of 32: no more alignment than is promised.
    const size_t bytes = 2 * kRedZone + g.shared;
    if (posix_memalign(reinterpret_cast<void**>(&b.arena), 32, bytes + 16)) throw std::bad_alloc();
    b.arena += 16;
    memset(b.arena, kRed, bytes);
    memset(b.shared(), kUnset, g.shared);
    poison(b.arena, kRedZone);
    poison(b.shared() + g.shared, kRedZone);
    b.fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
      start(b.fibers[t], b, t);
      b.fibers[t].starved =
          kind < 3 && victim % g.cluster == rank &&
          (kind == 0 || (kind == 1 ? victim / 8 % b.warps.size() == t / 32 : victim / 8 % threads == t));
      make_ready(&b.fibers[t]);
    }
  }
  release(&running.begin);
  return cluster;
}

void end_block(Block& b, const Fiber& last) {
  for (const Block& other : b.cluster->blocks) {
    if (other.peers >> b.rank & 1u) {
      report_fiber(&last, {},
                   "block " + std::to_string(b.rank) +
                       " of the cluster ends, and no cluster_barrier has "
                       "followed the cluster_peer with which block " +
                       std::to_string(other.rank) + " reads it");
    }
  }
  const size_t bytes = running.grid->shared;
  unpoison(b.arena, bytes + 2 * kRedZone);
  for (size_t i = 0; i < kRedZone; ++i) {
    if (b.arena[i] != kRed) report_fiber(&last, {}, "shared memory was written before its start");
    if (b.shared()[bytes + i] != kRed) {
      report_fiber(&last, {}, "shared memory was written " + std::to_string(i) + " bytes beyond its end");
    }
  }
  if (!kTsan) memset(b.arena, kUnset, bytes + 2 * kRedZone);  // TSan would take it for a write that races
  poison(b.arena, bytes + 2 * kRedZone);
}

void free_cluster(std::unique_ptr<Cluster> cluster) {
  for (Block& b : cluster->blocks) {
    unpoison(b.arena, running.grid->shared + 2 * kRedZone);
    free(b.arena - 16);
  }
}

// Returns whether the whole cluster has ended.
bool retire(Fiber& f) {
  if (kTsan) running.old_tsan_fibers.push_back(f.context.tsan);
  (kTsan ? running.old_stacks : running.stacks).push_back(f.stack);
  depart(f.warp->gate, f);
  depart(f.block->gate, f);
  depart(f.block->cluster->gate, f);
  if (f.block->ended()) end_block(*f.block, f);
  return f.block->cluster->gate.returned == f.block->cluster->gate.size;
}

void check_launch(const Grid& g) {
  const unsigned threads = g.block.x * g.block.y * g.block.z;
  const auto refuse = [](const char* why, size_t value, size_t limit) {
    report_fiber(
        nullptr, {},
        std::string("launch: ") + why + ": " + std::to_string(value) + ", but the limit is " + std::to_string(limit));
  };
  if (threads == 0 || threads > unsigned(settings.max_threads)) refuse("threads", threads, settings.max_threads);
  if (g.shared > size_t(settings.max_shared)) refuse("bytes of shared memory", g.shared, settings.max_shared);
  if (g.cluster > unsigned(settings.max_cluster)) refuse("blocks of a cluster", g.cluster, settings.max_cluster);
  if (g.cluster > unsigned(settings.max_schedulable)) {
    refuse("blocks of a cluster that find room", g.cluster, settings.max_schedulable);
  }
  if (g.cluster == 0 || g.grid.y % g.cluster) refuse("grid.y is no multiple of the cluster", g.grid.y, g.cluster);
  if (g.grid.x == 0 || g.grid.x > 0x7fffffffu) refuse("grid.x", g.grid.x, 0x7fffffff);
  if (g.grid.y == 0 || g.grid.y > 65535) refuse("grid.y", g.grid.y, 65535);
  if (g.grid.z == 0 || g.grid.z > 65535) refuse("grid.z", g.grid.z, 65535);
}

template <class T>
void reuse(std::vector<T>& from, std::vector<T>& to) {
  to.insert(to.end(), from.begin(), from.end());
  from.clear();
}

void set_alarm(int seconds) {
  const itimerval time{{0, 0}, {seconds, 0}};
  signal(SIGVTALRM, out_of_time);
  setitimer(ITIMER_VIRTUAL, &time, nullptr);
}

}  // namespace

// ---- what kernels ask for -------------------------------------------------------------------------------------------
void block_barrier(Site site) { meet(running.fiber->block->gate, "barrier", site, true); }

void cluster_barrier(Site site) {
  Cluster& cluster = *running.fiber->block->cluster;
  if (cluster.gate.waiting.size() + 1 == cluster.gate.size) {
    for (Block& b : cluster.blocks) b.peers = 0;
  }
  meet(cluster.gate, "cluster_barrier", site, true);
}

// TSan sees memcpy even from here.
void copy(void* to, const void* from, size_t bytes) {
  volatile unsigned char* bytes_to = static_cast<unsigned char*>(to);
  for (size_t i = 0; i < bytes; ++i) bytes_to[i] = static_cast<const unsigned char*>(from)[i];
}

int lane() { return running.fiber->thread % 32; }

void exchange(const char* what, const void* mine, void* theirs, size_t bytes, int source, Site site) {
  Warp& warp = *running.fiber->warp;
  if (bytes > sizeof(warp.slots[0][0])) report(site, "%s: %zu bytes are more than a shuffle moves", what, bytes);
  if (source < 0 || source >= 32) report(site, "%s: no lane %d", what, source);
  auto& slots = warp.slots[warp.gate.generation % 2];
  copy(slots[lane()], mine, bytes);
  meet(warp.gate, what, site, false);
  copy(theirs, slots[source], bytes);
}

unsigned char* shared(size_t offset, Site site) {
  if (offset > running.grid->shared) report(site, "offset %zu is beyond the block's shared memory", offset);
  return running.fiber->block->shared() + offset;
}

unsigned cluster_rank() { return running.fiber->block->rank; }

const void* cluster_peer(const void* p, unsigned rank, Site site) {
  Block& b = *running.fiber->block;
  const size_t offset = static_cast<const unsigned char*>(p) - b.shared();
  if (offset > running.grid->shared) report(site, "cluster_peer: not an address in this block's shared memory");
  if (rank >= running.grid->cluster) report(site, "cluster_peer: no block %u in the cluster", rank);
  const Block& peer = b.cluster->blocks[rank];
  if (peer.ended()) report(site, "cluster_peer: block %u of the cluster has ended", rank);
  if (rank != b.rank) b.peers |= 1u << rank;
  return peer.shared() + offset;
}

void check_alignment(const void* p, size_t alignment, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    report(site, "access of %zu bytes at %p, which is no multiple of that", alignment, p);
  }
}

void report(Site site, const char* format, ...) {
  char text[300];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  report_fiber(running.fiber, site, text);
}

// ---- launches -------------------------------------------------------------------------------------------------------
void forget_memory() {}
void give_memory(const void*, size_t) {}

void run(const Kernel& kernel, const Grid& grid) {
  running.kernel = kernel.name;
  running.grid = &grid;
  running.body = kernel.body;
  running.arguments = kernel.bound;
  running.random = settings.seed;
  check_launch(grid);
  set_alarm(settings.seconds);
#if defined(FN_TSAN)
  running.scheduler.tsan = __tsan_get_current_fiber();
#endif

  const uint64_t count = uint64_t{grid.grid.x} * grid.grid.y * grid.grid.z / grid.cluster;
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = settings.order == Order::reverse ? count - 1 - i : i;
  for (uint64_t i = count; settings.order == Order::random && i > 1; --i) std::swap(order[i - 1], order[draw() % i]);

  std::vector<std::unique_ptr<Cluster>> resident;
  for (uint64_t next = 0; next < count || !resident.empty();) {
    while (next < count && (resident.empty() || (resident.size() + 1) * grid.cluster <= kResident)) {
      resident.push_back(admit(order[next++]));
    }
    if (running.ready.empty()) {
      std::vector<Fiber*> stuck;
      for (const auto& cluster : resident) {
        for (Block& b : cluster->blocks) {
          for (Fiber& f : b.fibers) {
            if (f.waits) stuck.push_back(&f);
          }
        }
      }
      report_deadlock(stuck);
    }
    Fiber* f = running.ready.top().second;
    running.ready.pop();
    running.fiber = f;
    here = &f->position;
    switch_to(running.scheduler, f->context);
    if (running.complete) {
      for (Fiber* f : running.complete->waiting) make_ready(f);
      running.complete->waiting.clear();
      running.complete = nullptr;
    }
    if (f->done && retire(*f)) {
      for (auto& cluster : resident) {
        if (cluster.get() != f->block->cluster) continue;
        if (kTsan) running.old_clusters.push_back(std::move(cluster));
        if (cluster) free_cluster(std::move(cluster));
        cluster = std::move(resident.back());
        resident.pop_back();
        break;
      }
    }
    running.fiber = nullptr;
    here = nullptr;
  }
  acquire(&running.end);
  reuse(running.old_tsan_fibers, running.tsan_fibers);
  reuse(running.old_stacks, running.stacks);
  for (auto& cluster : running.old_clusters) free_cluster(std::move(cluster));
  running.old_clusters.clear();
  set_alarm(0);
  launched.insert(kernel.name);
}

}  // namespace fusednorm::cuda::host

// All that the kernels ask of the hardware: storage types, packs, warps, shared memory, clusters, launches. The only
// file here with anything of CUDA's own in it beside `threadIdx`, `blockIdx`, `blockDim` and `gridDim`: the tests
// replace it by one of theirs and run the same kernels without a GPU (tests/cuda_host).
//
// What that asks of a kernel: shared memory only through shared_memory(); a shuffle or a barrier where every thread
// arrives; no return before a barrier; one writer per location.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <map>
#include <mutex>
#include <set>

#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define FN_DEVICE __device__ __forceinline__
#define FN_HOST_DEVICE __host__ __device__ __forceinline__
// A kernel for at most `threads` threads, of which `blocks` blocks should fit on a multiprocessor.
#define FN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace fusednorm::cuda {

// ---- types --------------------------------------------------------------------------------------------------------
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <class T>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <class T>
using opmath_t = typename OpMath<T>::type;

FN_DEVICE float widen(float v) { return v; }
FN_DEVICE double widen(double v) { return v; }
FN_DEVICE float widen(BFloat16 v) { return __bfloat162float(v); }
FN_DEVICE float widen(Float16 v) { return __half2float(v); }

// Rounds to nearest even.
template <class T>
FN_DEVICE T narrow(opmath_t<T> v) {
  return T(v);
}
template <>
FN_DEVICE BFloat16 narrow<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
FN_DEVICE Float16 narrow<Float16>(float v) {
  return __float2half_rn(v);
}

// V values that move in one access of V*sizeof(T) <= 16 bytes, from and to addresses that are multiples of that. Two
// 16-bit values share a register until they are used; as an array of T each would take one of its own.
template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  static constexpr bool paired = sizeof(T) == 2 && V > 1;
  using Word = std::conditional_t<paired, uint32_t, T>;
  Word word[V * sizeof(T) / sizeof(Word)];
};
template <int V, class T>
FN_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
FN_DEVICE void store(T* p, const Pack<T, V>& pack) {
  if constexpr (sizeof(pack) == 16) {  // under a condition nvcc would make four stores of it
    const uint4 v = *reinterpret_cast<const uint4*>(&pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  }
}

FN_DEVICE float half_of(uint32_t word, int half, BFloat16) {
  return __uint_as_float(half ? word & 0xffff0000u : word << 16);
}
FN_DEVICE float half_of(uint32_t word, int half, Float16) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(half ? word >> 16 : word & 0xffffu)));
}
FN_DEVICE uint32_t halves(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
FN_DEVICE uint32_t halves(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <class T, int V>
FN_DEVICE opmath_t<T> widen(const Pack<T, V>& pack, int v) {
  if constexpr (Pack<T, V>::paired) {
    return half_of(pack.word[v / 2], v % 2, T());
  } else {
    return widen(pack.word[v]);
  }
}
// From V values at v.
template <class T, int V>
FN_DEVICE Pack<T, V> narrow(const opmath_t<T>* v) {
  Pack<T, V> pack;
  if constexpr (Pack<T, V>::paired) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) pack.word[i] = halves(v[2 * i], v[2 * i + 1], T());
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.word[i] = narrow<T>(v[i]);
  }
  return pack;
}

// ---- a block ------------------------------------------------------------------------------------------------------
constexpr int kWarp = 32;

FN_DEVICE void barrier() { __syncthreads(); }

// Lane `source` of the calling warp gives its value; all 32 lanes must arrive.
template <class V>
FN_DEVICE V shuffle(V value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}
template <class V>
FN_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The block's dynamic shared memory from `offset` bytes on; it starts at a multiple of 16.
template <class T>
FN_DEVICE T* shared_memory(int offset = 0) {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes + offset);
}

// a / b to two units in the last place, for a b that is neither denormal nor huge: a division in full has a way for
// every b.
FN_DEVICE float ratio(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
FN_DEVICE double ratio(double a, double b) { return a / b; }

// v, which the compiler then keeps in a register instead of computing it anew in every round of a loop.
template <class V>
FN_DEVICE V kept(V v) {
  if constexpr (std::is_same_v<V, float>) {
    asm volatile("" : "+f"(v));
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("" : "+r"(v));
  }
  return v;
}

FN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

// ---- a cluster of blocks (compute capability 9.0 and up; elsewhere a kernel is launched without) ------------------
FN_DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// All threads of the cluster arrive; what they wrote to shared memory before is visible after. For a cluster of one it
// is the barrier of a block.
FN_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address in block `rank` of the cluster that corresponds to p in this one's shared memory. That block must not
// have ended: a cluster_barrier() stands between the last such read and the end of the kernel.
template <class T>
FN_DEVICE const T* cluster_peer(const T* p, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(p), "r"(rank));
  return reinterpret_cast<const T*>(peer);
#else
  return p;
#endif
}

// ---- kernels that follow each other (compute capability 9.0 and up) ------------------------------------------------
// A kernel that is launched early may start as soon as all blocks of the one in front have called
// next_grid_may_start(), which keeps them from waiting for its launch. What that kernel writes is there behind
// previous_grid_ends().
FN_DEVICE void next_grid_may_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
FN_DEVICE void previous_grid_ends() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- launches (host) ----------------------------------------------------------------------------------------------
struct Launch {
  dim3 grid, block;
  size_t shared;     // bytes of dynamic shared memory
  unsigned cluster;  // blocks of a cluster along grid.y; 1: none
  void* stream;      // cudaStream_t
  int most_shared;   // bytes that a block may ask for
  bool early;        // it may start before the kernel in front has ended: see previous_grid_ends()
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string("fusednorm: ") + what + ": " + cudaGetErrorString(error));
}

// Whether the code at hand was compiled for clusters: code of an older architecture also runs on a GPU that has them.
template <class Arguments>
bool compiled_for_clusters(void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

// A kernel's attributes are shared by all host threads, so always the same is asked for, once on each device: all
// shared memory that there is, and the L1 cache made small enough for two blocks with half of it each.
inline void allow_shared_memory(const char* name, const void* kernel, int bytes) {
  int device;
  check(cudaGetDevice(&device), name);
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), name);
  allowed.insert({device, kernel});
}

constexpr int kMostAttributes = 2;
template <class Arguments>
cudaLaunchConfig_t configure(const char* name, const Launch& at, void (*kernel)(Arguments),
                             cudaLaunchAttribute (&attributes)[kMostAttributes]) {
  if (at.shared > 48 * 1024) allow_shared_memory(name, reinterpret_cast<const void*>(kernel), at.most_shared);

  cudaLaunchConfig_t config{};
  config.gridDim = at.grid;
  config.blockDim = at.block;
  config.dynamicSmemBytes = at.shared;
  config.stream = static_cast<cudaStream_t>(at.stream);
  config.attrs = attributes;
  if (at.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {1, at.cluster, 1};
  }
  if (at.early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// Whether the GPU, or the part of it that this process has, can hold a cluster at all. Asked once for each kind of
// launch.
template <class Arguments>
bool can_hold(const char* name, const Launch& at, void (*kernel)(Arguments)) {
  if (at.cluster == 1) return true;
  int device;
  check(cudaGetDevice(&device), name);
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned, unsigned, size_t>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, unknown] = known.try_emplace(
      {device, reinterpret_cast<const void*>(kernel), at.cluster, at.block.x * at.block.y, at.shared}, false);
  if (unknown) {
    cudaLaunchAttribute attributes[kMostAttributes] = {};
    const cudaLaunchConfig_t config = configure(name, at, kernel, attributes);
    int clusters = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) cudaGetLastError();
    entry->second = error == cudaSuccess && clusters > 0;
  }
  return entry->second;
}

// Every kernel takes one struct by value.
template <class Arguments>
void launch(const char* name, const Launch& at, void (*kernel)(Arguments), const Arguments& arguments) {
  cudaLaunchAttribute attributes[kMostAttributes] = {};
  const cudaLaunchConfig_t config = configure(name, at, kernel, attributes);
  check(cudaLaunchKernelEx(&config, kernel, arguments), name);
}

}  // namespace fusednorm::cuda

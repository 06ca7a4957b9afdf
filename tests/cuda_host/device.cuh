// Stands in for csrc/cuda/device.cuh, which says what each name means: the same names on fibers of the CPU. Nothing of
// CUDA's own spelling is here (no __shared__, no __syncthreads, no <<<>>>), so that a kernel that uses it does not
// compile.
#pragma once

#include <math.h>
#include <string.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "scheduler.h"

#define FN_DEVICE inline
#define FN_HOST_DEVICE inline
#define FN_KERNEL(threads, blocks) typename ::fusednorm::cuda::host::Bounds<threads, blocks>::type
#define threadIdx (::fusednorm::cuda::host::here->thread)
#define blockIdx (::fusednorm::cuda::host::here->block)
#define blockDim (::fusednorm::cuda::host::here->block_size)
#define gridDim (::fusednorm::cuda::host::here->grid_size)
// As a default argument: the caller's line.
#define FN_SITE ::fusednorm::cuda::host::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace fusednorm::cuda {

namespace host {
template <int Threads, int Blocks>
struct Bounds {
  static_assert(Threads % 32 == 0 && Threads > 0 && Threads * Blocks <= 2048, "no multiprocessor has these threads");
  using type = void;
};
}  // namespace host

// ---- types ----------------------------------------------------------------------------------------------------------
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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

FN_DEVICE uint32_t to_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
FN_DEVICE float from_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

FN_DEVICE float widen(float v) { return v; }
FN_DEVICE double widen(double v) { return v; }
FN_DEVICE float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
FN_DEVICE float widen(Float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31u, mantissa = v.bits & 0x3ffu;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return from_bits(sign | to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Drops the low `shift` bits, to nearest even.
FN_DEVICE uint32_t round_off(uint32_t bits, int shift) {
  const uint32_t half = 1u << (shift - 1);
  return (bits + (half - 1) + (bits >> shift & 1u)) >> shift;
}

template <class T>
FN_DEVICE T narrow(opmath_t<T> v) {
  return T(v);
}
template <>
FN_DEVICE BFloat16 narrow<BFloat16>(float v) {
  return {static_cast<uint16_t>(v != v ? 0x7fffu : round_off(to_bits(v), 16))};
}
template <>
FN_DEVICE Float16 narrow<Float16>(float v) {
  const uint32_t sign = to_bits(v) >> 16 & 0x8000u, magnitude = to_bits(v) & 0x7fffffffu;
  uint32_t half = 0x7c00u;  // from 65520 on: infinity
  if (v != v) return {0x7fff};
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, and adding 1/2 rounds to those
    half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else if (magnitude < 0x477ff000u) {
    half = round_off(magnitude, 13) - (112u << 10);
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  static_assert(V * sizeof(T) <= 16, "no access is wider than 16 bytes");
  static constexpr bool paired = sizeof(T) == 2 && V > 1;
  using Word = std::conditional_t<paired, uint32_t, T>;
  Word word[V * sizeof(T) / sizeof(Word)];
};
template <int V, class T>
FN_DEVICE Pack<T, V> load(const T* p, FN_SITE) {
  host::check_alignment(p, V * sizeof(T), site);
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
FN_DEVICE void store(T* p, const Pack<T, V>& pack, FN_SITE) {
  host::check_alignment(p, V * sizeof(T), site);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}
template <class T, int V>
FN_DEVICE opmath_t<T> widen(const Pack<T, V>& pack, int v) {
  if constexpr (Pack<T, V>::paired) {
    return widen(T{static_cast<uint16_t>(pack.word[v / 2] >> 16 * (v % 2))});
  } else {
    return widen(pack.word[v]);
  }
}
template <class T, int V>
FN_DEVICE Pack<T, V> narrow(const opmath_t<T>* v) {
  Pack<T, V> pack{};
  for (int i = 0; i < V; ++i) {
    if constexpr (Pack<T, V>::paired) {
      pack.word[i / 2] |= static_cast<uint32_t>(narrow<T>(v[i]).bits) << 16 * (i % 2);
    } else {
      pack.word[i] = narrow<T>(v[i]);
    }
  }
  return pack;
}

// ---- a block --------------------------------------------------------------------------------------------------------
constexpr int kWarp = 32;

FN_DEVICE void barrier(FN_SITE) { host::block_barrier(site); }

template <class V>
FN_DEVICE V shuffle(V value, int source, FN_SITE) {
  V got;
  host::exchange("shuffle", &value, &got, sizeof(V), source & 31, site);  // modulo 32, as on a GPU
  return got;
}
template <class V>
FN_DEVICE V shuffle_xor(V value, int mask, FN_SITE) {
  V got;
  host::exchange("shuffle_xor", &value, &got, sizeof(V), host::lane() ^ mask, site);
  return got;
}

template <class T>
FN_DEVICE T* shared_memory(int offset = 0, FN_SITE) {
  return reinterpret_cast<T*>(host::shared(offset, site));
}

template <class V>
FN_DEVICE V kept(V v) {
  return v;
}
FN_DEVICE float ratio(float a, float b) { return a / b; }
FN_DEVICE double ratio(double a, double b) { return a / b; }

FN_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// ---- a cluster of blocks --------------------------------------------------------------------------------------------
FN_DEVICE unsigned cluster_rank() { return host::cluster_rank(); }
FN_DEVICE void cluster_barrier(FN_SITE) { host::cluster_barrier(site); }
template <class T>
FN_DEVICE const T* cluster_peer(const T* p, unsigned rank, FN_SITE) {
  return static_cast<const T*>(host::cluster_peer(p, rank, site));
}

// One kernel runs after the other, but each thread of one that is launched early has to wait.
FN_DEVICE void next_grid_may_start() {}
FN_DEVICE void previous_grid_ends() { ++host::waits; }

// ---- launches -------------------------------------------------------------------------------------------------------
struct Launch {
  dim3 grid, block;
  size_t shared;
  unsigned cluster;
  void* stream;
  int most_shared;
  bool early;
};

template <class Arguments>
bool compiled_for_clusters(void (*)(Arguments)) {
  return true;
}
template <class Arguments>
bool can_hold(const char*, const Launch& at, void (*)(Arguments)) {
  return static_cast<int>(at.cluster) <= host::settings.max_schedulable;
}

template <class Arguments>
void launch(const char* name, const Launch& at, void (*kernel)(Arguments), const Arguments& arguments) {
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 4096, "arguments are copied as bytes");
  struct Bound {
    void (*kernel)(Arguments);
    Arguments arguments;
  } bound{kernel, arguments};
  const auto body = [](const void* p) {
    const Bound* bound = static_cast<const Bound*>(p);
    bound->kernel(bound->arguments);
  };
  const void* function = reinterpret_cast<const void*>(kernel);
  host::waits = 0;
  host::run({name, body, &bound, function, &arguments, sizeof arguments}, {at.grid, at.block, at.shared, at.cluster});
  host::expect_waits(name, at.early);
}

}  // namespace fusednorm::cuda

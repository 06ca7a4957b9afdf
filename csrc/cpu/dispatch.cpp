// Chooses the kernels' instruction set at run time, and answers questions about it (hooks.h).
#include <ATen/Version.h>

#include <fstream>
#include <string>

#include "../math/noise.h"
#include "hooks.h"
#include "kernels.h"

namespace fusednorm::cpu {
namespace {

// torch's choice honours ATEN_CPU_CAPABILITY but does not check that override against the processor: we do.
const Kernels& choose() {
#if defined(__x86_64__)
  const std::string level = at::get_cpu_capability();
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == "AVX512" && avx512) return kernels_avx512;
  if ((level == "AVX512" || level == "AVX2") && avx2) return kernels_avx2;
#endif
  return kernels_default;
}

// Of the last level, as Linux tells for the first core: in a virtual machine sysconf tells that of the whole host.
int64_t cache_bytes() {
  int64_t kilobytes = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;
  return (kilobytes > 0 ? kilobytes : 32768) << 10;
}

}  // namespace

bool outgrows_caches(int64_t bytes, bool training) {
  static const int64_t cache = cache_bytes();
  return training ? bytes >= cache / 8 : 2 * bytes > cache;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fusednorm::cpu

const char* fusednorm_cpu_level() { return fusednorm::cpu::kernels().level; }

const char* fusednorm_cpu_levels_compiled() {
#if defined(__x86_64__)
  return "default,avx2,avx512";
#else
  return "default";
#endif
}

void fusednorm_philox4x32(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  using namespace fusednorm::math;
  uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  rounds == 10 ? philox4x32<10>(x, Seed{key[0], key[1]}) : philox4x32<7>(x, Seed{key[0], key[1]});
  for (int i = 0; i < 4; ++i) out[i] = x[i];
}

int fusednorm_philox4x32_lanes(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t* out) {
  return fusednorm::cpu::kernels().philox_lanes(rounds, counter, key, out);
}

// What _ops.so exports by plain C name, for those that look inside: `fusednorm/_hooks.py` and the tests. Defined in
// dispatch.cpp and, how it was built, in ../build_facts.cpp. Not an interface for users.
#pragma once

#include <stdint.h>

#define FUSEDNORM_HOOK extern "C" __attribute__((visibility("default")))

// The level in use: "default", "avx2" or "avx512".
FUSEDNORM_HOOK const char* fusednorm_cpu_level();

// The levels in this build, comma-separated.
FUSEDNORM_HOOK const char* fusednorm_cpu_levels_compiled();

// The compiler with its version, the C++ standard (17, 20, ...) and OpenMP's date, all as of this build.
FUSEDNORM_HOOK const char* fusednorm_compiler();
FUSEDNORM_HOOK int fusednorm_cxx_standard();
FUSEDNORM_HOOK int fusednorm_openmp();

// One draw of the scalar template. `rounds` is 7 or 10.
FUSEDNORM_HOOK void fusednorm_philox4x32(int rounds, const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

// The vector template at the level in use: lane i draws at counter word 0 + i and writes the four words out[4*i ...].
// Returns the number of lanes, at most 64, so `out` has room for 64 * 4 words. `rounds` is 7 or 10.
FUSEDNORM_HOOK int fusednorm_philox4x32_lanes(int rounds, const uint32_t counter[4], const uint32_t key[2],
                                              uint32_t* out);

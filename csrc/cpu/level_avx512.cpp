// The kernels for AVX-512 F, BW, DQ and VL. The features are those that torch checks for its own AVX-512 level.
#if defined(__x86_64__)
// The intrinsics header starts some results from an undefined register, and gcc 12 warns of that at every use.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "kernels_prelude.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx,avx2,fma,f16c,bmi,bmi2")
#define FN_LEVEL avx512
#define FN_LEVEL_NAME "avx512"
#define FN_LEVEL_TABLE kernels_avx512
#define FN_VECTOR_BYTES 64
#include "kernels_impl.h"
#pragma GCC pop_options
#endif

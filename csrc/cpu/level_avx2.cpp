// The kernels for AVX2 with FMA and F16C. The features are those that torch checks for its own AVX2 level.
#if defined(__x86_64__)
#include "kernels_prelude.h"

#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2")
#define FN_LEVEL avx2
#define FN_LEVEL_NAME "avx2"
#define FN_LEVEL_TABLE kernels_avx2
#define FN_VECTOR_BYTES 32
#include "kernels_impl.h"
#pragma GCC pop_options
#endif

// The kernels with the instructions that every processor has: SSE2 on x86-64, the compiler's own choice elsewhere.
#include "kernels_prelude.h"

#define FN_LEVEL baseline
#define FN_LEVEL_NAME "default"
#define FN_LEVEL_TABLE kernels_default
#define FN_VECTOR_BYTES 16
#include "kernels_impl.h"

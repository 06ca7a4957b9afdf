// All standard and intrinsics headers of the level files. They must come before the target pragma: a library function
// compiled with AVX-512 could replace the one that the rest of the program uses. For the same reason no torch header
// and no template with external linkage may appear here or in kernels_impl.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

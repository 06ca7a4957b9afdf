// What a CUDA build of _ops.so exports by plain C name, beside cpu/hooks.h. Not an interface for users.
#pragma once

#include "../cpu/hooks.h"

// Which kernels channels-first calls get from now on: 0 automatic, 1 streaming, 2 resident wherever it fits. For
// measuring. Returns what it was.
FUSEDNORM_HOOK int fusednorm_cuda_set_residency(int residency);

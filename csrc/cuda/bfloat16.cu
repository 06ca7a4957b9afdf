// The kernels and their launches for bfloat16.
#include "backend.cuh"

namespace fusednorm::cuda {

template void forward<BFloat16>(const Context&, const Call&, const Forward<BFloat16>&);
template void backward<BFloat16>(const Context&, const Call&, const Backward<BFloat16>&);
template void noise<BFloat16>(const Context&, const Call&, const BFloat16*, BFloat16*);

}  // namespace fusednorm::cuda

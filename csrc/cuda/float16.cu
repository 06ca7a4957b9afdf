// The kernels and their launches for float16.
#include "backend.cuh"

namespace fusednorm::cuda {

template void forward<Float16>(const Context&, const Call&, const Forward<Float16>&);
template void backward<Float16>(const Context&, const Call&, const Backward<Float16>&);
template void noise<Float16>(const Context&, const Call&, const Float16*, Float16*);

}  // namespace fusednorm::cuda

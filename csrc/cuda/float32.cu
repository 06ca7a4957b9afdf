// The kernels and their launches for float32.
#include "backend.cuh"

namespace fusednorm::cuda {

template void forward<float>(const Context&, const Call&, const Forward<float>&);
template void backward<float>(const Context&, const Call&, const Backward<float>&);
template void noise<float>(const Context&, const Call&, const float*, float*);

}  // namespace fusednorm::cuda

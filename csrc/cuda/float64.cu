// The kernels and their launches for float64.
#include "backend.cuh"

namespace fusednorm::cuda {

template void forward<double>(const Context&, const Call&, const Forward<double>&);
template void backward<double>(const Context&, const Call&, const Backward<double>&);
template void noise<double>(const Context&, const Call&, const double*, double*);

}  // namespace fusednorm::cuda

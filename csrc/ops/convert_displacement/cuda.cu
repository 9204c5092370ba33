#include "ops/convert_displacement/kernels.h"

namespace regkernels {

void convert_displacement_cuda(const Context& context, const Call& call) {
  convert_displacement(Cuda(context), call);
}
void convert_displacement_grad_cuda(const Context& context, const Call& call) {
  convert_displacement_grad(Cuda(context), call);
}

}  // namespace regkernels

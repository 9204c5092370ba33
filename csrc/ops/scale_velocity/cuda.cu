#include "ops/scale_velocity/kernels.h"

namespace regkernels {

void scale_velocity_cuda(const Context& context, const Call& call) {
  scale_velocity(Cuda(context), call);
}
void scale_velocity_grad_cuda(const Context& context, const Call& call) {
  scale_velocity_grad(Cuda(context), call);
}

}  // namespace regkernels

#include "ops/interpolate/kernels.h"

namespace regkernels {

void interpolate_cuda(const Context& context, const Call& call) {
  interpolate(Cuda(context), call);
}
void interpolate_grad_cuda(const Context& context, const Call& call) {
  interpolate_grad(Cuda(context), call);
}

}  // namespace regkernels

#include "ops/jacobian_determinant/kernels.h"

namespace regkernels {

void jacobian_determinant_cuda(const Context& context, const Call& call) {
  jacobian_determinant(Cuda(context), call);
}
void jacobian_determinant_grad_cuda(const Context& context, const Call& call) {
  jacobian_determinant_grad(Cuda(context), call);
}

}  // namespace regkernels

#include "ops/jacobian_determinant/kernels.h"

namespace regkernels {

void jacobian_determinant_cpu(const Context& context, const Call& call) {
  jacobian_determinant(Cpu(context), call);
}
void jacobian_determinant_grad_cpu(const Context& context, const Call& call) {
  jacobian_determinant_grad(Cpu(context), call);
}

}  // namespace regkernels

#include "ops/compose/kernels.h"

namespace regkernels {

void compose_cuda(const Context& context, const Call& call) { compose(Cuda(context), call); }
void compose_grad_cuda(const Context& context, const Call& call) {
  compose_grad(Cuda(context), call);
}

}  // namespace regkernels

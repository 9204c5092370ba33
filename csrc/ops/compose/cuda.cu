#include "ops/compose/kernels.h"

namespace regkernels {

void compose_cuda(const Context& context, const Call& call) {
  if (is_cubic(composition_mode(call))) return compose_cubic_cuda(context, call);
  compose<false>(Cuda(context), call);
}
void compose_grad_cuda(const Context& context, const Call& call) {
  if (is_cubic(composition_mode(call))) return compose_cubic_grad_cuda(context, call);
  compose_grad<false>(Cuda(context), call);
}

}  // namespace regkernels

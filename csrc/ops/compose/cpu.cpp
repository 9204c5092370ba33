#include "ops/compose/kernels.h"

namespace regkernels {

void compose_cpu(const Context& context, const Call& call) {
  if (is_cubic(composition_mode(call))) return compose_cubic_cpu(context, call);
  compose<false>(Cpu(context), call);
}
void compose_grad_cpu(const Context& context, const Call& call) {
  if (is_cubic(composition_mode(call))) return compose_cubic_grad_cpu(context, call);
  compose_grad<false>(Cpu(context), call);
}

}  // namespace regkernels

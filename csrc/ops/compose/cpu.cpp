#include "ops/compose/kernels.h"

namespace regkernels {

void compose_cpu(const Context& context, const Call& call) { compose(Cpu(context), call); }
void compose_grad_cpu(const Context& context, const Call& call) {
  compose_grad(Cpu(context), call);
}

}  // namespace regkernels

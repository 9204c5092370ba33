#include "ops/interpolate/kernels.h"

namespace regkernels {

void interpolate_cpu(const Context& context, const Call& call) { interpolate(Cpu(context), call); }
void interpolate_grad_cpu(const Context& context, const Call& call) {
  interpolate_grad(Cpu(context), call);
}

}  // namespace regkernels

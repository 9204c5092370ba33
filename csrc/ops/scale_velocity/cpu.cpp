#include "ops/scale_velocity/kernels.h"

namespace regkernels {

void scale_velocity_cpu(const Context& context, const Call& call) {
  scale_velocity(Cpu(context), call);
}
void scale_velocity_grad_cpu(const Context& context, const Call& call) {
  scale_velocity_grad(Cpu(context), call);
}

}  // namespace regkernels

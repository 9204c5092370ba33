#include "ops/convert_displacement/kernels.h"

namespace regkernels {

void convert_displacement_cpu(const Context& context, const Call& call) {
  convert_displacement(Cpu(context), call);
}
void convert_displacement_grad_cpu(const Context& context, const Call& call) {
  convert_displacement_grad(Cpu(context), call);
}

}  // namespace regkernels

#include "ops/invert_displacement/kernels.h"

namespace regkernels {

void invert_displacement_cpu(const Context& context, const Call& call) {
  invert_displacement(Cpu(context), call);
}

}  // namespace regkernels

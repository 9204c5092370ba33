#include "ops/invert_displacement/kernels.h"

namespace regkernels {

void invert_displacement_cuda(const Context& context, const Call& call) {
  invert_displacement(Cuda(context), call);
}

}  // namespace regkernels

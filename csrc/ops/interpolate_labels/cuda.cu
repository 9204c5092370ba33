#include "ops/interpolate_labels/kernels.h"

namespace regkernels {

void interpolate_labels_cuda(const Context& context, const Call& call) {
  interpolate_labels(Cuda(context), call);
}

}  // namespace regkernels

#include "ops/interpolate_labels/kernels.h"

namespace regkernels {

void interpolate_labels_cpu(const Context& context, const Call& call) {
  interpolate_labels(Cpu(context), call);
}

}  // namespace regkernels

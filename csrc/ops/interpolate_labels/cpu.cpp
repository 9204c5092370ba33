#include "ops/interpolate_labels/kernels.h"

namespace reg {

void interpolate_labels_cpu(const Context& context, const Call& call) {
  interpolate_labels(Cpu(context), call);
}

}  // namespace reg

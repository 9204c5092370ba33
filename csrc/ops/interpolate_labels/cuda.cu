#include "ops/interpolate_labels/kernels.h"

namespace reg {

void interpolate_labels_cuda(const Context& context, const Call& call) {
  interpolate_labels(Cuda(context), call);
}

}  // namespace reg

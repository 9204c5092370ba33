#include "ops/interpolate/kernels.h"

namespace regkernels {

void interpolate_cuda(const Context& context, const Call& call) {
  if (is_cubic(call.choice<Mode>("mode"))) return interpolate_cubic_cuda(context, call);
  interpolate<false>(Cuda(context), call);
}
void interpolate_grad_cuda(const Context& context, const Call& call) {
  if (is_cubic(call.choice<Mode>("mode"))) return interpolate_cubic_grad_cuda(context, call);
  interpolate_grad<false>(Cuda(context), call);
}

}  // namespace regkernels

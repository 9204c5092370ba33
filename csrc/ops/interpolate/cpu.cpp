#include "ops/interpolate/kernels.h"

namespace regkernels {

void interpolate_cpu(const Context& context, const Call& call) {
  if (is_cubic(call.choice<Mode>("mode"))) return interpolate_cubic_cpu(context, call);
  interpolate<false>(Cpu(context), call);
}
void interpolate_grad_cpu(const Context& context, const Call& call) {
  if (is_cubic(call.choice<Mode>("mode"))) return interpolate_cubic_grad_cpu(context, call);
  interpolate_grad<false>(Cpu(context), call);
}

}  // namespace regkernels

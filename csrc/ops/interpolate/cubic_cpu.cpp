#include "ops/interpolate/kernels.h"
#include "resample/cubic.h"
#include "resample/scatter_cubic.h"

namespace regkernels {

void interpolate_cubic_cpu(const Context& context, const Call& call) {
  interpolate<true>(Cpu(context), call);
}
void interpolate_cubic_grad_cpu(const Context& context, const Call& call) {
  interpolate_grad<true>(Cpu(context), call);
}

}  // namespace regkernels

#include "ops/compose/kernels.h"
#include "resample/cubic.h"
#include "resample/scatter_cubic.h"

namespace regkernels {

void compose_cubic_cpu(const Context& context, const Call& call) {
  compose<true>(Cpu(context), call);
}
void compose_cubic_grad_cpu(const Context& context, const Call& call) {
  compose_grad<true>(Cpu(context), call);
}

}  // namespace regkernels

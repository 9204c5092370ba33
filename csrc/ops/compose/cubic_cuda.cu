#include "ops/compose/kernels.h"
#include "resample/cubic.h"
#include "resample/cubic_tiles.h"
#include "resample/scatter_cubic.h"

namespace regkernels {

void compose_cubic_cuda(const Context& context, const Call& call) {
  compose<true>(Cuda(context), call);
}
void compose_cubic_grad_cuda(const Context& context, const Call& call) {
  compose_grad<true>(Cuda(context), call);
}

}  // namespace regkernels

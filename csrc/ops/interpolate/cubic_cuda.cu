#include "ops/interpolate/kernels.h"
#include "resample/cubic.h"
#include "resample/cubic_tiles.h"
#include "resample/scatter_cubic.h"

namespace regkernels {

void interpolate_cubic_cuda(const Context& context, const Call& call) {
  interpolate<true>(Cuda(context), call);
}
void interpolate_cubic_grad_cuda(const Context& context, const Call& call) {
  interpolate_grad<true>(Cuda(context), call);
}

}  // namespace regkernels

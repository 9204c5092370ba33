#include "ops/affine_warp/kernels.h"

namespace regkernels {

void affine_warp_cuda(const Context& context, const Call& call) {
  affine_warp(Cuda(context), call);
}
void affine_warp_grad_cuda(const Context& context, const Call& call) {
  affine_warp_grad(Cuda(context), call);
}

}  // namespace regkernels

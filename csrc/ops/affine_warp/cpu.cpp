#include "ops/affine_warp/kernels.h"

namespace regkernels {

void affine_warp_cpu(const Context& context, const Call& call) { affine_warp(Cpu(context), call); }
void affine_warp_grad_cpu(const Context& context, const Call& call) {
  affine_warp_grad(Cpu(context), call);
}

}  // namespace regkernels

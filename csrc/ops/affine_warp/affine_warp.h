// affine_warp: A x + u, an affine and a displacement as one field of coordinates, and its
// gradients.
#pragma once

#include "core/op.h"

namespace regkernels {

void affine_warp_cpu(const Context& context, const Call& call);
void affine_warp_cuda(const Context& context, const Call& call);
void affine_warp_grad_cpu(const Context& context, const Call& call);
void affine_warp_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

// jacobian_determinant: of x + u(x) in voxel units, by central differences, and its gradient.
#pragma once

#include "core/op.h"

namespace regkernels {

void jacobian_determinant_cpu(const Context& context, const Call& call);
void jacobian_determinant_cuda(const Context& context, const Call& call);
void jacobian_determinant_grad_cpu(const Context& context, const Call& call);
void jacobian_determinant_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

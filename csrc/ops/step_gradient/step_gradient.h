// step_gradient: the gradient of a loss with respect to a small displacement that a warp is
// composed with, from that with respect to the moved image: smooth, as a step of a registration
// wants it.
#pragma once

#include "core/op.h"

namespace regkernels {

void step_gradient_cpu(const Context& context, const Call& call);
void step_gradient_cuda(const Context& context, const Call& call);

}  // namespace regkernels

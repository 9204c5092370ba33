// compose: v + u(A x + v), the displacement of one warp after another, and its gradients.
#pragma once

#include "core/op.h"

namespace regkernels {

void compose_cpu(const Context& context, const Call& call);
void compose_cuda(const Context& context, const Call& call);
void compose_grad_cpu(const Context& context, const Call& call);
void compose_grad_cuda(const Context& context, const Call& call);

// The same where the mode is a cubic one, for these to call.
void compose_cubic_cpu(const Context& context, const Call& call);
void compose_cubic_cuda(const Context& context, const Call& call);
void compose_cubic_grad_cpu(const Context& context, const Call& call);
void compose_cubic_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

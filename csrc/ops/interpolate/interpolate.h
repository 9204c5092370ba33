// interpolate: an image sampled at A x + u, A (x + u) or v, and its gradients.
#pragma once

#include "core/op.h"

namespace regkernels {

void interpolate_cpu(const Context& context, const Call& call);
void interpolate_cuda(const Context& context, const Call& call);
void interpolate_grad_cpu(const Context& context, const Call& call);
void interpolate_grad_cuda(const Context& context, const Call& call);

// The same where the mode is a cubic one, for these to call.
void interpolate_cubic_cpu(const Context& context, const Call& call);
void interpolate_cubic_cuda(const Context& context, const Call& call);
void interpolate_cubic_grad_cpu(const Context& context, const Call& call);
void interpolate_cubic_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

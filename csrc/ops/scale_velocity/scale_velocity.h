// scale_velocity: v / 2^n, the small step that scaling and squaring starts from.
#pragma once

#include "core/op.h"

namespace regkernels {

void scale_velocity_cpu(const Context& context, const Call& call);
void scale_velocity_cuda(const Context& context, const Call& call);
void scale_velocity_grad_cpu(const Context& context, const Call& call);
void scale_velocity_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

// invert_displacement: e with e(y) + u(y + e(y)) = 0.
#pragma once

#include "core/op.h"

namespace regkernels {

void invert_displacement_cpu(const Context& context, const Call& call);
void invert_displacement_cuda(const Context& context, const Call& call);

}  // namespace regkernels

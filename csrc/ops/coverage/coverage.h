// coverage: how far an image covers the places where it is sampled, between 0 and 1.
#pragma once

#include "core/op.h"

namespace regkernels {

void coverage_cpu(const Context& context, const Call& call);
void coverage_cuda(const Context& context, const Call& call);

}  // namespace regkernels

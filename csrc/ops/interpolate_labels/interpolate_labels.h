// interpolate_labels: the label with the largest weight around A x + u, A (x + u) or v.
#pragma once

#include "core/op.h"

namespace regkernels {

void interpolate_labels_cpu(const Context& context, const Call& call);
void interpolate_labels_cuda(const Context& context, const Call& call);

}  // namespace regkernels

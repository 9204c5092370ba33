// field_energy: how rough a displacement field is, by one of several measures, and its gradient.
#pragma once

#include "core/op.h"

namespace regkernels {

void field_energy_cpu(const Context& context, const Call& call);
void field_energy_cuda(const Context& context, const Call& call);
void field_energy_grad_cpu(const Context& context, const Call& call);
void field_energy_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

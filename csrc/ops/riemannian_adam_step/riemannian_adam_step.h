// riemannian_adam_step: Adam's direction for a gradient of a field, as a displacement to compose
// with, none of whose vectors is longer than half a voxel times the learning rate.
#pragma once

#include "core/op.h"

namespace regkernels {

void riemannian_adam_step_cpu(const Context& context, const Call& call);
void riemannian_adam_step_cuda(const Context& context, const Call& call);

// Its two passes. Devices that each have a part of a volume combine what the first one finds.
void adam_moments_cpu(const Context& context, const Call& call);
void adam_moments_cuda(const Context& context, const Call& call);
void adam_step_of_longest_cpu(const Context& context, const Call& call);
void adam_step_of_longest_cuda(const Context& context, const Call& call);

}  // namespace regkernels

// convert_displacement: a field in another unit (normalised, voxel, mm), components last or first.
#pragma once

#include "core/op.h"

namespace regkernels {

void convert_displacement_cpu(const Context& context, const Call& call);
void convert_displacement_cuda(const Context& context, const Call& call);
void convert_displacement_grad_cpu(const Context& context, const Call& call);
void convert_displacement_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

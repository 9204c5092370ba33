// gaussian_smooth: a separable Gaussian, sampled at integers and normalised; zero outside.
#pragma once

#include "core/op.h"

namespace regkernels {

void gaussian_smooth_cpu(const Context& context, const Call& call);
void gaussian_smooth_cuda(const Context& context, const Call& call);
void gaussian_smooth_grad_cpu(const Context& context, const Call& call);
void gaussian_smooth_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

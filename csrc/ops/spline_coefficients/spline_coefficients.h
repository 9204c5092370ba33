// spline_coefficients: those of the cubic B-spline through all values of an array, and the
// gradient.
#pragma once

#include "core/op.h"

namespace regkernels {

void spline_coefficients_cpu(const Context& context, const Call& call);
void spline_coefficients_cuda(const Context& context, const Call& call);
void spline_coefficients_grad_cpu(const Context& context, const Call& call);
void spline_coefficients_grad_cuda(const Context& context, const Call& call);

}  // namespace regkernels

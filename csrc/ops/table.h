// Each op's folder offers its entries of the table: the op and, where there is one, its gradient.
#pragma once

#include <vector>

#include "core/op.h"

namespace regkernels {

std::vector<Op> interpolate_ops();
std::vector<Op> compose_ops();
std::vector<Op> spline_coefficients_ops();
std::vector<Op> affine_warp_ops();
std::vector<Op> coverage_ops();
std::vector<Op> scale_velocity_ops();
std::vector<Op> gaussian_smooth_ops();
std::vector<Op> jacobian_determinant_ops();
std::vector<Op> convert_displacement_ops();
std::vector<Op> field_energy_ops();
std::vector<Op> lncc_loss_ops();
std::vector<Op> mutual_information_ops();
std::vector<Op> mind_ssc_ops();
std::vector<Op> interpolate_labels_ops();
std::vector<Op> invert_displacement_ops();
std::vector<Op> riemannian_adam_step_ops();
std::vector<Op> step_gradient_ops();

}  // namespace regkernels

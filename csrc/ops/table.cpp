// The op table: one line per op.
#include "ops/table.h"

#include <iterator>

namespace regkernels {

const std::vector<Op>& op_table() {
  static const std::vector<Op> table = [] {
    std::vector<Op> all;
    auto add = [&all](std::vector<Op> ops) {
      all.insert(all.end(), std::make_move_iterator(ops.begin()),
                 std::make_move_iterator(ops.end()));
    };
    add(interpolate_ops());
    add(compose_ops());
    add(spline_coefficients_ops());
    add(affine_warp_ops());
    add(coverage_ops());
    add(scale_velocity_ops());
    add(gaussian_smooth_ops());
    add(jacobian_determinant_ops());
    add(convert_displacement_ops());
    add(field_energy_ops());
    add(lncc_loss_ops());
    add(mutual_information_ops());
    add(mind_ssc_ops());
    add(interpolate_labels_ops());
    add(invert_displacement_ops());
    add(riemannian_adam_step_ops());
    add(step_gradient_ops());
    return all;
  }();
  return table;
}

}  // namespace regkernels

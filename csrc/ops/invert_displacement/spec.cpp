#include <cmath>

#include "ops/invert_displacement/call.h"
#include "ops/invert_displacement/invert_displacement.h"
#include "ops/table.h"

namespace regkernels {

namespace {

constexpr int64_t kMostIterations = 10000;

void infer(Call& call) {
  InvertDisplacementCall checked;
  checked.dtype = check_dtypes(call);
  const int D = checked.dimensions = check_field(call, "displacement");
  const Tensor& initial = call.input("initial");
  checked.in_sizes = checked.sizes = field_sizes(call.input("displacement"));
  if (call.slab.present()) checked.sizes = field_sizes(initial);
  const Sizes& sizes = checked.sizes;
  if (initial.present && (check_field(call, "initial") != D || !(field_sizes(initial) == sizes))) {
    fail_shape(call, "initial", "with the spatial axes of displacement");
  }
  const double tolerance = call.number("tolerance");
  if (!(tolerance >= 0 && std::isfinite(tolerance))) {
    fail_value(call, "tolerance", "a finite number of voxels of at least 0", concat(tolerance));
  }
  const int64_t max_iterations = call.integer("max_iterations");
  if (max_iterations < 1 || max_iterations > kMostIterations) {
    fail_value(call, "max_iterations", concat("an integer from 1 to ", kMostIterations),
               std::to_string(max_iterations));
  }
  checked.batch = check_batch(call);
  Shape shape = {checked.batch.groups, checked.batch.items};
  append_sizes(shape, sizes, D);
  if (call.wants("residual")) call.set("residual", tensor_spec(DType::kFloat32, shape));
  shape.append(D);
  call.set("output", tensor_spec(checked.dtype, shape));
  call.keep(checked);
}

}  // namespace

std::vector<Op> invert_displacement_ops() {
  return {
      {"invert_displacement",
       nullptr,
       {{"displacement"}, {"initial", true}},
       {{"output"}, {"residual"}},
       {{"tolerance", AttrKind::kFloat},
        {"max_iterations", AttrKind::kInt},
        {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
        {"align_corners", AttrKind::kBool}},
       infer,
       invert_displacement_cpu,
       REGKERNELS_CUDA_LAUNCH(invert_displacement_cuda),
       true},
  };
}

}  // namespace regkernels

#include <cmath>

#include "core/check.h"
#include "ops/invert_displacement/invert_displacement.h"
#include "ops/table.h"

namespace regkernels {

namespace {

constexpr int64_t kMostIterations = 10000;

enum Output { kInverse, kResidual };

void infer(Call& call) {
  const DType dtype = check_dtypes(call);
  const int D = check_field(call, "displacement");
  const Tensor& displacement = call.input("displacement");
  const Tensor& initial = call.input("initial");
  const Sizes sizes = field_sizes(displacement);
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
  const Batch batch = check_batch(call);
  Shape shape = {batch.groups, batch.items};
  append_sizes(shape, sizes, D);
  if (call.wants(kResidual)) call.outputs[kResidual] = tensor_spec(DType::kFloat32, shape);
  shape.append(D);
  call.outputs[kInverse] = tensor_spec(dtype, shape);
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
       REGKERNELS_CUDA_LAUNCH(invert_displacement_cuda)},
  };
}

}  // namespace regkernels

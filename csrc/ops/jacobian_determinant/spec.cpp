#include "core/check.h"
#include "ops/jacobian_determinant/jacobian_determinant.h"
#include "ops/table.h"

namespace regkernels {

namespace {

Shape output_shape(const Call& call, DType* dtype) {
  *dtype = check_dtypes(call);
  const int dimensions = check_field(call, "displacement");
  const Tensor& field = call.input("displacement");
  const Batch batch = check_batch(call);
  Shape shape = {batch.groups, batch.items};
  append_sizes(shape, field_sizes(field), dimensions);
  return shape;
}

void infer(Call& call) {
  DType dtype;
  const Shape shape = output_shape(call, &dtype);
  call.outputs[0] = tensor_spec(dtype, shape);
}

void infer_grad(Call& call) {
  DType dtype;
  const Shape shape = output_shape(call, &dtype);
  check_cotangent(call, "grad_output", dtype, shape);
  call.outputs[0] = gradient_spec(call.input("displacement"), check_batch(call));
}

}  // namespace

std::vector<Op> jacobian_determinant_ops() {
  const std::vector<AttrSpec> attributes = {{"align_corners", AttrKind::kBool}};
  return {
      {"jacobian_determinant",
       "jacobian_determinant_grad",
       {{"displacement"}},
       {{"output"}},
       attributes,
       infer,
       jacobian_determinant_cpu,
       REGKERNELS_CUDA_LAUNCH(jacobian_determinant_cuda)},
      {"jacobian_determinant_grad",
       nullptr,
       {{"displacement"}, {"grad_output"}},
       {{"grad_displacement"}},
       attributes,
       infer_grad,
       jacobian_determinant_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(jacobian_determinant_grad_cuda)},
  };
}

}  // namespace regkernels

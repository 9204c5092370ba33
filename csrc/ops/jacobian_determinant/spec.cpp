#include "ops/jacobian_determinant/call.h"
#include "ops/jacobian_determinant/jacobian_determinant.h"
#include "ops/table.h"

namespace regkernels {

namespace {

const JacobianDeterminantCall& check(Call& call) {
  JacobianDeterminantCall checked;
  checked.dtype = check_dtypes(call);
  checked.dimensions = check_field(call, "displacement");
  checked.sizes = field_sizes(call.input("displacement"));
  checked.batch = check_batch(call);
  checked.output = {checked.batch.groups, checked.batch.items};
  append_sizes(checked.output, checked.sizes, checked.dimensions);
  return call.keep(checked);
}

void infer(Call& call) {
  const auto& checked = check(call);
  call.set("output", tensor_spec(checked.dtype, checked.output));
}

void infer_grad(Call& call) {
  const auto& checked = check(call);
  check_cotangent(call, "grad_output", checked.dtype, checked.output);
  call.set("grad_displacement", gradient_spec(call.input("displacement"), checked.batch));
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

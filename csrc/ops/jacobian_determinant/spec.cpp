#include "ops/jacobian_determinant/call.h"
#include "ops/jacobian_determinant/jacobian_determinant.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// A slab comes with `halo` planes of the displacement beyond each end, as far as differences reach.
const JacobianDeterminantCall& check(Call& call, int64_t halo) {
  JacobianDeterminantCall checked;
  checked.dtype = check_dtypes(call);
  checked.dimensions = check_field(call, "displacement");
  checked.sizes = field_sizes(call.input("displacement"));
  if (call.slab.present()) checked.sizes.z -= 2 * halo;
  checked.batch = check_batch(call);
  checked.output = {checked.batch.groups, checked.batch.items};
  append_sizes(checked.output, checked.sizes, checked.dimensions);
  return call.keep(checked);
}

void infer(Call& call) {
  const auto& checked = check(call, 1);
  call.set("output", tensor_spec(checked.dtype, checked.output));
}

void infer_grad(Call& call) {
  const auto& checked = check(call, 2);
  Shape cotangent = checked.output;
  Tensor gradient = gradient_spec(call.input("displacement"), checked.batch);
  if (call.slab.present()) {
    cotangent[2] += 2;
    gradient.shape[2] = checked.sizes.z;
  }
  check_cotangent(call, "grad_output", checked.dtype, cotangent);
  call.set("grad_displacement", gradient);
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
       REGKERNELS_CUDA_LAUNCH(jacobian_determinant_cuda),
       true},
      {"jacobian_determinant_grad",
       nullptr,
       {{"displacement"}, {"grad_output"}},
       {{"grad_displacement"}},
       attributes,
       infer_grad,
       jacobian_determinant_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(jacobian_determinant_grad_cuda),
       true},
  };
}

}  // namespace regkernels

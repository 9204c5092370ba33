#include "core/reduce.h"
#include "ops/affine_warp/affine_warp.h"
#include "ops/affine_warp/call.h"
#include "ops/table.h"

namespace regkernels {

AffineWarpCall check_affine_warp(const Call& call) {
  AffineWarpCall checked;
  checked.dtype = check_dtypes(call);
  checked.dimensions = check_field(call, "displacement", EmptyField::kAllowed);
  check_affine(call, "affine", checked.dimensions);
  checked.sizes = field_sizes(call.input("displacement"));
  checked.batch = check_batch(call);
  checked.output = {checked.batch.groups, checked.batch.items};
  append_sizes(checked.output, checked.sizes, checked.dimensions);
  checked.output.append(checked.dimensions);
  return checked;
}

namespace {

void infer(Call& call) {
  const auto& checked = call.keep(check_affine_warp(call));
  call.set("output", tensor_spec(checked.dtype, checked.output));
}

void infer_grad(Call& call) {
  const auto& checked = call.keep(check_affine_warp(call));
  check_cotangent(call, "grad_output", checked.dtype, checked.output);
  const int D = checked.dimensions;
  if (call.wants("grad_affine")) {
    call.set("grad_affine", gradient_spec(call.input("affine"), checked.batch));
    call.set("partial_sums",
             partial_sums_spec(checked.dtype, checked.batch, checked.sizes, D * (D + 1)));
  }
  if (call.wants("grad_displacement")) {
    call.set("grad_displacement", gradient_spec(call.input("displacement"), checked.batch));
  }
}

}  // namespace

std::vector<Op> affine_warp_ops() {
  const std::vector<AttrSpec> attributes = {{"align_corners", AttrKind::kBool}};
  return {
      {"affine_warp",
       "affine_warp_grad",
       {{"affine"}, {"displacement"}},
       {{"output"}},
       attributes,
       infer,
       affine_warp_cpu,
       REGKERNELS_CUDA_LAUNCH(affine_warp_cuda),
       true},
      {"affine_warp_grad",
       nullptr,
       {{"affine"}, {"displacement"}, {"grad_output"}},
       {{"grad_affine"}, {"grad_displacement"}, {"partial_sums", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       affine_warp_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(affine_warp_grad_cuda),
       true},
  };
}

}  // namespace regkernels

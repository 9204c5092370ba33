#include "core/check.h"
#include "core/reduce.h"
#include "ops/affine_warp/affine_warp.h"
#include "ops/affine_warp/geometry.h"
#include "ops/table.h"

namespace regkernels {

AffineWarpGeometry affine_warp_geometry(const Call& call) {
  AffineWarpGeometry geometry;
  geometry.dtype = check_dtypes(call);
  geometry.dimensions = check_field(call, "displacement");
  check_affine(call, "affine", geometry.dimensions);
  geometry.sizes = field_sizes(call.input("displacement"));
  geometry.batch = check_batch(call);
  geometry.output = {geometry.batch.groups, geometry.batch.items};
  append_sizes(geometry.output, geometry.sizes, geometry.dimensions);
  geometry.output.append(geometry.dimensions);
  return geometry;
}

namespace {

void infer(Call& call) {
  const AffineWarpGeometry geometry = affine_warp_geometry(call);
  call.outputs[0] = tensor_spec(geometry.dtype, geometry.output);
}

enum GradOutput { kGradAffine, kGradDisplacement, kPartialSums };

void infer_grad(Call& call) {
  const AffineWarpGeometry geometry = affine_warp_geometry(call);
  check_cotangent(call, "grad_output", geometry.dtype, geometry.output);
  const int D = geometry.dimensions;
  if (call.wants(kGradAffine)) {
    call.outputs[kGradAffine] = gradient_spec(call.input("affine"), geometry.batch);
    call.outputs[kPartialSums] =
        partial_sums_spec(geometry.dtype, geometry.batch, geometry.sizes, D * (D + 1));
  }
  if (call.wants(kGradDisplacement)) {
    call.outputs[kGradDisplacement] = gradient_spec(call.input("displacement"), geometry.batch);
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
       REGKERNELS_CUDA_LAUNCH(affine_warp_cuda)},
      {"affine_warp_grad",
       nullptr,
       {{"affine"}, {"displacement"}, {"grad_output"}},
       {{"grad_affine"}, {"grad_displacement"}, {"partial_sums", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       affine_warp_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(affine_warp_grad_cuda)},
  };
}

}  // namespace regkernels

#include "core/check.h"
#include "core/reduce.h"
#include "ops/compose/compose.h"
#include "ops/compose/geometry.h"
#include "ops/table.h"

namespace regkernels {

ComposeGeometry compose_geometry(const Call& call) {
  const Tensor& u = call.input("u");
  const Tensor& v = call.input("v");
  ComposeGeometry geometry;
  geometry.dtype = check_dtypes(call);
  const int D = geometry.dimensions = check_field(call, "u");
  if (check_field(call, "v") != D) {
    fail_shape(
        call, "v",
        D == 3 ? "(N, Z, Y, X, 3), as u has 3 components" : "(N, Y, X, 2), as u has 2 components");
  }
  if (call.input("affine").present) check_affine(call, "affine", D);
  geometry.in_sizes = field_sizes(u);
  geometry.out_sizes = field_sizes(v);
  geometry.batch = check_batch(call);
  geometry.output = {geometry.batch.groups, geometry.batch.items};
  append_sizes(geometry.output, geometry.out_sizes, D);
  geometry.output.append(D);
  return geometry;
}

namespace {

void infer(Call& call) {
  const ComposeGeometry geometry = compose_geometry(call);
  call.outputs[0] = tensor_spec(geometry.dtype, geometry.output);
}

enum GradOutput { kGradU, kGradV, kGradAffine, kRowBounds, kFixedSums, kLargest, kPartialSums };

void infer_grad(Call& call) {
  const ComposeGeometry geometry = compose_geometry(call);
  check_cotangent(call, "grad_output", geometry.dtype, geometry.output);
  const int D = geometry.dimensions;
  if (call.wants(kGradU)) {
    call.outputs[kGradU] = gradient_spec(call.input("u"), geometry.batch);
    call.outputs[kRowBounds] = tensor_spec(
        DType::kInt32, {geometry.batch.groups, geometry.batch.items, geometry.out_sizes.rows(), 2});
    if (call.flag("deterministic")) {
      const Shape& shape = call.outputs[kGradU].shape;
      call.outputs[kFixedSums] = tensor_spec(DType::kInt64, shape);
      call.outputs[kLargest] = tensor_spec(DType::kInt64, {shape[0], shape[1]});
    }
  }
  if (call.wants(kGradV)) {
    call.outputs[kGradV] = gradient_spec(call.input("v"), geometry.batch);
  }
  if (call.wants(kGradAffine) && call.input("affine").present) {
    call.outputs[kGradAffine] = gradient_spec(call.input("affine"), geometry.batch);
    call.outputs[kPartialSums] =
        partial_sums_spec(geometry.dtype, geometry.batch, geometry.out_sizes, D * (D + 1));
  }
}

}  // namespace

std::vector<Op> compose_ops() {
  const std::vector<AttrSpec> attributes = {
      {"add", AttrKind::kBool},
      {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
      {"align_corners", AttrKind::kBool},
      {"deterministic", AttrKind::kBool},
  };
  return {
      {"compose",
       "compose_grad",
       {{"u"}, {"v"}, {"affine", true}},
       {{"output"}},
       attributes,
       infer,
       compose_cpu,
       REGKERNELS_CUDA_LAUNCH(compose_cuda)},
      {"compose_grad",
       nullptr,
       {{"u"}, {"v"}, {"affine", true}, {"grad_output"}},
       {{"grad_u"},
        {"grad_v"},
        {"grad_affine"},
        {"row_bounds", OutputRole::kWorkspace},
        {"fixed_sums", OutputRole::kWorkspace},
        {"largest", OutputRole::kWorkspace},
        {"partial_sums", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       compose_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(compose_grad_cuda)},
  };
}

}  // namespace regkernels

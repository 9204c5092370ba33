#include "core/check.h"
#include "core/reduce.h"
#include "ops/interpolate/geometry.h"
#include "ops/interpolate/interpolate.h"
#include "ops/table.h"

namespace regkernels {

InterpolateGeometry interpolate_geometry(const Call& call, const char* sampled) {
  const Tensor& image = call.input(sampled);
  const Tensor& affine = call.input("affine");
  const Tensor& grid = call.input("grid");
  InterpolateGeometry geometry;
  geometry.arithmetic = check_dtypes(call);
  geometry.storage = image.dtype;
  geometry.dimensions = check_image(call, sampled);
  const int D = geometry.dimensions;
  geometry.in_sizes = geometry.out_sizes = image_sizes(image);
  if (affine.present) check_affine(call, "affine", D);
  if (grid.present && check_field(call, "grid") != D) {
    fail_shape(call, "grid",
               concat(D == 3 ? "(N, Z, Y, X, 3)" : "(N, Y, X, 2)", ", as ", sampled, " has ", D,
                      " spatial axes"));
  }
  if (!grid.present && !call.flag("is_displacement")) {
    fail_value(call, "grid", "a field of coordinates, as is_displacement is False", "None");
  }

  const std::vector<int64_t>& out_shape = call.integers("out_shape");
  if (grid.present) geometry.out_sizes = field_sizes(grid);
  if (!out_shape.empty()) {
    const size_t count = out_shape.size();
    std::string got = "(";
    for (size_t i = 0; i < count; ++i) got += (i ? ", " : "") + std::to_string(out_shape[i]);
    got += ")";
    if (count < static_cast<size_t>(D)) {
      fail_value(call, "out_shape", concat("at least ", D, " sizes"), got);
    }
    Sizes sizes;
    sizes.x = out_shape[count - 1];
    sizes.y = out_shape[count - 2];
    if (D == 3) sizes.z = out_shape[count - 3];
    if (sizes.x < 1 || sizes.y < 1 || sizes.z < 1) {
      fail_value(call, "out_shape", "spatial sizes of at least 1", got);
    }
    check_sizes(call, "out_shape", sizes);
    if (grid.present && !(sizes == geometry.out_sizes)) {
      fail_value(call, "out_shape", "the spatial sizes of grid", got);
    }
    geometry.out_sizes = sizes;
  }

  geometry.batch = check_batch(call);
  geometry.output = {geometry.batch.groups, geometry.batch.items, image.shape[2]};
  append_sizes(geometry.output, geometry.out_sizes, D);
  return geometry;
}

namespace {

void infer(Call& call) {
  const InterpolateGeometry geometry = interpolate_geometry(call);
  call.outputs[0] = tensor_spec(geometry.storage, geometry.output);
}

enum GradOutput {
  kGradImage,
  kGradAffine,
  kGradGrid,
  kImageSums,
  kRowBounds,
  kFixedSums,
  kLargest,
  kPartialSums
};

void infer_grad(Call& call) {
  const InterpolateGeometry geometry = interpolate_geometry(call);
  check_cotangent(call, "grad_output", geometry.storage, geometry.output);
  const int D = geometry.dimensions;
  if (call.wants(kGradImage)) {
    call.outputs[kGradImage] = gradient_spec(call.input("image"), geometry.batch);
    if (geometry.storage != geometry.arithmetic) {
      call.outputs[kImageSums] = tensor_spec(geometry.arithmetic, call.outputs[kGradImage].shape);
    }
    call.outputs[kRowBounds] = tensor_spec(
        DType::kInt32, {geometry.batch.groups, geometry.batch.items, geometry.out_sizes.rows(), 2});
    if (call.flag("deterministic")) {
      const Shape& shape = call.outputs[kGradImage].shape;
      call.outputs[kFixedSums] = tensor_spec(DType::kInt64, shape);
      call.outputs[kLargest] = tensor_spec(DType::kInt64, {shape[0], shape[1]});
    }
  }
  if (call.wants(kGradAffine) && call.input("affine").present) {
    call.outputs[kGradAffine] = gradient_spec(call.input("affine"), geometry.batch);
    call.outputs[kPartialSums] =
        partial_sums_spec(geometry.arithmetic, geometry.batch, geometry.out_sizes, D * (D + 1));
  }
  if (call.wants(kGradGrid) && call.input("grid").present) {
    call.outputs[kGradGrid] = gradient_spec(call.input("grid"), geometry.batch);
  }
}

}  // namespace

std::vector<Op> interpolate_ops() {
  const std::vector<AttrSpec> attributes = {
      {"affine_last", AttrKind::kBool},
      {"is_displacement", AttrKind::kBool},
      {"out_shape", AttrKind::kInts},
      {"mode", AttrKind::kChoice, {"bilinear", "nearest"}},
      {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
      {"align_corners", AttrKind::kBool},
      {"deterministic", AttrKind::kBool},
  };
  return {
      {"interpolate",
       "interpolate_grad",
       {{"image", false, InputKind::kImage}, {"affine", true}, {"grid", true}},
       {{"output"}},
       attributes,
       infer,
       interpolate_cpu,
       REGKERNELS_CUDA_LAUNCH(interpolate_cuda)},
      {"interpolate_grad",
       nullptr,
       {{"image", false, InputKind::kImage},
        {"affine", true},
        {"grid", true},
        {"grad_output", false, InputKind::kImage}},
       {{"grad_image"},
        {"grad_affine"},
        {"grad_grid"},
        {"image_sums", OutputRole::kWorkspace},
        {"row_bounds", OutputRole::kWorkspace},
        {"fixed_sums", OutputRole::kWorkspace},
        {"largest", OutputRole::kWorkspace},
        {"partial_sums", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       interpolate_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(interpolate_grad_cuda)},
  };
}

}  // namespace regkernels

#include "core/reduce.h"
#include "ops/interpolate/call.h"
#include "ops/interpolate/interpolate.h"
#include "ops/table.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

InterpolateCall check_interpolate(const Call& call, const char* sampled) {
  const Tensor& image = call.input(sampled);
  const Tensor& affine = call.input("affine");
  const Tensor& grid = call.input("grid");
  InterpolateCall checked;
  checked.arithmetic = check_dtypes(call);
  checked.storage = image.dtype;
  checked.dimensions = check_image(call, sampled);
  const int D = checked.dimensions;
  checked.in_sizes = checked.out_sizes = image_sizes(image);
  if (affine.present) check_affine(call, "affine", D);
  const FieldFormat format = grid_format(call);
  if (grid.present && check_field(call, "grid", EmptyField::kAllowed, format.channels_first) != D) {
    const char* const expected = format.channels_first ? D == 3 ? "(N, 3, Z, Y, X)" : "(N, 2, Y, X)"
                                 : D == 3              ? "(N, Z, Y, X, 3)"
                                                       : "(N, Y, X, 2)";
    fail_shape(call, "grid", concat(expected, ", as ", sampled, " has ", D, " spatial axes"));
  }
  if (format.in_voxels && !call.flag("is_displacement")) {
    fail_value(call, "grid_unit", "'normalised', as is_displacement is False", "'voxel'");
  }
  if (!grid.present && !call.flag("is_displacement")) {
    fail_value(call, "grid", "a field of coordinates, as is_displacement is False", "None");
  }

  const std::vector<int64_t>& out_shape = call.integers("out_shape");
  if (grid.present) {
    checked.out_sizes = format.channels_first ? image_sizes(grid) : field_sizes(grid);
  }
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
    if (sizes.x < 0 || sizes.y < 0 || sizes.z < 0) {
      fail_value(call, "out_shape", "spatial sizes of at least 0", got);
    }
    check_sizes(call, "out_shape", sizes);
    if (grid.present && !(sizes == checked.out_sizes)) {
      fail_value(call, "out_shape", "the spatial sizes of grid", got);
    }
    checked.out_sizes = sizes;
  }

  checked.batch = check_batch(call);
  checked.output = {checked.batch.groups, checked.batch.items, image.shape[2]};
  append_sizes(checked.output, checked.out_sizes, D);
  return checked;
}

namespace {

void infer(Call& call) {
  const auto& checked = call.keep(check_interpolate(call, "image"));
  call.set("output", tensor_spec(checked.storage, checked.output));
}

void infer_grad(Call& call) {
  const auto& checked = call.keep(check_interpolate(call, "image"));
  check_cotangent(call, "grad_output", checked.storage, checked.output);
  const int D = checked.dimensions;
  if (call.wants("grad_image")) {
    const Tensor gradient = gradient_spec(call.input("image"), checked.batch);
    call.set("grad_image", gradient);
    if (checked.storage != checked.arithmetic) {
      call.set("image_sums", tensor_spec(checked.arithmetic, gradient.shape));
    }
    set_scatter_workspaces(call, gradient.shape, checked.batch, checked.out_sizes);
  }
  if (call.wants("grad_affine") && call.input("affine").present) {
    call.set("grad_affine", gradient_spec(call.input("affine"), checked.batch));
    call.set("partial_sums",
             partial_sums_spec(checked.arithmetic, checked.batch, checked.out_sizes, D * (D + 1)));
  }
  if (call.wants("grad_grid") && call.input("grid").present) {
    call.set("grad_grid", gradient_spec(call.input("grid"), checked.batch));
  }
}

}  // namespace

std::vector<Op> interpolate_ops() {
  const std::vector<AttrSpec> attributes = {
      {"affine_last", AttrKind::kBool},
      {"is_displacement", AttrKind::kBool},
      {"out_shape", AttrKind::kInts},
      {"mode", AttrKind::kChoice, {"bilinear", "nearest", "cubic", "b-spline"}},
      {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
      {"align_corners", AttrKind::kBool},
      {"deterministic", AttrKind::kBool},
      {"grid_unit", AttrKind::kChoice, {"normalised", "voxel"}},
      {"grid_channels", AttrKind::kChoice, {"last", "first"}},
      {"grid_components", AttrKind::kChoice, {"xyz", "zyx"}},
  };
  return {
      {"interpolate",
       "interpolate_grad",
       {{"image", false, InputKind::kImage}, {"affine", true}, {"grid", true}},
       {{"output"}},
       attributes,
       infer,
       interpolate_cpu,
       REGKERNELS_CUDA_LAUNCH(interpolate_cuda),
       true},
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
       REGKERNELS_CUDA_LAUNCH(interpolate_grad_cuda),
       true},
  };
}

}  // namespace regkernels

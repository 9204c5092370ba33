#include "core/reduce.h"
#include "ops/compose/call.h"
#include "ops/compose/compose.h"
#include "ops/table.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

ComposeCall check_compose(const Call& call) {
  const Tensor& u = call.input("u");
  const Tensor& v = call.input("v");
  ComposeCall checked;
  checked.dtype = check_dtypes(call);
  const int D = checked.dimensions = check_field(call, "u");
  if (check_field(call, "v", EmptyField::kAllowed) != D) {
    fail_shape(
        call, "v",
        D == 3 ? "(N, Z, Y, X, 3), as u has 3 components" : "(N, Y, X, 2), as u has 2 components");
  }
  if (call.input("affine").present) check_affine(call, "affine", D);
  checked.in_sizes = field_sizes(u);
  checked.out_sizes = field_sizes(v);
  checked.batch = check_batch(call);
  checked.output = {checked.batch.groups, checked.batch.items};
  append_sizes(checked.output, checked.out_sizes, D);
  checked.output.append(D);
  return checked;
}

namespace {

void infer(Call& call) {
  const auto& checked = call.keep(check_compose(call));
  call.set("output", tensor_spec(checked.dtype, checked.output));
}

void infer_grad(Call& call) {
  const auto& checked = call.keep(check_compose(call));
  check_cotangent(call, "grad_output", checked.dtype, checked.output);
  const int D = checked.dimensions;
  if (call.wants("grad_u")) {
    const Tensor gradient = gradient_spec(call.input("u"), checked.batch);
    call.set("grad_u", gradient);
    set_scatter_workspaces(call, gradient.shape, checked.batch, checked.out_sizes);
  }
  if (call.wants("grad_v")) {
    call.set("grad_v", gradient_spec(call.input("v"), checked.batch));
  }
  if (call.wants("grad_affine") && call.input("affine").present) {
    call.set("grad_affine", gradient_spec(call.input("affine"), checked.batch));
    call.set("partial_sums",
             partial_sums_spec(checked.dtype, checked.batch, checked.out_sizes, D * (D + 1)));
  }
}

}  // namespace

std::vector<Op> compose_ops() {
  const std::vector<AttrSpec> attributes = {
      {"add", AttrKind::kBool},
      {"mode", AttrKind::kChoice, {"bilinear", "cubic", "b-spline"}},
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
       REGKERNELS_CUDA_LAUNCH(compose_cuda),
       true},
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
       REGKERNELS_CUDA_LAUNCH(compose_grad_cuda),
       true},
  };
}

}  // namespace regkernels

#include <utility>

#include "maths/sampling.h"
#include "ops/spline_coefficients/call.h"
#include "ops/spline_coefficients/spline_coefficients.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// The coefficients continue as sampling has it: see locate_taps in maths/cubic.h.
SplineSystem system_of(Padding padding, bool align_corners) {
  if (padding == Padding::kZeros) {
    // An axis without extent has its only voxel's value for a coefficient.
    return {4, 1, 1, align_corners ? 6 : 4};
  }
  const bool about_centres = padding == Padding::kBorder || align_corners;
  if (about_centres) return {4, 2, 1, 6};
  return {5, 1, 1, 6};
}

SplineCall check(const Call& call, const char* input, bool transposed) {
  const Tensor& array = call.input(input);
  const Shape& shape = array.shape;
  SplineCall checked;
  checked.dtype = check_dtypes(call);
  checked.count = shape.count();
  const bool channel_last = call.flag("channel_last");
  const int dimensions = shape.rank() - 3;
  if (dimensions != 2 && dimensions != 3) {
    fail_shape(
        call, input,
        channel_last ? "(N, Y, X, C) or (N, Z, Y, X, C)" : "(N, C, Y, X) or (N, C, Z, Y, X)");
  }
  SplineSystem system = system_of(call.choice<Padding>("padding_mode"), call.flag("align_corners"));
  // The matrices of all axes commute; each is transposed by itself.
  if (transposed) std::swap(system.end_inward, system.next_outward);
  const int first_axis = channel_last ? 2 : 3;
  for (int k = dimensions - 1; k >= 0; --k) {
    const int64_t size = shape[first_axis + k];
    if (size < 1) fail_shape(call, input, "with spatial axes of at least 1");
    SplinePass pass;
    pass.system = system;
    pass.size = size;
    pass.stride = shape.count(first_axis + k + 1);
    pass.outer = pass.stride == 0 ? 0 : checked.count / (size * pass.stride);
    checked.passes.push_back(pass);
  }
  return checked;
}

void infer_filtered(Call& call, const char* input, const char* output, bool transposed) {
  const auto& checked = call.keep(check(call, input, transposed));
  call.set(output, tensor_spec(checked.dtype, call.input(input).shape));
}

void infer(Call& call) { infer_filtered(call, "image", "output", false); }
void infer_grad(Call& call) { infer_filtered(call, "grad_output", "grad_image", true); }

}  // namespace

std::vector<Op> spline_coefficients_ops() {
  const std::vector<AttrSpec> attributes = {
      {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
      {"align_corners", AttrKind::kBool},
      {"channel_last", AttrKind::kBool},
  };
  return {
      {"spline_coefficients",
       "spline_coefficients_grad",
       {{"image", false, InputKind::kCompared}},
       {{"output"}},
       attributes,
       infer,
       spline_coefficients_cpu,
       REGKERNELS_CUDA_LAUNCH(spline_coefficients_cuda)},
      {"spline_coefficients_grad",
       nullptr,
       {{"grad_output", false, InputKind::kCompared}},
       {{"grad_image"}},
       attributes,
       infer_grad,
       spline_coefficients_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(spline_coefficients_grad_cuda)},
  };
}

}  // namespace regkernels

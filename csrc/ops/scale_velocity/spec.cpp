#include "core/check.h"
#include "ops/scale_velocity/scale_velocity.h"
#include "ops/table.h"

namespace regkernels {

namespace {

constexpr int64_t kMaxSteps = 64;

void infer_scaled(Call& call, const char* input, const char* output) {
  const DType dtype = check_dtypes(call);
  check_field(call, input);
  const int64_t steps = call.integer("num_steps");
  if (steps < 0 || steps > kMaxSteps) {
    fail_value(call, "num_steps", concat("a number from 0 to ", kMaxSteps), std::to_string(steps));
  }
  call.set(output, tensor_spec(dtype, call.input(input).shape));
}

void infer(Call& call) { infer_scaled(call, "velocity", "output"); }
void infer_grad(Call& call) { infer_scaled(call, "grad_output", "grad_velocity"); }

}  // namespace

std::vector<Op> scale_velocity_ops() {
  // The options of the squarings are checked here, so that a bad one is found before the first of
  // the squarings runs, and also where there are none.
  const std::vector<AttrSpec> attributes = {
      {"num_steps", AttrKind::kInt},
      {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
      {"align_corners", AttrKind::kBool},
  };
  return {
      {"scale_velocity",
       "scale_velocity_grad",
       {{"velocity"}},
       {{"output"}},
       attributes,
       infer,
       scale_velocity_cpu,
       REGKERNELS_CUDA_LAUNCH(scale_velocity_cuda)},
      {"scale_velocity_grad",
       nullptr,
       {{"grad_output"}},
       {{"grad_velocity"}},
       attributes,
       infer_grad,
       scale_velocity_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(scale_velocity_grad_cuda)},
  };
}

}  // namespace regkernels

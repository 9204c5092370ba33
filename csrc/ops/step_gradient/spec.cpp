#include "ops/step_gradient/call.h"
#include "ops/step_gradient/step_gradient.h"
#include "ops/table.h"

namespace regkernels {

namespace {

void check_number_of_item(const Call& call, const char* name) {
  const Tensor& number = call.input(name);
  if (number.present && number.shape.rank() != 2) {
    fail_shape(call, name, "(N,): a number for each item");
  }
}

void infer(Call& call) {
  StepGradientCall checked;
  checked.dtype = check_dtypes(call);
  const int D = checked.dimensions = check_image(call, "moved");
  const Tensor& moved = call.input("moved");
  checked.sizes = image_sizes(moved);
  checked.planes = call.slab.present() ? call.slab.planes : checked.sizes.z;
  checked.channels = moved.shape[2];
  if (check_image(call, "slope") != D || !(image_sizes(call.input("slope")) == checked.sizes) ||
      call.input("slope").shape[2] != checked.channels) {
    fail_shape(call, "slope", "with the channels and spatial axes of moved");
  }
  if (call.input("pull").present &&
      (check_field(call, "pull") != D || !(field_sizes(call.input("pull")) == checked.sizes))) {
    fail_shape(call, "pull", "with the spatial axes of moved");
  }
  const Tensor& displacement = call.input("displacement");
  if (displacement.present) {
    if (!call.input("pull").present) fail_type(call, "pull", "one on the displacement", "None");
    if (check_field(call, "displacement") != D || !(field_sizes(displacement) == checked.sizes)) {
      fail_shape(call, "displacement", "with the spatial axes of moved");
    }
  }
  check_number_of_item(call, "slope_scale");
  check_number_of_item(call, "pull_scale");
  if (call.input("pull_scale").present && !call.input("pull").present) {
    fail_type(call, "pull", "one that pull_scale multiplies", "None");
  }
  checked.batch = check_batch(call);
  Shape shape = {checked.batch.groups, checked.batch.items};
  append_sizes(shape, checked.sizes, D);
  shape.append(D);
  checked.smoothing = check_smoothing(call, "moved", shape, true);
  call.set("output", tensor_spec(checked.dtype, shape));
  if (!checked.smoothing.passes.empty()) {
    call.set("weights", tensor_spec(checked.dtype, {1, checked.smoothing.weights}));
    // On CUDA the passes of a wide Gaussian go back and forth between this memory and the output.
    // A product for which warps are looked at is there before it is smoothed.
    if (!checked.smoothing.fused || displacement.present) {
      call.set("scratch", tensor_spec(checked.dtype, {1, shape.count()}));
    }
  }
  call.keep(checked);
}

}  // namespace

std::vector<Op> step_gradient_ops() {
  return {
      {"step_gradient",
       nullptr,
       {{"moved", false, InputKind::kCompared},
        {"slope", false, InputKind::kCompared},
        {"pull", true, InputKind::kCompared},
        {"displacement", true, InputKind::kCompared},
        {"slope_scale", true, InputKind::kCompared},
        {"pull_scale", true, InputKind::kCompared}},
       {{"output"}, {"weights", OutputRole::kWorkspace}, {"scratch", OutputRole::kWorkspace}},
       {{"sigma", AttrKind::kFloats}, {"truncate", AttrKind::kFloat}},
       infer,
       step_gradient_cpu,
       REGKERNELS_CUDA_LAUNCH(step_gradient_cuda),
       true},
  };
}

}  // namespace regkernels

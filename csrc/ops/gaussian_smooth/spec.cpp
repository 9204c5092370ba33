#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/gaussian_smooth/geometry.h"
#include "ops/table.h"

namespace regkernels {

SmoothingPlan smoothing_plan(const Call& call, const char* input) {
  SmoothingPlan plan;
  plan.arithmetic = check_dtypes(call);
  plan.storage = call.input(input).dtype;
  const Shape& shape = call.input(input).shape;
  const bool channel_last = call.flag("channel_last");
  const int dimensions = shape.rank() - 3;
  if (dimensions != 2 && dimensions != 3) {
    fail_shape(
        call, input,
        channel_last ? "(N, Y, X, C) or (N, Z, Y, X, C)" : "(N, C, Y, X) or (N, C, Z, Y, X)");
  }
  const std::vector<double>& sigma = call.numbers("sigma");
  if (sigma.size() != 1 && sigma.size() != static_cast<size_t>(dimensions)) {
    fail_value(call, "sigma", concat("one number or ", dimensions, " of them"),
               concat(sigma.size(), " numbers"));
  }
  for (double value : sigma) {
    if (!std::isfinite(value) || value < 0) {
      fail_value(call, "sigma", "finite numbers of at least 0", concat(value));
    }
  }
  const double truncate = call.number("truncate");
  if (!std::isfinite(truncate) || truncate <= 0) {
    fail_value(call, "truncate", "a finite number above 0", concat(truncate));
  }

  const int first_axis = channel_last ? 2 : 3;
  plan.channels = channel_last ? shape[2 + dimensions] : 1;
  plan.volumes = shape[0] * shape[1] * (channel_last ? 1 : shape[2]);
  plan.sizes = {dimensions == 3 ? shape[first_axis] : 1, shape[first_axis + dimensions - 2],
                shape[first_axis + dimensions - 1]};
  plan.weights = 0;
  const int64_t fused_radius =
      plan.arithmetic == DType::kFloat64 ? kFusedRadiusDouble : kFusedRadius;
  // The fused kernel counts the elements of a plane, with a margin for its tiles, in 32 bits.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const double columns = static_cast<double>(plan.sizes.x) * plan.channels;
  plan.fused = plan.channels <= kFusedChannels && plan.sizes.z < kLargest / 2 &&
               (columns + 256) * (plan.sizes.y + 256.0) < kLargest;
  for (int k = 0; k < dimensions; ++k) {
    const double width = sigma[sigma.size() == 1 ? 0 : k];
    const int64_t size = shape[first_axis + k];
    if (size < 1) fail_shape(call, input, "with spatial axes of at least 1");
    if (width == 0) continue;
    if (truncate * width > 1e6) {
      fail_value(call, "sigma", "truncate * sigma of at most 1e6", concat(truncate * width));
    }
    const auto full_radius = static_cast<int64_t>(std::ceil(truncate * width));
    double sum = 1;
    for (int64_t d = 1; d <= full_radius; ++d) {
      sum += 2 * std::exp(-0.5 * (d / width) * (d / width));
    }
    SmoothingPass pass;
    pass.axis = dimensions - 1 - k;
    pass.size = size;
    pass.stride = shape.count(first_axis + k + 1);
    pass.outer = size * pass.stride == 0 ? 0 : shape.count() / (size * pass.stride);
    pass.radius = std::min(full_radius, size - 1);
    pass.sigma = width;
    pass.normalisation = 1 / sum;
    pass.first_weight = plan.weights;
    plan.weights += pass.radius + 1;
    plan.fused = plan.fused && pass.radius <= fused_radius;
    plan.passes.push_back(pass);
  }
  return plan;
}

namespace {

// The weights, and memory for what one pass leaves to the next. Without it CUDA's fused kernel
// does, and the CPU, which smooths in place, unless the output's dtype would round what is still to
// be added up. Other passes on CUDA go back and forth between this memory and either the output or,
// for the same reason, more of it.
void infer_smoothed(Call& call, const char* input) {
  const SmoothingPlan plan = smoothing_plan(call, input);
  const Shape& shape = call.input(input).shape;
  call.outputs[0] = tensor_spec(plan.storage, shape);
  if (!plan.passes.empty()) {
    call.outputs[1] = tensor_spec(plan.arithmetic, {1, plan.weights});
  }
  const auto between = static_cast<int64_t>(plan.passes.size()) - 1;
  const bool rounded = plan.storage != plan.arithmetic;
  const int64_t volumes = plan.fused ? rounded : rounded ? 2 : 1;
  if (between > 0 && volumes > 0) {
    call.outputs[2] = tensor_spec(plan.arithmetic, {1, std::min(between, volumes), shape.count()});
  }
}

void infer(Call& call) { infer_smoothed(call, "x"); }
void infer_grad(Call& call) { infer_smoothed(call, "grad_output"); }

}  // namespace

std::vector<Op> gaussian_smooth_ops() {
  const std::vector<AttrSpec> attributes = {
      {"sigma", AttrKind::kFloats},
      {"truncate", AttrKind::kFloat},
      {"channel_last", AttrKind::kBool},
  };
  return {
      {"gaussian_smooth",
       "gaussian_smooth_grad",
       {{"x", false, InputKind::kImage}},
       {{"output"}, {"weights", OutputRole::kWorkspace}, {"scratch", OutputRole::kWorkspace}},
       attributes,
       infer,
       gaussian_smooth_cpu,
       REGKERNELS_CUDA_LAUNCH(gaussian_smooth_cuda)},
      {"gaussian_smooth_grad",
       nullptr,
       {{"grad_output", false, InputKind::kImage}},
       {{"grad_x"}, {"weights", OutputRole::kWorkspace}, {"scratch", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       gaussian_smooth_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(gaussian_smooth_grad_cuda)},
  };
}

}  // namespace regkernels

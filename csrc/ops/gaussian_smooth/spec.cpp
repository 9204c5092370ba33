#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/gaussian_smooth/call.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/table.h"

namespace regkernels {

GaussianSmoothCall check_smoothing(const Call& call, const char* input, const Shape& shape,
                                   bool channel_last) {
  GaussianSmoothCall checked;
  checked.arithmetic = checked.storage = check_dtypes(call);
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
  checked.channels = channel_last ? shape[2 + dimensions] : 1;
  checked.volumes = shape[0] * shape[1] * (channel_last ? 1 : shape[2]);
  checked.sizes = {dimensions == 3 ? shape[first_axis] : 1, shape[first_axis + dimensions - 2],
                   shape[first_axis + dimensions - 1]};
  checked.weights = 0;
  const int64_t fused_radius =
      checked.arithmetic == DType::kFloat64 ? kFusedRadiusDouble : kFusedRadius;
  // The fused kernel counts the elements of a plane, with a margin for its tiles, in 32 bits.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const double columns = static_cast<double>(checked.sizes.x) * checked.channels;
  checked.fused = checked.channels <= kFusedChannels && checked.sizes.z < kLargest / 2 &&
                  (columns + 256) * (checked.sizes.y + 256.0) < kLargest;
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
    pass.first_weight = checked.weights;
    checked.weights += pass.radius + 1;
    checked.fused = checked.fused && pass.radius <= fused_radius;
    checked.passes.push_back(pass);
  }
  return checked;
}

namespace {

GaussianSmoothCall check(const Call& call, const char* input) {
  const Tensor& array = call.input(input);
  GaussianSmoothCall checked = check_smoothing(call, input, array.shape, call.flag("channel_last"));
  checked.storage = array.dtype;
  return checked;
}

// Asks for memory for the weights, and for what one pass leaves to the next. CUDA's fused kernel
// does without the latter, and so does the CPU, which smooths in place, unless the output's dtype
// would round what is still to be added up. Other passes on CUDA go back and forth between this
// memory and either the output or, for the same reason, more of it.
void infer_smoothed(Call& call, const char* input, const char* output) {
  const auto& checked = call.keep(check(call, input));
  const Shape& shape = call.input(input).shape;
  call.set(output, tensor_spec(checked.storage, shape));
  if (!checked.passes.empty()) {
    call.set("weights", tensor_spec(checked.arithmetic, {1, checked.weights}));
  }
  const auto between = static_cast<int64_t>(checked.passes.size()) - 1;
  const bool rounded = checked.storage != checked.arithmetic;
  const int64_t volumes = checked.fused ? rounded : rounded ? 2 : 1;
  if (between > 0 && volumes > 0) {
    call.set("scratch",
             tensor_spec(checked.arithmetic, {1, std::min(between, volumes), shape.count()}));
  }
}

void infer(Call& call) { infer_smoothed(call, "x", "output"); }
void infer_grad(Call& call) { infer_smoothed(call, "grad_output", "grad_x"); }

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

#pragma once

#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/half.h"
#include "core/host_device.h"

namespace regkernels {

// One pass of the separable filter. It goes along an axis of `size` elements that lie `stride`
// apart, in each of `outer` slabs of size * stride elements.
struct SmoothingPass {
  int axis;  // 0: x, 1: y, 2: z
  int64_t outer;
  int64_t size;
  int64_t stride;
  int64_t radius;  // taps on either side that can lie inside the volume
  double sigma;
  double normalisation;  // 1 / (sum of all taps, those outside included)
  int64_t first_weight;  // where this pass's weights begin in the table
};

// What a checked call amounts to.
struct GaussianSmoothCall {
  DType arithmetic;
  DType storage;
  int64_t volumes;
  Sizes sizes;
  int64_t channels;  // those that lie side by side at each voxel
  std::vector<SmoothingPass> passes;
  int64_t weights;  // length of the table: for each pass the weights of offsets 0 .. radius
  bool fused;       // on CUDA one kernel does all passes, and leaves nothing in memory between them
};

// The fused kernel has registers and shared memory for so much. A Gaussian of 3 voxels reaches 12
// of them.
inline constexpr int kFusedRadius = 12, kFusedRadiusDouble = 8;
inline constexpr int kFusedChannels = 3;

// Checks `sigma` and `truncate` of a call that smooths an array of a shape, that of a field or an
// image. Where the shape does not fit, `input` is named.
GaussianSmoothCall check_smoothing(const Call& call, const char* input, const Shape& shape,
                                   bool channel_last);

template <class T>
REGKERNELS_HD T gaussian_weight(const SmoothingPass& pass, int64_t distance) {
  const double ratio = static_cast<double>(distance) / pass.sigma;
  return static_cast<T>(exp(-0.5 * ratio * ratio) * pass.normalisation);
}

// Calls body(checked, in, out, weights, scratch) with pointers of the types for this call, unless
// there is nothing to smooth.
template <class Body>
void with_smoothing(const Call& call, const char* input_name, const char* output_name,
                    const Body& body) {
  const auto& checked = call.checked<GaussianSmoothCall>();
  const Tensor& input = call.input(input_name);
  if (input.shape.count() == 0) return;
  dispatch_storage<true>(checked.storage, [&](auto type) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    body(checked, input.as<const S>(), call.output(output_name).template as<S>(),
         call.output("weights").template as<T>(), call.output("scratch").template as<T>());
  });
}

template <class Body>
void with_gaussian_smooth(const Call& call, const Body& body) {
  with_smoothing(call, "x", "output", body);
}

// The filter is symmetric and zero outside: it is its own adjoint.
template <class Body>
void with_gaussian_smooth_grad(const Call& call, const Body& body) {
  with_smoothing(call, "grad_output", "grad_x", body);
}

}  // namespace regkernels

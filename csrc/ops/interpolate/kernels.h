#pragma once

#include "ops/interpolate/call.h"
#include "ops/interpolate/interpolate.h"
#include "resample/launch.h"

namespace regkernels {

inline ResampleCall interpolation_of_image(const Call& call) {
  return interpolation(call, "image", call.choice<Mode>("mode"));
}

// Cubic sampling, with kCubic, is compiled by itself.
template <bool kCubic, class Device>
void interpolate(const Device& device, const Call& call) {
  resample_forward<false, kCubic>(device, interpolation_of_image(call), call.output("output"));
}

template <bool kCubic, class Device>
void interpolate_grad(const Device& device, const Call& call) {
  ResampleCall resample = interpolation_of_image(call);
  resample.grad_output = &call.input("grad_output");
  resample.grad_input = &call.output("grad_image");
  resample.grad_affine = &call.output("grad_affine");
  resample.grad_field = &call.output("grad_grid");
  resample.scatter = {&call.output("row_bounds"), &call.output("image_sums"),
                      &call.output("fixed_sums"), &call.output("largest")};
  resample.partial_sums = &call.output("partial_sums");
  resample_backward<false, kCubic>(device, resample);
}

}  // namespace regkernels

#pragma once

#include "ops/interpolate/call.h"
#include "ops/interpolate/interpolate.h"
#include "resample/launch.h"

namespace regkernels {

inline ResampleCall interpolate_call(const Call& call) {
  return interpolate_call(call, "image", call.choice<Mode>("mode"));
}

template <class Device>
void interpolate(const Device& device, const Call& call) {
  resample_forward<false>(device, interpolate_call(call), call.output("output"));
}

template <class Device>
void interpolate_grad(const Device& device, const Call& call) {
  ResampleCall resample = interpolate_call(call);
  resample.grad_output = &call.input("grad_output");
  resample.grad_input = &call.output("grad_image");
  resample.grad_affine = &call.output("grad_affine");
  resample.grad_field = &call.output("grad_grid");
  resample.scatter = {&call.output("row_bounds"), &call.output("image_sums"),
                      &call.output("fixed_sums"), &call.output("largest")};
  resample.partial_sums = &call.output("partial_sums");
  resample_backward<false>(device, resample);
}

}  // namespace regkernels

#pragma once

#include "core/resample.h"
#include "ops/interpolate/geometry.h"
#include "ops/interpolate/interpolate.h"

namespace reg {

inline ResampleCall interpolate_call(const Call& call) {
  const InterpolateGeometry geometry = interpolate_geometry(call);
  ResampleCall resample;
  resample.input = &call.input("image");
  resample.affine = &call.input("affine");
  resample.field = &call.input("grid");
  resample.in_sizes = geometry.in_sizes;
  resample.out_sizes = geometry.out_sizes;
  resample.dimensions = geometry.dimensions;
  resample.placement = !call.flag("is_displacement") ? Placement::kFull
                       : call.flag("affine_last")    ? Placement::kAffineLast
                                                     : Placement::kAffineFirst;
  resample.sampling = {call.choice<Mode>("mode"), call.choice<Padding>("padding_mode"),
                       call.flag("align_corners")};
  resample.groups = geometry.batch.groups;
  resample.items = geometry.batch.items;
  return resample;
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

}  // namespace reg

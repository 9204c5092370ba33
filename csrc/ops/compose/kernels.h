#pragma once

#include "ops/compose/call.h"
#include "ops/compose/compose.h"
#include "resample/launch.h"

namespace regkernels {

// How u is sampled: the op offers no nearest voxels.
inline Mode composition_mode(const Call& call) {
  constexpr Mode kModes[] = {Mode::kBilinear, Mode::kCubic, Mode::kBSpline};
  return kModes[call.integer("mode")];
}

// A checked composition as the loops of resample/ take it: u is sampled where A x + v points.
inline ResampleCall composition(const Call& call) {
  const auto& checked = call.checked<ComposeCall>();
  ResampleCall resample;
  resample.input = &call.input("u");
  resample.affine = &call.input("affine");
  resample.field = &call.input("v");
  resample.in_sizes = checked.in_sizes;
  resample.out_sizes = checked.out_sizes;
  resample.dimensions = checked.dimensions;
  resample.placement = Placement::kAffineFirst;
  resample.sampling = {composition_mode(call), call.choice<Padding>("padding_mode"),
                       call.flag("align_corners")};
  resample.add_field = call.flag("add");
  resample.slab = call.slab;
  resample.groups = checked.batch.groups;
  resample.items = checked.batch.items;
  return resample;
}

// Cubic sampling, with kCubic, is compiled by itself.
template <bool kCubic, class Device>
void compose(const Device& device, const Call& call) {
  resample_forward<true, kCubic>(device, composition(call), call.output("output"));
}

template <bool kCubic, class Device>
void compose_grad(const Device& device, const Call& call) {
  ResampleCall resample = composition(call);
  resample.grad_output = &call.input("grad_output");
  resample.grad_input = &call.output("grad_u");
  resample.grad_affine = &call.output("grad_affine");
  resample.grad_field = &call.output("grad_v");
  resample.scatter.row_bounds = &call.output("row_bounds");
  resample.scatter.fixed_sums = &call.output("fixed_sums");
  resample.scatter.largest = &call.output("largest");
  resample.partial_sums = &call.output("partial_sums");
  resample_backward<true, kCubic>(device, resample);
}

}  // namespace regkernels

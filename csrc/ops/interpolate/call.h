#pragma once

#include "ops/interpolate/geometry.h"
#include "resample/call.h"

namespace regkernels {

// An interpolation of the input called `sampled`, as the loops of core take it.
inline ResampleCall interpolate_call(const Call& call, const char* sampled, Mode mode) {
  const InterpolateGeometry geometry = interpolate_geometry(call, sampled);
  ResampleCall resample;
  resample.input = &call.input(sampled);
  resample.affine = &call.input("affine");
  resample.field = &call.input("grid");
  resample.in_sizes = geometry.in_sizes;
  resample.out_sizes = geometry.out_sizes;
  resample.dimensions = geometry.dimensions;
  resample.placement = !call.flag("is_displacement") ? Placement::kFull
                       : call.flag("affine_last")    ? Placement::kAffineLast
                                                     : Placement::kAffineFirst;
  resample.sampling = {mode, call.choice<Padding>("padding_mode"), call.flag("align_corners")};
  resample.groups = geometry.batch.groups;
  resample.items = geometry.batch.items;
  return resample;
}

}  // namespace regkernels

#pragma once

#include "core/check.h"
#include "resample/call.h"

namespace regkernels {

// What a checked interpolation amounts to.
struct InterpolateCall {
  DType arithmetic;
  DType storage;  // of what is sampled, the result and its cotangent
  int dimensions;
  Sizes in_sizes;
  Sizes out_sizes;
  Batch batch;
  Shape output;
};

inline FieldFormat grid_format(const Call& call) {
  return {call.choice<ComponentPlace>("grid_channels") == ComponentPlace::kFirst,
          call.choice<ComponentOrder>("grid_components") == ComponentOrder::kZyx,
          call.choice<LengthUnit>("grid_unit") == LengthUnit::kVoxel};
}

// `sampled` is the name of the input that is sampled.
InterpolateCall check_interpolate(const Call& call, const char* sampled);

// A checked interpolation as the loops of resample/ take it.
inline ResampleCall interpolation(const Call& call, const char* sampled, Mode mode) {
  const auto& checked = call.checked<InterpolateCall>();
  ResampleCall resample;
  resample.input = &call.input(sampled);
  resample.affine = &call.input("affine");
  resample.field = &call.input("grid");
  resample.field_format = grid_format(call);
  resample.in_sizes = checked.in_sizes;
  resample.out_sizes = checked.out_sizes;
  resample.dimensions = checked.dimensions;
  resample.placement = !call.flag("is_displacement") ? Placement::kFull
                       : call.flag("affine_last")    ? Placement::kAffineLast
                                                     : Placement::kAffineFirst;
  resample.sampling = {mode, call.choice<Padding>("padding_mode"), call.flag("align_corners")};
  resample.slab = call.slab;
  resample.groups = checked.batch.groups;
  resample.items = checked.batch.items;
  return resample;
}

}  // namespace regkernels

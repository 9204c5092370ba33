#pragma once

#include "core/check.h"

namespace regkernels {

// What the inputs and attributes of an interpolation amount to, once checked. `sampled` is the name
// of the input that is sampled.
struct InterpolateGeometry {
  DType arithmetic;
  DType storage;  // of what is sampled, the result and its cotangent
  int dimensions;
  Sizes in_sizes;
  Sizes out_sizes;
  Batch batch;
  Shape output;
};

InterpolateGeometry interpolate_geometry(const Call& call, const char* sampled = "image");

}  // namespace regkernels

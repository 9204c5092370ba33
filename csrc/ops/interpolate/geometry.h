#pragma once

#include "core/check.h"

namespace reg {

// What the inputs and attributes of an interpolation amount to, once checked.
struct InterpolateGeometry {
  DType arithmetic;
  DType storage;  // of the image, the result and its cotangent
  int dimensions;
  Sizes in_sizes;
  Sizes out_sizes;
  Batch batch;
  Shape output;
};

InterpolateGeometry interpolate_geometry(const Call& call);

}  // namespace reg

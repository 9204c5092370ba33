#pragma once

#include <array>

#include "core/check.h"
#include "resample/field_layout.h"

namespace regkernels {

// What a checked conversion amounts to.
struct ConvertDisplacementCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  FieldFormat source;  // where components are, not their unit
  FieldFormat target;
  std::array<double, 3> factor;  // for each component, x, y, z
};

}  // namespace regkernels

#pragma once

#include <array>

#include "core/check.h"

namespace regkernels {

// What a checked conversion amounts to.
struct ConvertDisplacementCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  bool source_last;  // components last, or first
  bool target_last;
  std::array<double, 3> factor;  // for each component, x, y, z
};

}  // namespace regkernels

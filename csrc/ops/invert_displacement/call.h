#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked call amounts to.
struct InvertDisplacementCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
};

}  // namespace regkernels

#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked call amounts to.
struct InvertDisplacementCall {
  DType dtype;
  int dimensions;
  Sizes in_sizes;  // of the displacement, of which there may be more planes than are inverted
  Sizes sizes;
  Batch batch;
};

}  // namespace regkernels

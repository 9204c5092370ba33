#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked call amounts to.
struct CoverageCall {
  DType dtype;
  int dimensions;
  Sizes source_sizes;
  Sizes sizes;
  Batch batch;
};

}  // namespace regkernels

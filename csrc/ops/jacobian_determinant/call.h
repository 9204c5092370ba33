#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked call amounts to.
struct JacobianDeterminantCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  Shape output;
};

}  // namespace regkernels

// Memory that the gradient of the array that is sampled needs.
#pragma once

#include "core/tensor.h"

namespace regkernels {

// Memory for the gradient of the array that is sampled.
struct ScatterWorkspace {
  const Tensor* row_bounds = nullptr;  // CPU: the rows of the target that a row of voxels reaches
  const Tensor* sums = nullptr;        // absent where the gradient itself can be added up in
  const Tensor* fixed_sums = nullptr;  // these two: only where the result must not vary
  const Tensor* largest = nullptr;
};

}  // namespace regkernels

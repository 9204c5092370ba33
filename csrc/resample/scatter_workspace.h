#pragma once

#include "core/tensor.h"

namespace regkernels {

// The memory that the gradient of the array that is sampled works in.
struct ScatterWorkspace {
  // On the CPU these are the rows of the target that each row of voxels reaches.
  const Tensor* row_bounds = nullptr;
  // A half-precision gradient is added up here, any other in its own place.
  const Tensor* sums = nullptr;
  // These two are there only where the result must be the same every time: see fixed_point.h.
  const Tensor* fixed_sums = nullptr;
  const Tensor* largest = nullptr;
};

}  // namespace regkernels

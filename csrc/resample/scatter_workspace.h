#pragma once

#include "core/check.h"

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

// Asks for this memory where the sampled array's gradient has the shape `gradient` and the samples
// lie at `out_sizes`.
inline void set_scatter_workspaces(Call& call, const Shape& gradient, const Batch& batch,
                                   const Sizes& out_sizes) {
  call.set("row_bounds",
           tensor_spec(DType::kInt32, {batch.groups, batch.items, out_sizes.rows(), 2}));
  if (call.flag("deterministic")) {
    call.set("fixed_sums", tensor_spec(DType::kInt64, gradient));
    call.set("largest", tensor_spec(DType::kInt64, {gradient[0], gradient[1]}));
  }
}

}  // namespace regkernels

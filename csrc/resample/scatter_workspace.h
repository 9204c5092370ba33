// Memory that the gradient of the array that is sampled needs.
#pragma once

#include "core/check.h"

namespace regkernels {

// Memory for the gradient of the array that is sampled.
struct ScatterWorkspace {
  const Tensor* row_bounds = nullptr;  // CPU: the rows of the target that a row of voxels reaches
  const Tensor* sums = nullptr;        // absent where the gradient itself can be added up in
  const Tensor* fixed_sums = nullptr;  // these two: only where the result must not vary
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

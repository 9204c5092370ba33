#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked composition amounts to.
struct ComposeCall {
  DType dtype;
  int dimensions;
  Sizes in_sizes;   // of u, which is sampled
  Sizes out_sizes;  // of v and of the result
  Batch batch;
  Shape output;
};

ComposeCall check_compose(const Call& call);

}  // namespace regkernels

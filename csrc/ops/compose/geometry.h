#pragma once

#include "core/check.h"

namespace regkernels {

struct ComposeGeometry {
  DType dtype;
  int dimensions;
  Sizes in_sizes;   // of u, which is sampled
  Sizes out_sizes;  // of v and of the result
  Batch batch;
  Shape output;
};

ComposeGeometry compose_geometry(const Call& call);

}  // namespace regkernels

#pragma once

#include "core/check.h"

namespace regkernels {

// What a checked call amounts to.
struct AffineWarpCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  Shape output;
};

AffineWarpCall check_affine_warp(const Call& call);

}  // namespace regkernels

#pragma once

#include "core/check.h"

namespace regkernels {

struct AffineWarpGeometry {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  Shape output;
};

AffineWarpGeometry affine_warp_geometry(const Call& call);

}  // namespace regkernels

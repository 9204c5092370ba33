#pragma once

#include "core/check.h"

namespace reg {

struct AffineWarpGeometry {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  Shape output;
};

AffineWarpGeometry affine_warp_geometry(const Call& call);

}  // namespace reg

#pragma once

#include "core/check.h"
#include "ops/gaussian_smooth/call.h"

namespace regkernels {

// What a checked call amounts to.
struct AdamCall {
  DType dtype;
  DType moments;  // what they are stored in: dtype, or bfloat16 where that is float32
  int dimensions;
  Sizes sizes;     // of what the call is for: a slab's own planes alone
  int64_t planes;  // of the whole volume
  Batch batch;
  double beta1, beta2;
  double learning_rate;  // negative where it is no matter
  bool confined;
  GaussianSmoothCall smoothing;  // of the gradient; without passes where there is none
  // So many planes at either end of a slab are for others to count, who know what lies beyond it.
  int64_t uncounted = 0;
};

}  // namespace regkernels

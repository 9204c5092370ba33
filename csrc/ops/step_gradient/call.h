#pragma once

#include "core/check.h"
#include "ops/gaussian_smooth/call.h"

namespace regkernels {

// What a checked call amounts to.
struct StepGradientCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  int64_t planes;  // of the whole volume
  int64_t channels;
  Batch batch;
  GaussianSmoothCall smoothing;  // of the gradient, a field
};

}  // namespace regkernels

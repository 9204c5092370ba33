#pragma once

#include "core/check.h"

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
};

}  // namespace regkernels

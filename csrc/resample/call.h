// A call as this folder takes it.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

// Everything that a call needs to know, independent of dtype and dimensions.
struct ResampleCall {
  const Tensor* input = nullptr;
  const Tensor* affine = nullptr;
  const Tensor* field = nullptr;
  Sizes in_sizes;
  Sizes out_sizes;
  int dimensions = 3;
  Placement placement = Placement::kAffineFirst;
  Sampling sampling;
  bool channels_last = false;
  bool add_field = false;
  int64_t groups = 1;
  int64_t items = 1;
  // Gradients only.
  const Tensor* grad_output = nullptr;
  const Tensor* grad_input = nullptr;
  const Tensor* grad_affine = nullptr;
  const Tensor* grad_field = nullptr;
  ScatterWorkspace scatter;
  const Tensor* partial_sums = nullptr;
};

}  // namespace regkernels

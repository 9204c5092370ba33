#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/op.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "resample/field_layout.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

// A call as the ops hand it over: everything that sampling needs to know, whatever the dtype and
// the number of dimensions.
struct ResampleCall {
  const Tensor* input = nullptr;
  const Tensor* affine = nullptr;
  const Tensor* field = nullptr;
  FieldFormat field_format;
  Sizes in_sizes;
  Sizes out_sizes;
  int dimensions = 3;
  Placement placement = Placement::kAffineFirst;
  Sampling sampling;
  bool channels_last = false;
  bool add_field = false;
  Slab slab;
  int64_t groups = 1;
  int64_t items = 1;
  // The rest is there for gradients only.
  const Tensor* grad_output = nullptr;
  const Tensor* grad_input = nullptr;
  const Tensor* grad_affine = nullptr;
  const Tensor* grad_field = nullptr;
  ScatterWorkspace scatter;
  const Tensor* partial_sums = nullptr;
};

}  // namespace regkernels

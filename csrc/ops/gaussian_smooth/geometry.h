#pragma once

#include <array>
#include <vector>

#include "core/check.h"

namespace reg {

// One pass of the separable filter: along an axis of `size` elements that lie `stride` apart, in
// each of `outer` slabs of size * stride elements.
struct SmoothingPass {
  int64_t outer;
  int64_t size;
  int64_t stride;
  int64_t radius;  // taps on either side that can lie inside the volume
  double sigma;
  double normalisation;  // 1 / (sum of all taps, those outside included)
  int64_t first_weight;  // where this pass's weights begin in the table
};

struct SmoothingPlan {
  DType arithmetic;
  DType storage;
  std::vector<SmoothingPass> passes;
  int64_t weights;  // length of the table: for each pass the weights of offsets 0 .. radius
};

SmoothingPlan smoothing_plan(const Call& call, const char* input);

}  // namespace reg

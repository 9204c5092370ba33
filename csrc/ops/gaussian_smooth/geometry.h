#pragma once

#include <vector>

#include "core/check.h"

namespace regkernels {

// One pass of the separable filter: along an axis of `size` elements that lie `stride` apart, in
// each of `outer` slabs of size * stride elements.
struct SmoothingPass {
  int axis;  // 0: x, 1: y, 2: z
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
  int64_t volumes;
  Sizes sizes;
  int64_t channels;  // that lie side by side at each voxel
  std::vector<SmoothingPass> passes;
  int64_t weights;  // length of the table: for each pass the weights of offsets 0 .. radius
  bool fused;       // on CUDA one kernel does all passes, and leaves nothing in memory between them
};

SmoothingPlan smoothing_plan(const Call& call, const char* input);

// What that kernel has registers and shared memory for. A Gaussian of 3 voxels reaches 12 of them.
inline constexpr int kFusedRadius = 12, kFusedRadiusDouble = 8;
inline constexpr int kFusedChannels = 3;

}  // namespace regkernels

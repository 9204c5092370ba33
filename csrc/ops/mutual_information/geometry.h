#pragma once

#include "core/large_gpu.h"
#include "ops/losses/compared.h"
#include "ops/mutual_information/maths.h"

namespace regkernels {

// What the inputs and attributes of a call amount to, once checked.
struct HistogramGeometry {
  DType dtype;
  Batch batch;
  int64_t channels;
  int64_t samples;  // of an image and channel
  int num_bins;
  ParzenKernel kernel;
  int reach;
  bool joint_range;

  int64_t elements() const { return batch.groups * batch.items * channels; }
};

HistogramGeometry histogram_geometry(const Call& call);

template <class T>
Parzen<T> parzen_window(const Call& call, const HistogramGeometry& geometry);

// The table of derivatives has a margin of zeros, as wide as a window reaches over the ends.
inline int64_t table_size(const HistogramGeometry& geometry) {
  return geometry.num_bins + 2 * geometry.reach;
}

// What is found out about a pair of images before their samples are counted: from each of some
// parts, the extremes of both and the largest weight.
enum Extreme { kLowPred, kHighPred, kLowTarget, kHighTarget, kHighMask, kExtremes };

inline int64_t extreme_parts(int64_t samples) {
  return std::max<int64_t>(
      1, std::min<int64_t>(2 * kLargeGpuMultiprocessors, (samples + 8191) / 8192));
}

// What the gradient needs to know again: the ranges, 1 / (sum of the weights), and the largest
// weight, which all of them are divided by.
enum Scaling { kRangePred, kRangeTarget = 2, kInverseTotal = 4, kLargestWeight, kScalings };

}  // namespace regkernels

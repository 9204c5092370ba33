// What the kernels that count samples, and those that read the counts, have in common.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/call.h"

namespace regkernels {
namespace {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The arguments of all kernels but that of the gradient.
template <class T>
struct Counting {
  Parzen<T> window;
  Channels<const T> pred, target, mask;
  Operand<const T> value_range;
  ElementSpace space;
  int64_t elements, samples;
  bool joint_range;
  const T* extremes;  // (elements, extreme_parts, kExtremes); null: not needed
  int extreme_parts;
  // (elements, num_bins^2 + 1), where the last is not 0 if a sample was not a number
  unsigned long long* counts;
  double units;  // what one sample adds to the counts
  bool normalised;
  double smooth_nr, smooth_dr;
  int reach;

  __device__ int bins() const { return window.num_bins * window.num_bins; }
};

}  // namespace
}  // namespace regkernels

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

// The arguments of the kernel that counts.
template <class T>
struct Counting {
  Parzen<T> window;
  HistogramOperands<T> images;
  ScaleOperands<T> scales;
  int64_t elements;
  // (elements, num_bins^2 + 1), where the last is not 0 if a sample was not a number
  unsigned long long* counts;
  double units;  // what one sample adds to the counts
  int reach;

  __device__ int bins() const { return window.num_bins * window.num_bins; }
};

// The arguments of the kernels that read counts.
template <class T>
struct Counted {
  Operand<const unsigned long long> counts;  // as in Counting
  ScaleOperands<T> scales;
  int64_t elements;
  int num_bins, reach;
  double units;
  bool normalised;
  double smooth_nr, smooth_dr;

  __device__ int bins() const { return num_bins * num_bins; }
  __device__ const unsigned long long* counts_of(int64_t element) const {
    const auto [group, item, channel] = scales.space.index(element);
    return counts.at(group, item) + channel * (bins() + 1);
  }
};

}  // namespace
}  // namespace regkernels

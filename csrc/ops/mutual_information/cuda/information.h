// From the counts to the mutual information, its derivatives, and the shares of a histogram.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/losses/finish.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/extremes.h"

namespace regkernels {
namespace {

inline constexpr int kMaxBins = 256;
inline constexpr int kFinishThreads = 512;

// The normalised information of an element, for all threads of its block: from the shares of its
// bins, p_at(i), and their marginals. `scratch` has room for a value of each warp.
template <class Share>
__device__ NormalisedInformation normalised_information(int num_bins, const double* p_pred,
                                                        const double* p_target, const Share& p_at,
                                                        double* scratch) {
  __shared__ double entropies[2];
  double separate = 0, joint = 0;
  for (int a = threadIdx.x; a < num_bins; a += kFinishThreads) {
    separate += entropy_term(p_pred[a]) + entropy_term(p_target[a]);
  }
  for (int i = threadIdx.x; i < num_bins * num_bins; i += kFinishThreads) {
    joint += entropy_term(p_at(i));
  }
  separate = block_sum<kFinishThreads>(separate, scratch);
  joint = block_sum<kFinishThreads>(joint, scratch);
  if (threadIdx.x == 0) entropies[0] = separate, entropies[1] = joint;
  __syncthreads();
  return {entropies[0], entropies[1]};
}

// Each block turns the counts of one element into its mutual information, normalised or not, into
// the table of derivatives if one is wanted.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    information_kernel(const __grid_constant__ Counted<T> call, T* maps, double* values, T* table,
                       T* scaling) {
  __shared__ double p_pred[kMaxBins], p_target[kMaxBins];
  __shared__ double by_pred[kMaxBins], by_target[kMaxBins];
  __shared__ double scratch[kFinishThreads / kWarp];
  const int num_bins = call.num_bins;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kFinishWarps = kFinishThreads / kWarp;
  for (int64_t element = blockIdx.x; element < call.elements; element += gridDim.x) {
    const unsigned long long* const counts = call.counts_of(element);
    const PairScale<T> scale = read_scale(call.scales, element);
    // The marginals are sums of integers, whose order does not matter.
    unsigned long long sum_of_warp = 0;
    __shared__ unsigned long long sums[kFinishWarps];
    for (int a = warp; a < num_bins; a += kFinishWarps) {
      unsigned long long sum = 0;
      for (int b = lane; b < num_bins; b += kWarp) sum += counts[a * num_bins + b];
      for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane == 0) p_pred[a] = static_cast<double>(sum);
      sum_of_warp += sum;
    }
    if (lane == 0) sums[warp] = sum_of_warp;
    for (int b = threadIdx.x; b < num_bins; b += kFinishThreads) {
      unsigned long long sum = 0;
      for (int a = 0; a < num_bins; ++a) sum += counts[a * num_bins + b];
      p_target[b] = static_cast<double>(sum);
    }
    __syncthreads();
    unsigned long long total = 0;
    for (int w = 0; w < kFinishWarps; ++w) total += sums[w];
    double share = total == 0 ? 0 : 1 / static_cast<double>(total);
    if (counts[call.bins()] != 0) share = NAN;
    if (threadIdx.x < num_bins) {
      p_pred[threadIdx.x] *= share;
      p_target[threadIdx.x] *= share;
    }
    __syncthreads();
    const auto p_at = [&](int i) { return static_cast<double>(counts[i]) * share; };
    const auto term_at = [&](int a, int b) {
      return information_term(p_at(a * num_bins + b), p_pred[a] * p_target[b], call.smooth_nr,
                              call.smooth_dr);
    };
    double information = 0;
    NormalisedInformation normalised(0, 0);
    if (call.normalised) {
      normalised = normalised_information(num_bins, p_pred, p_target, p_at, scratch);
      information = normalised.value();
    } else {
      for (int a = warp; a < num_bins; a += kFinishWarps) {
        double slope = 0;
        for (int b = lane; b < num_bins; b += kWarp) {
          const InformationTerm term = term_at(a, b);
          information += term.value;
          slope += term.by_q * p_target[b];
        }
        slope = warp_sum(slope);
        if (lane == 0) by_pred[a] = slope;
      }
      information = block_sum<kFinishThreads>(information, scratch);
    }
    if (threadIdx.x == 0) {
      if (values != nullptr) {
        values[element] = -information;
      } else {
        maps[element] = static_cast<T>(-information);
      }
    }
    if (scaling != nullptr && threadIdx.x == 0) {
      T* const values_here = scaling + element * kScalings;
      values_here[kRangePred] = scale.pred.low;
      values_here[kRangePred + 1] = scale.pred.high;
      values_here[kRangeTarget] = scale.target.low;
      values_here[kRangeTarget + 1] = scale.target.high;
      values_here[kInverseTotal] = total == 0 ? T(0) : static_cast<T>(call.units * share);
      values_here[kLargestWeight] = scale.largest_weight;
    }
    if (table == nullptr) continue;
    for (int b = warp; b < num_bins && !call.normalised; b += kFinishWarps) {
      double slope = 0;
      for (int a = lane; a < num_bins; a += kWarp) slope += term_at(a, b).by_q * p_pred[a];
      slope = warp_sum(slope);
      if (lane == 0) by_target[b] = slope;
    }
    __syncthreads();
    // The slopes of a sample's weights add up to 0, so that a constant in the table makes no
    // difference. With this one, entries are near 0, not near -1, where the images are independent.
    const auto slope_at = [&](int a, int b) {
      if (call.normalised) {
        return normalised.slope(p_at(a * num_bins + b), p_pred[a], p_target[b]);
      }
      return term_at(a, b).by_p + by_pred[a] + by_target[b] + 1;
    };
    const int size = num_bins + 2 * call.reach;
    T* const rows = table + element * size * size;
    for (int i = threadIdx.x; i < size * size; i += kFinishThreads) {
      const int a = i / size - call.reach, b = i % size - call.reach;
      const bool inside = a >= 0 && a < num_bins && b >= 0 && b < num_bins;
      rows[i] = inside ? static_cast<T>(-slope_at(a, b)) : T(0);
    }
    __syncthreads();  // the next element's marginals take the place of these
  }
}

// Each block turns the counts of one element into shares.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    share_kernel(const __grid_constant__ Counted<T> call, T* output) {
  __shared__ double scratch[kFinishThreads / kWarp];
  __shared__ double total;
  const int bins = call.bins();
  for (int64_t element = blockIdx.x; element < call.elements; element += gridDim.x) {
    const unsigned long long* const those = call.counts_of(element);
    double sum = 0;
    for (int i = threadIdx.x; i < bins; i += kFinishThreads) {
      sum += static_cast<double>(those[i]);
    }
    sum = block_sum<kFinishThreads>(sum, scratch);
    if (threadIdx.x == 0) total = sum;
    __syncthreads();
    double share = total == 0 ? 0 : 1 / total;
    if (those[bins] != 0) share = NAN;
    for (int i = threadIdx.x; i < bins; i += kFinishThreads) {
      output[element * bins + i] = static_cast<T>(static_cast<double>(those[i]) * share);
    }
  }
}

}  // namespace
}  // namespace regkernels

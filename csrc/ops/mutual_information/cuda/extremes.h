// The value ranges of the images and the largest weight, found on the device.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/cuda/counting.h"

namespace regkernels {
namespace {

template <class T>
__device__ T warp_highest(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// The extremes of finite values.
template <class T>
struct Extremes {
  T highest[kExtremes];

  __device__ explicit Extremes(bool masked) {
    for (int k = 0; k < kExtremes; ++k) highest[k] = -INFINITY;
    highest[kHighMask] = masked ? T(0) : T(1);
  }
  __device__ void see(int minus_low, int high, T value) {
    if (!isfinite(value)) return;
    highest[minus_low] = max(highest[minus_low], -value);
    highest[high] = max(highest[high], value);
  }
  // Combines the extremes that the threads of the block have seen. All threads get the result.
  __device__ void combine() {
    __shared__ T shared[kWarps][kExtremes];
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      const T highest_of_warp = warp_highest(highest[k]);
      if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp][k] = highest_of_warp;
    }
    __syncthreads();
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      for (int warp = 0; warp < kWarps; ++warp) highest[k] = max(highest[k], shared[warp][k]);
    }
  }
};

// Each block finds the extremes of one part of an element, (elements, parts, kExtremes).
template <class T>
__global__ void __launch_bounds__(kThreads)
    extremes_kernel(const __grid_constant__ HistogramOperands<T> images, int64_t elements,
                    bool own_range, T* extremes) {
  const int64_t part = blockIdx.x, parts = gridDim.x;
  for (int64_t element = blockIdx.y; element < elements; element += gridDim.y) {
    const auto [group, item, channel] = images.space().index(element);
    const int64_t samples = images.own.of(group);
    const int64_t begin = samples * part / parts, end = samples * (part + 1) / parts;
    const T* const pred = images.pred.at(group, item, channel);
    const T* const target = images.target.at(group, item, channel);
    const T* const mask = images.mask.present() ? images.mask.at(group, item, channel) : nullptr;
    Extremes<T> found(mask != nullptr);
    if (own_range) {
#pragma unroll 8
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        found.see(kMinusLowPred, kHighPred, pred[i]);
        found.see(kMinusLowTarget, kHighTarget, target[i]);
      }
    }
    if (mask != nullptr) {
#pragma unroll 4
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const T weight = mask[i];
        found.highest[kHighMask] = max(found.highest[kHighMask], isfinite(weight) ? weight : T(0));
      }
    }
    __syncthreads();
    found.combine();
    if (threadIdx.x < kExtremes) {
      const int k = threadIdx.x;
      // The choice is unrolled: an index into registers would send them to memory.
      T value = found.highest[0];
      REGKERNELS_UNROLL
      for (int other = 1; other < kExtremes; ++other) {
        if (k == other) value = found.highest[other];
      }
      extremes[(element * parts + part) * kExtremes + k] = value;
    }
  }
}

// Combines the extremes of all parts of an element, if there are any, for all threads.
template <class T>
__device__ void combine_parts(const ScaleOperands<T>& scales, const ElementIndex& index,
                              T (&combined)[kExtremes]) {
  __syncthreads();
  const T* const parts = scales.extremes_of(index);
  if (parts != nullptr && threadIdx.x < kWarp) {
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      T highest = -INFINITY;
      for (int part = threadIdx.x; part < scales.parts; part += kWarp) {
        highest = max(highest, parts[part * kExtremes + k]);
      }
      highest = warp_highest(highest);
      if (threadIdx.x == 0) combined[k] = highest;
    }
  }
  __syncthreads();
}

// All threads get the result.
template <class T>
__device__ PairScale<T> read_scale(const ScaleOperands<T>& scales, int64_t element) {
  __shared__ T combined[kExtremes];
  const ElementIndex index = scales.space.index(element);
  combine_parts(scales, index, combined);
  return scales.scale(index, combined);
}

// Each block, of a warp, combines the extremes of one element.
template <class T>
__global__ void __launch_bounds__(kWarp)
    combine_kernel(const __grid_constant__ ScaleOperands<T> scales, int64_t elements, T* output) {
  __shared__ T combined[kExtremes];
  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    combine_parts(scales, scales.space.index(element), combined);
    if (threadIdx.x < kExtremes) output[element * kExtremes + threadIdx.x] = combined[threadIdx.x];
  }
}

}  // namespace
}  // namespace regkernels

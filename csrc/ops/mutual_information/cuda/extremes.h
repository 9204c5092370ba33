// The value ranges of the images and the largest weight, found on the device.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/cuda/counting.h"

namespace regkernels {
namespace {

template <class T>
__device__ T warp_least(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = min(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// The extremes of finite values. The lowest are kept with the sign changed, so that all are
// highest.
template <class T>
struct Extremes {
  T highest[kExtremes];

  __device__ Extremes() {
    for (int k = 0; k < kExtremes; ++k) highest[k] = -INFINITY;
    highest[kHighMask] = 0;
  }
  __device__ void see(int low, int high, T value) {
    if (!isfinite(value)) return;
    highest[low] = max(highest[low], -value);
    highest[high] = max(highest[high], value);
  }
  // Combines the extremes that the threads of the block have seen. All threads get the result.
  __device__ void combine() {
    __shared__ T shared[kWarps][kExtremes];
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      const T highest_of_warp = -warp_least(-highest[k]);
      if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp][k] = highest_of_warp;
    }
    __syncthreads();
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      for (int warp = 0; warp < kWarps; ++warp) highest[k] = max(highest[k], shared[warp][k]);
    }
  }
};

// Each block finds the extremes of one part of an element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    extremes_kernel(const __grid_constant__ Counting<T> call, bool own_range, T* extremes) {
  const int64_t part = blockIdx.x, parts = gridDim.x;
  const int64_t begin = call.samples * part / parts, end = call.samples * (part + 1) / parts;
  for (int64_t element = blockIdx.y; element < call.elements; element += gridDim.y) {
    const auto [group, item, channel] = call.space.index(element);
    const T* const pred = call.pred.at(group, item, channel);
    const T* const target = call.target.at(group, item, channel);
    const T* const mask = call.mask.present() ? call.mask.at(group, item, channel) : nullptr;
    Extremes<T> found;
    if (own_range) {
#pragma unroll 8
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        found.see(kLowPred, kHighPred, pred[i]);
        found.see(kLowTarget, kHighTarget, target[i]);
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
      const bool low = k == kLowPred || k == kLowTarget;
      extremes[(element * parts + part) * kExtremes + k] = low ? -value : value;
    }
  }
}

// Combines what extremes_kernel has found in all parts of an element. All threads get the result.
template <class T>
__device__ PairScale<T> read_scale(const Counting<T>& call, int64_t element) {
  __shared__ T shared[kExtremes];
  __syncthreads();
  if (call.extremes != nullptr && threadIdx.x < kWarp) {
    const T* const parts = call.extremes + element * call.extreme_parts * kExtremes;
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      const T sign = k == kLowPred || k == kLowTarget ? T(1) : T(-1);
      T least = INFINITY;
      for (int part = threadIdx.x; part < call.extreme_parts; part += kWarp) {
        least = min(least, sign * parts[part * kExtremes + k]);
      }
      least = warp_least(least);
      if (threadIdx.x == 0) shared[k] = sign * least;
    }
  }
  __syncthreads();
  const auto [group, item, channel] = call.space.index(element);
  const T* const given =
      call.value_range.data == nullptr ? nullptr : call.value_range.at(group, item);
  return PairScale<T>::from(given, call.joint_range, shared, call.mask.present());
}

}  // namespace
}  // namespace regkernels

// How the losses end: the sum over a group, and the gradients of empty images.
#pragma once

#include <cstdint>

#include "core/op.h"
#include "core/reduce.h"

namespace regkernels {

// Clears the gradients that a call asks for. This is all there is to do where images are empty.
template <class Device>
void clear_gradients(const Device& device, const Call& call) {
  for (const char* name : {"grad_pred", "grad_target"}) {
    if (call.output(name).present) clear(device, call.output(name));
  }
}

#ifdef __CUDACC__

// The sum over the threads of a block, of which there are kThreads. The first thread gets it; the
// others get 0. `shared` has room for a value of each warp.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += shared[warp];
  }
  __syncthreads();
  return sum;
}

inline constexpr int kTotalThreads = 512;

// One block computes the total of one group: scale * (sum of its terms), divided by the group's
// weight if there are weights. Where that is 0, so is the total.
template <class Term, class T>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const Term* terms, int64_t count, int64_t stride, double scale, const T* weights,
                 T* totals) {
  __shared__ double shared[kTotalThreads / kWarp];
  const int64_t group = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += terms[group * stride + i];
  sum = block_sum<kTotalThreads>(sum, shared);
  if (threadIdx.x == 0) {
    if (weights != nullptr) sum = weights[group] > 0 ? sum / weights[group] : 0;
    totals[group] = static_cast<T>(scale * sum);
  }
}

// The totals of all groups. Those of one group are `count` terms; the next group's begin `stride`
// terms further on. `weights` may be null.
template <class Term, class T>
void sum_groups(const Cuda& device, int64_t groups, const Term* terms, int64_t count,
                int64_t stride, double scale, const T* weights, T* totals) {
  if (groups == 0) return;
  total_kernel<<<static_cast<unsigned>(groups), kTotalThreads, 0, device.stream>>>(
      terms, count, stride, scale, weights, totals);
  check_launch();
}

#endif

}  // namespace regkernels

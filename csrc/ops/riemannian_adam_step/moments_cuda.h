// What CUDA's kernels that make moments have in common.
#pragma once

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "ops/riemannian_adam_step/maths.h"

namespace regkernels {

template <class T, class M, int D>
struct Moments {
  AdamRules<T> rules;
  Operand<const T> gradient;
  Operand<const M> mu, nu;
  Operand<M> next_mu, next_nu;
  T* longest;  // one for each of the batch
  int64_t items, batch;
  int64_t voxels;  // of an item
  int64_t plane_voxels;
  int64_t depth;   // planes at hand
  int64_t planes;  // of the whole volume
  int64_t uncounted;
  FirstPlane first_plane;

  Moments(const Call& call, const AdamCall& checked, const Tensor& gradient, const Tensor& longest)
      : rules(call, checked, call.input("scale")),
        gradient(gradient),
        mu(call.input("mu")),
        nu(call.input("nu")),
        next_mu(call.output("next_mu")),
        next_nu(call.output("next_nu")),
        longest(longest.as<T>()),
        items(checked.batch.items),
        batch(checked.batch.groups * checked.batch.items),
        voxels(checked.sizes.voxels()),
        plane_voxels(checked.sizes.y * checked.sizes.x),
        depth(checked.sizes.z),
        planes(checked.planes),
        uncounted(checked.uncounted),
        first_plane(call.slab) {}

  // The planes that count, of those at hand: none beyond the end of the whole volume.
  __device__ __forceinline__ int64_t first_counted() const { return uncounted; }
  __device__ __forceinline__ int64_t end_of_counted() const {
    return min(depth - uncounted, planes - first_plane());
  }
  // The number of the first number at hand, in the whole volume.
  __device__ __forceinline__ int64_t first_number() const {
    return first_plane() * plane_voxels * D;
  }
};

// The greatest of the threads of a warp.
template <class Bits>
__device__ __forceinline__ Bits greatest_of_warp(Bits bits) {
  REGKERNELS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
  }
  return bits;
}

// Makes the longest vector of an item as long as one whose squared length has these bits. It is a
// maximum, so that its bits depend neither on the number of threads nor on their order.
template <class T>
__device__ __forceinline__ void lengthen(T* longest, typename BitsOf<T>::type squared) {
  const T length = sqrt(value_of_bits<T>(squared));
  atomicMax(reinterpret_cast<typename BitsOf<T>::type*>(longest), magnitude_bits(length));
}

// Makes the moments of a gradient that is smoothed on its way, by one kernel.
template <class T, class M, int D>
void find_smooth_moments(const Cuda& device, const Moments<T, M, D>& moments,
                         const GaussianSmoothCall& smoothing);

}  // namespace regkernels

// The gradient of the array that is sampled, on CUDA, with the same bits every time.
//
// Floating-point sums depend on their order, and atomics have none; sums of integers do not. Every
// contribution is rounded to a multiple of a quantum, a power of two that is as small as the sum of
// all that could meet in one place allows in 64 bits. Let m be the largest finite magnitude among
// the cotangents of a target array and 2^k at least the number of voxels that contribute to it. The
// quantum is below m 2^(k-61), and a sum of n contributions is off by at most n/2 of it: far less
// than float32 rounds, but more than float64 does. In float32 most contributions have been added up
// before, as other integers: see scatter_cuda.h.
//
// What is not finite stays out of this and is added as it is, since the sum of infinities and NaN
// does not depend on the order either.
#pragma once

#ifdef __CUDACC__

#include <algorithm>
#include <cstdint>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "maths/vec.h"

namespace regkernels {

// The type that 64-bit atomics take. Sums are in two's complement.
using Fixed = unsigned long long;

// The bits of a finite number's magnitude, which are in the order of the magnitudes; 0 for any
// other.
__device__ __forceinline__ Fixed magnitude_bits(double value) {
  const double magnitude = fabs(value);
  return isfinite(magnitude) ? static_cast<Fixed>(__double_as_longlong(magnitude)) : 0;
}

// The base-2 logarithm of the number of quanta per unit. `largest` is at most 2^(exponent + 1).
__device__ __forceinline__ int fixed_point_bits(Fixed largest, int contributor_bits) {
  const int exponent = static_cast<int>(largest >> 52) - 1023;
  const int bits = 61 - contributor_bits - exponent;
  return bits < 1000 ? bits : 1000;  // 2^bits has to be a double, for subnormal cotangents too
}
__device__ __forceinline__ double power_of_two(int exponent) {
  return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
}

// Elements of one batch element that a block takes, several for each thread: their loads are under
// way together.
inline constexpr int kFlatThreads = 256, kFlatElements = 8;
inline constexpr int kFlatBlock = kFlatThreads * kFlatElements;

inline dim3 flat_grid(int64_t count, int64_t batch) {
  return {static_cast<unsigned>((count + kFlatBlock - 1) / kFlatBlock),
          static_cast<unsigned>(std::min<int64_t>(batch, 65535))};
}

// Finds the largest finite magnitude of the values of each batch element. Several may share one.
template <class S>
__global__ void __launch_bounds__(kFlatThreads)
    largest_magnitude_kernel(const __grid_constant__ Operand<const S> values,
                             const __grid_constant__ Operand<Fixed> largest, int64_t count,
                             int64_t items, int64_t batch) {
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const S* const mine = values.at(b / items, b % items);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kFlatBlock + threadIdx.x;
    S value[kFlatElements];
    REGKERNELS_UNROLL
    for (int k = 0; k < kFlatElements; ++k) {
      const int64_t i = begin + k * kFlatThreads;
      value[k] = i < count ? mine[i] : S{};
    }
    Fixed bits = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < kFlatElements; ++k) {
      bits = max(bits, magnitude_bits(to_arithmetic(value[k])));
    }
    REGKERNELS_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
    }
    // Hardly any warp finds a larger number than those before, so hardly any has to write.
    Fixed* const result = largest.at(b / items, b % items);
    if (threadIdx.x % kWarp == 0 && bits > __ldcg(result)) atomicMax(result, bits);
  }
}

// The sums of a call.
struct FixedSums {
  Operand<const Fixed> largest;
  Operand<Fixed> sums;
  int contributor_bits;

  // The number of quanta per unit.
  __device__ __forceinline__ double quanta(int64_t group, int64_t item) const {
    return power_of_two(fixed_point_bits(*largest.at(group, item), contributor_bits));
  }
};

template <class R>
struct FixedPointScatter {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;

  R resampling;
  Operand<const S> grad_output;
  FixedSums fixed;
  Operand<T> not_finite;

  struct Element {
    typename R::Element source;
    const FixedPointScatter* self;
    const S* grad;
    double quanta;
    Fixed* sums;
    T* not_finite;

    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      if (!voxel.active) return;
      const R& r = self->resampling;
      T weight[1 << D];
      const Vec<int, D> cell =
          source.corner_weights(source.position(voxel, source.vector(voxel)), weight);
      const int64_t here = source.voxel_offset(voxel);
      const int64_t corner0 = r.voxel_offset(cell);
      for (int channel = 0; channel < r.in_layout.count(); ++channel) {
        const T g = to_arithmetic(grad[r.out_layout.at(here, channel)]);
        REGKERNELS_UNROLL
        for (int corner = 0; corner < (1 << D); ++corner) {
          if (weight[corner] == 0) continue;
          const int64_t place = r.in_layout.at(corner0 + r.corner_offset(corner), channel);
          const T value = weight[corner] * g;
          if (isfinite(value)) {
            const long long rounded = __double2ll_rn(static_cast<double>(value) * quanta);
            atomicAdd(sums + place, static_cast<Fixed>(rounded));
          } else {
            atomicAdd(not_finite + place, value);
          }
        }
      }
    }
  };
  __device__ __forceinline__ Element element(int64_t group, int64_t item) const {
    const auto source = resampling.element(group, item);
    return {source,
            this,
            grad_output.at(group, item),
            fixed.quanta(group, item),
            source.plane_zero(fixed.sums.at(group, item)),
            source.plane_zero(not_finite.at(group, item))};
  }
};

// Adds the sums of finite contributions to `result`, where those of all others are already.
template <class T>
__global__ void __launch_bounds__(kFlatThreads)
    from_fixed_point_kernel(const __grid_constant__ FixedSums fixed,
                            const __grid_constant__ Operand<T> result, int64_t count, int64_t items,
                            int64_t batch) {
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const Fixed* const sums = fixed.sums.at(b / items, b % items);
    T* const to = result.at(b / items, b % items);
    const double quantum = 1 / fixed.quanta(b / items, b % items);
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * kFlatBlock + threadIdx.x;
    Fixed sum[kFlatElements];
    T other[kFlatElements];
    REGKERNELS_UNROLL
    for (int k = 0; k < kFlatElements; ++k) {
      const int64_t i = begin + k * kFlatThreads;
      sum[k] = i < count ? sums[i] : 0;
      other[k] = i < count ? to[i] : T(0);
    }
    REGKERNELS_UNROLL
    for (int k = 0; k < kFlatElements; ++k) {
      const int64_t i = begin + k * kFlatThreads;
      const double finite = static_cast<double>(static_cast<long long>(sum[k])) * quantum;
      if (i < count) to[i] = other[k] + static_cast<T>(finite);
    }
  }
}

inline int bits_to_count(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// Calls add(fixed) to add up what is finite in `sums`, of the shape of `grad_input`, and what is
// not in `grad_input`, and brings both together there. `largest` has one entry for each batch
// element. What a voxel adds to one place is below 2^weight_bits times its cotangent.
template <class S, class T, class Add>
void in_fixed_point(const Cuda& device, const VoxelSpace& space, const Tensor& grad_output,
                    const Tensor& grad_input, const Tensor& sums, const Tensor& largest,
                    const Add& add, int weight_bits = 0) {
  for (const Tensor* tensor : {&sums, &largest}) clear(device, *tensor);
  const bool shared = grad_input.shape[1] != space.items;
  const int contributor_bits =
      bits_to_count(space.rows() * space.x * (shared ? space.items : int64_t{1})) + weight_bits;
  const int64_t cotangents = grad_output.shape.count(2), batch = space.batch();
  largest_magnitude_kernel<<<flat_grid(cotangents, batch), kFlatThreads, 0, device.stream>>>(
      Operand<const S>(grad_output), Operand<Fixed>(largest), cotangents, space.items, batch);
  check_launch();
  const FixedSums fixed{Operand<const Fixed>(largest), Operand<Fixed>(sums), contributor_bits};
  add(fixed);
  const int64_t targets = grad_input.shape.count(2), items = grad_input.shape[1];
  from_fixed_point_kernel<<<flat_grid(targets, grad_input.shape[0] * items), kFlatThreads, 0,
                            device.stream>>>(fixed, Operand<T>(grad_input), targets, items,
                                             grad_input.shape[0] * items);
  check_launch();
}

}  // namespace regkernels

#endif

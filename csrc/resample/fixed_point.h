// The gradient of the array that is sampled, on CUDA, with the same bits every time.
//
// Floating-point sums depend on their order, and atomics have none; sums of integers do not. Every
// contribution is rounded to a multiple of a quantum, a power of two that is as small as the sum of
// all that could meet in one place allows in 64 bits. Let m be the largest finite magnitude among
// the cotangents of a target array and 2^k at least the number of voxels that contribute to it. The
// quantum is below m 2^(k-61), and a sum of n contributions is off by at most n/2 of it: far less
// than float32 rounds, but more than float64 does.
//
// What is not finite stays out of this and is added as it is, since the sum of infinities and NaN
// does not depend on the order either.
#pragma once

#ifdef __CUDACC__

#include <cstdint>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/reduce.h"

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

// A loop over voxels takes the elements of one batch element as rows of this length.
inline constexpr int kFlatRow = 1024;
inline VoxelSpace flat_space(int64_t groups, int64_t items, int64_t count) {
  return {groups, items, 1, static_cast<int>((count + kFlatRow - 1) / kFlatRow), kFlatRow};
}

template <class S>
struct LargestMagnitude {
  Operand<const S> values;
  Operand<Fixed> largest;
  int64_t count;  // elements of one batch element

  struct Element {
    const S* values;
    Fixed* largest;
    int64_t count;
    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      const int64_t i = static_cast<int64_t>(voxel.y) * kFlatRow + voxel.x;
      Fixed bits = i < count ? magnitude_bits(to_arithmetic(values[i])) : 0;
      REGKERNELS_UNROLL
      for (int step = kWarp / 2; step > 0; step /= 2) {
        bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, step));
      }
      // Hardly any warp finds a larger number than those before, so hardly any has to write.
      if (threadIdx.x == 0 && bits > __ldcg(largest)) atomicMax(largest, bits);
    }
  };
  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {values.at(group, item), largest.at(group, item), count};
  }
};

template <class R>
struct FixedPointScatter {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;

  R resampling;
  Operand<const S> grad_output;
  Operand<const Fixed> largest;
  Operand<Fixed> sums;
  Operand<T> not_finite;
  int contributor_bits;

  struct Element {
    typename R::Element source;
    const FixedPointScatter* self;
    const S* grad;
    const Fixed* largest;
    Fixed* sums;
    T* not_finite;

    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      if (!voxel.active) return;
      const R& r = self->resampling;
      T weight[1 << D];
      const Vec<int, D> cell =
          source.corner_weights(source.position(voxel, source.vector(voxel)), weight);
      const double quanta = power_of_two(fixed_point_bits(*largest, self->contributor_bits));
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
  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const auto source = resampling.element(group, item);
    return {source,
            this,
            grad_output.at(group, item),
            largest.at(group, item),
            source.plane_zero(sums.at(group, item)),
            source.plane_zero(not_finite.at(group, item))};
  }
};

// Adds the sums of finite contributions to `result`, where those of all others are already.
template <class T>
struct FromFixedPoint {
  Operand<const Fixed> largest;
  Operand<const Fixed> sums;
  Operand<T> result;
  int64_t count;
  int contributor_bits;

  struct Element {
    const FromFixedPoint* self;
    const Fixed* largest;
    const Fixed* sums;
    T* result;
    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      const int64_t i = static_cast<int64_t>(voxel.y) * kFlatRow + voxel.x;
      if (i >= self->count) return;
      const double quantum = power_of_two(-fixed_point_bits(*largest, self->contributor_bits));
      result[i] += static_cast<T>(static_cast<double>(static_cast<long long>(sums[i])) * quantum);
    }
  };
  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, largest.at(group, item), sums.at(group, item), result.at(group, item)};
  }
};

inline int bits_to_count(int64_t count) {
  int bits = 0;
  while ((int64_t{1} << bits) < count) ++bits;
  return bits;
}

// `sums` has the shape of `grad_input`, `largest` one entry for each of its batch elements.
template <class R>
void scatter_in_fixed_point(const Cuda& device, const VoxelSpace& space, const R& resampling,
                            const Tensor& grad_output, const Tensor& grad_input, const Tensor& sums,
                            const Tensor& largest) {
  using S = typename R::S;
  using T = typename R::T;
  for (const Tensor* tensor : {&grad_input, &sums, &largest}) clear(device, *tensor);
  const bool shared = grad_input.shape[1] != space.items;
  const int contributor_bits =
      bits_to_count(space.rows() * space.x * (shared ? space.items : int64_t{1}));
  const int64_t cotangents = grad_output.shape.count(2);
  for_each_voxel(
      device, flat_space(space.groups, space.items, cotangents),
      LargestMagnitude<S>{Operand<const S>(grad_output), Operand<Fixed>(largest), cotangents});
  for_each_voxel(
      device, space,
      FixedPointScatter<R>{resampling, Operand<const S>(grad_output), Operand<const Fixed>(largest),
                           Operand<Fixed>(sums), Operand<T>(grad_input), contributor_bits});
  const int64_t targets = grad_input.shape.count(2);
  for_each_voxel(device, flat_space(grad_input.shape[0], grad_input.shape[1], targets),
                 FromFixedPoint<T>{Operand<const Fixed>(largest), Operand<const Fixed>(sums),
                                   Operand<T>(grad_input), targets, contributor_bits});
}

}  // namespace regkernels

#endif

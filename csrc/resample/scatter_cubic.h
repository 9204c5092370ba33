// The gradient of an array that is sampled by cubic weights.
//
// On the CPU it goes as in scatter_cpu.h. On CUDA every contribution goes to global memory by
// itself, in floating point or, where the bits must be the same every time, in fixed point.
#pragma once

#include <algorithm>
#include <cstdint>

#include "resample/cubic.h"
#include "resample/scatter_cpu.h"
#include "resample/scatter_cuda.h"

namespace regkernels {

// Calls add(offset, plane, weight) for each tap of a sample that counts.
template <class R, class Add>
REGKERNELS_HD void for_each_tap(const typename R::Element& source,
                                const Vec<typename R::T, R::D>& p, const Add& add) {
  using T = typename R::T;
  constexpr int D = R::D;
  source.sample(p, [&](const auto& taps, auto checked) {
    constexpr bool kChecked = decltype(checked)::value;
    source.template for_each_row<kChecked>(taps, [&](int64_t offset, int j, int k) {
      const T factor = R::Element::row_factor(taps, j, k);
      if (kChecked && factor == 0) return;
      const int slow = D == 3 ? k : j;
      const int plane = kChecked ? taps[D - 1].index[slow] : taps[D - 1].index[0] + slow;
      REGKERNELS_UNROLL
      for (int i = 0; i < kTaps; ++i) {
        const T weight = factor * taps[0].weight[i];
        if (kChecked && weight == 0) continue;
        add(offset + R::Element::template along_x<kChecked>(taps, i), plane, weight);
      }
    });
  });
}

template <class Plain>
struct Scatter<CubicResampling<Plain>> {
  using R = CubicResampling<Plain>;
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;

  const R& resampling;
  typename R::Element source;
  int low, high;
  const S* grad;
  T* target;

  void operator()(const Voxel& voxel) const {
    const Vec<T, D> p = source.position(voxel, source.vector(voxel));
    const int64_t here = source.voxel_offset(voxel);
    constexpr int kPixel = R::Layout::kPixel;
    for (int channel = 0; channel < resampling.in_layout.count(); channel += kPixel) {
      T g[kPixel];
      for (int c = 0; c < kPixel; ++c) {
        g[c] = to_arithmetic(grad[resampling.out_layout.at(here, channel + c)]);
      }
      for_each_tap<R>(source, p, [&](int64_t offset, int plane, T weight) {
        if (plane < low || plane >= high) return;
        T* const place = target + resampling.in_layout.at(offset, channel);
        for (int c = 0; c < kPixel; ++c) place[c] += weight * g[c];
      });
    }
  }
};

// The planes of the target beyond which nothing of a row of voxels falls.
template <class Plain>
Reach row_reach(const CubicResampling<Plain>&,
                const typename CubicResampling<Plain>::Element& source, int z, int y, int size) {
  using T = typename Plain::T;
  constexpr int D = Plain::D, kSlow = D - 1;
  const int last = source.self->boundary.size[kSlow] - 1;
  const bool reflects = source.self->boundary.sampling.padding == Padding::kReflection;
  Reach reach = {INT32_MAX, INT32_MIN};
  for (int x = 0; x < size; ++x) {
    const Voxel voxel{z, y, x, true, x, size};
    const T p = source.position(voxel, source.vector(voxel))[kSlow];
    const T end = static_cast<T>(last);
    if (reflects && !(p >= 0 && p <= end)) return {0, last};
    // A sample outside reaches the planes at the border, or none.
    const T q = p > 0 ? p < end ? p : end : T(0);
    const int plane = static_cast<int>(q);
    reach.low = std::min(reach.low, plane - 1);
    reach.high = std::max(reach.high, plane + 2);
  }
  return reach;  // mirrored taps of a sample within the volume lie in it, too
}

#ifdef __CUDACC__

// Calls target.add(place, value) for all that the voxels contribute. `targets` is made for a batch
// element by make(source, group, item).
template <class R, class MakeTarget>
struct CubicScatter {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = 1, kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 1 : 2;

  R resampling;
  Operand<const S> grad_output;
  MakeTarget make;

  using Target = typename MakeTarget::Target;

  struct Element {
    typename R::Element source;
    const CubicScatter* self;
    const S* grad;
    Target target;

    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      if (!voxel.active) return;
      const R& r = self->resampling;
      const Vec<T, D> p = source.position(voxel, source.vector(voxel));
      const int64_t here = source.voxel_offset(voxel);
      constexpr int kPixel = R::Layout::kPixel;
#pragma unroll 1
      for (int channel = 0; channel < r.in_layout.count(); channel += kPixel) {
        T g[kPixel];
        REGKERNELS_UNROLL
        for (int c = 0; c < kPixel; ++c) {
          g[c] = to_arithmetic(grad[r.out_layout.at(here, channel + c)]);
        }
        for_each_tap<R>(source, p, [&](int64_t offset, int, T weight) {
          const int64_t place = r.in_layout.at(offset, channel);
          REGKERNELS_UNROLL
          for (int c = 0; c < kPixel; ++c) target.add(place + c, weight * g[c]);
        });
      }
    }
  };
  __device__ __forceinline__ Element element(int64_t group, int64_t item) const {
    const auto source = resampling.element(group, item);
    return {source, this, grad_output.at(group, item), make(source, group, item)};
  }
};

template <class T>
struct MakeFloatTarget {
  using Target = FloatTarget<T>;
  Operand<T> sums;

  template <class Source>
  __device__ __forceinline__ Target operator()(const Source& source, int64_t group,
                                               int64_t item) const {
    return {source.plane_zero(sums.at(group, item))};
  }
};

template <class T>
struct MakeFixedTarget {
  using Target = FixedTarget<T>;
  FixedSums fixed;
  Operand<T> not_finite;

  template <class Source>
  __device__ __forceinline__ Target operator()(const Source& source, int64_t group,
                                               int64_t item) const {
    return {source.plane_zero(fixed.sums.at(group, item)),
            source.plane_zero(not_finite.at(group, item)), fixed.quanta(group, item)};
  }
};

// What the contributions of a voxel to one place add up to, in size, is below 2^2 of its cotangent:
// 1.375^3 at most.
inline constexpr int kCubicWeightBits = 2;

template <class Plain>
void scatter(const Cuda& device, const VoxelSpace& space, const CubicResampling<Plain>& resampling,
             const Tensor& grad_output, const Tensor& grad_input,
             const ScatterWorkspace& workspace) {
  using R = CubicResampling<Plain>;
  using S = typename R::S;
  using T = typename R::T;
  clear(device, grad_input);
  if (space.empty()) return;
  const Operand<const S> cotangents(grad_output);
  const Operand<T> sums(grad_input);
  if (workspace.fixed_sums->present) {
    in_fixed_point<S, T>(
        device, space, grad_output, grad_input, *workspace.fixed_sums, *workspace.largest,
        [&](const FixedSums& fixed) {
          using Make = MakeFixedTarget<T>;
          for_each_voxel(device, space,
                         CubicScatter<R, Make>{resampling, cotangents, Make{fixed, sums}});
        },
        kCubicWeightBits);
  } else {
    using Make = MakeFloatTarget<T>;
    for_each_voxel(device, space, CubicScatter<R, Make>{resampling, cotangents, Make{sums}});
  }
}

#endif

}  // namespace regkernels

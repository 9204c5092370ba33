#pragma once

#include <cmath>
#include <limits>

#include "maths/matrix.h"
#include "maths/voxel_vectors.h"
#include "ops/invert_displacement/call.h"
#include "ops/invert_displacement/invert_displacement.h"
#include "resample/with_resampling.h"

namespace regkernels {

// Finds for every voxel y the root e of e + u(y + e), by Newton's method with the derivative of the
// interpolated field. A step that does not bring the error down is halved, and after some halvings
// replaced by one of the fixed-point iteration e <- -u(y + e), which needs no derivative. All
// lengths are in voxels. R samples the displacement; its field is the initial guess.
template <class R>
struct DisplacementInversion {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = 1;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = 2;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr T kSmallestFraction = T(1) / 16;

  R resampling;
  Operand<T> output;
  Operand<float> residual;  // may be absent
  T tolerance;
  int max_iterations;

  struct Error {
    Vec<T, D> value;        // e + u(y + e)
    Matrix<T, D> jacobian;  // its derivative with respect to e
    REGKERNELS_HD T size() const {
      T sum = 0;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) sum += value[k] * value[k];
      return sqrt(sum);
    }
    // The step is not finite where the derivative has no inverse.
    REGKERNELS_HD Vec<T, D> newton_step() const {
      const T scale = -1 / determinant(jacobian);
      Vec<T, D> step{};
      REGKERNELS_UNROLL
      for (int i = 0; i < D; ++i) {
        REGKERNELS_UNROLL
        for (int j = 0; j < D; ++j) step[i] += cofactor(jacobian, j, i) * value[j];
        step[i] *= scale;
      }
      return step;
    }
  };

  struct Element {
    typename R::Element source;
    const DisplacementInversion* self;
    T* output;
    float* residual;

    REGKERNELS_HD Error error(const Vec<int, D>& y, const Vec<T, D>& e) const {
      const Frame<T, D>& frame = self->resampling.map.in;
      Vec<T, D> p;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) p[k] = static_cast<T>(y[k]) + e[k];
      Error result;
      source.sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>& slope) {
        constexpr bool kChecked = decltype(checked)::value;
        for_each_channel(self->resampling.in_layout, [&](int channel) {
          // Along an axis without extent there is no displacement, not even one that is not finite.
          const T half = frame.half[channel];
          T corners[1 << D];
          source.template load_corners<kChecked>(cell, channel, corners);
          const T u = half == 0 ? T(0) : half * sample_value<kChecked>(cell, corners);
          result.value[channel] = e[channel] + u;
          const Vec<T, D> gradient = sample_gradient<kChecked>(cell, corners);
          REGKERNELS_UNROLL
          for (int k = 0; k < D; ++k) {
            const T factor = kChecked ? half * slope[k] : half;
            result.jacobian.m[channel][k] =
                (channel == k ? T(1) : T(0)) + (factor == 0 ? T(0) : factor * gradient[k]);
          }
        });
        // Where a slab cannot tell, a step was too long.
        if (R::kSlab && cell.index[D - 1] == kUnanswered) result.value[0] = kInfinity;
      });
      return result;
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Frame<T, D>& frame = self->resampling.map.in;
      const Vec<int, D> y = source.place(voxel);
      Vec<T, D> best = source.vector(voxel);
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        best[k] *= frame.half[k];
        const bool is_finite = best[k] > -kInfinity && best[k] < kInfinity;
        if (!is_finite) best[k] = 0;
      }
      T least = kInfinity;
      Vec<T, D> tried = best, opposite{}, step{};
      T fraction = 1;
      bool is_newton = true;
      REGKERNELS_NO_UNROLL
      for (int n = 0; n < self->max_iterations; ++n) {
        const Error found = error(y, tried);
        const T size = found.size();
        if (size < least) {
          best = tried;
          least = size;
          if (least <= self->tolerance) break;
          step = found.newton_step();
          opposite = found.value;
          is_newton = true;
          fraction = 1;
        } else {
          fraction *= T(0.5);
          if (fraction < kSmallestFraction) {
            if (!is_newton) break;
            REGKERNELS_UNROLL
            for (int k = 0; k < D; ++k) step[k] = -opposite[k];
            is_newton = false;
            fraction = 1;
          }
        }
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) tried[k] = best[k] + fraction * step[k];
      }
      const int64_t row = voxel.row(frame.size);
      if (residual != nullptr && voxel.active) residual[row + voxel.x] = static_cast<float>(least);
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) best[k] *= frame.inverse[k];
      store_packed(output + row * D, voxel, best);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, output.at(group, item),
            residual.at(group, item)};
  }
};

template <class Device>
void invert_displacement(const Device& device, const Call& call) {
  const auto& checked = call.checked<InvertDisplacementCall>();
  const Tensor absent;
  ResampleCall resample;
  resample.input = &call.input("displacement");
  resample.affine = &absent;
  resample.field = &call.input("initial");
  resample.in_sizes = checked.in_sizes;
  resample.out_sizes = checked.sizes;
  resample.slab = call.slab;
  resample.sampling = {Mode::kBilinear, call.choice<Padding>("padding_mode"),
                       call.flag("align_corners")};
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      const auto invert = [&](auto is_slab) {
        constexpr bool kSlab = decltype(is_slab)::value;
        const auto resampling = make_resampling<T, T, D, false, true, kSlab>(
            resample, ChannelsLast<D>{}, ChannelsLast<D>{});
        using R = std::decay_t<decltype(resampling)>;
        for_each_voxel(device, space,
                       DisplacementInversion<R>{resampling, Operand<T>(call.output("output")),
                                                Operand<float>(call.output("residual")),
                                                static_cast<T>(call.number("tolerance")),
                                                static_cast<int>(call.integer("max_iterations"))});
      };
      if constexpr (D == 3) {
        if (call.slab.present()) return invert(std::true_type{});
      }
      invert(std::false_type{});
    });
  });
}

}  // namespace regkernels

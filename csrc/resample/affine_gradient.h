// The gradient with respect to the affine that places the samples.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/for_each.h"
#include "core/operand.h"
#include "maths/voxel_vectors.h"
#include "resample/neighbours.h"
#include "resample/resampling.h"

namespace regkernels {

// The gradient of an affine is made of sums over voxels. For each row j of the affine they are
// those of grad_p[j] * q[k] and of grad_p[j] itself, where q is what the matrix acts on (see
// PositionMap::source).
template <class R>
struct AffineMoments {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kSums = D * (D + 1);
  static constexpr int kMinBlocks = R::kCubic ? (sizeof(T) == sizeof(double) ? 1 : 2) : 4;

  R resampling;
  Operand<const S> grad_output;

  struct Element {
    typename R::Element source;
    const AffineMoments* self;
    const S* grad;

    REGKERNELS_HD void operator()(const Voxel& voxel, T (&sums)[kSums]) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const Vec<T, D> grad_p = source.position_gradient(
          source.position(voxel, u), source.template out_pointer<R::Layout::kPixel>(grad, voxel));
      const Vec<T, D> q = r.map.template source<R::kField>(source.place(voxel), u);
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          // Where a displacement is not finite, the sample lies outside and its gradient is 0.
          const bool counts = !R::kField || grad_p[j] != 0;
          sums[j * (D + 1) + k] += counts ? grad_p[j] * q[k] : T(0);
        }
        sums[j * (D + 1) + D] += grad_p[j];
      }
    }

    static constexpr bool kComputesRows = R::kComputesNeighbours;
    static constexpr int kLanes = 16;
    using Lanes = T[kSums][kLanes];

    void row(int z, int y, int size, T (&sums)[kSums]) const {
      const auto sample_alone = [&](int x) {
        compute_voxel(*this, Voxel{z, y, x, true, x, size}, sums);
      };
      if (!R::Layout::kLast && self->resampling.in_layout.count() > 1) {
        for (int x = 0; x < size; ++x) sample_alone(x);
        return;
      }
      Lanes lanes = {};
      const auto sample_together = [&](const Neighbours<R, false>& near, const Voxel& first,
                                       auto checked) {
        add_neighbours<decltype(checked)::value>(near, first, lanes);
      };
      sample_row<R, false, true>(source, z, y, size, sample_together, sample_alone);
      for (int k = 0; k < kSums; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) sums[k] += lanes[k][lane];
      }
    }

    // Adds up the moments of neighbours whose samples are within the volume.
    template <bool kChecked>
    void add_neighbours(const Neighbours<R, false>& near, const Voxel& first, Lanes& lanes) const {
      const R& r = self->resampling;
      T grad_p[D][near.kCount];
      neighbour_gradients<kChecked>(near, source,
                                    source.template out_pointer<R::Layout::kPixel>(grad, first),
                                    [&](int i, const Vec<T, D>& gradient) {
                                      const bool counts = i >= near.repeated;
                                      for (int j = 0; j < D; ++j)
                                        grad_p[j][i] = counts ? gradient[j] : T(0);
                                    });
      const T* const field = R::kField ? near.field : nullptr;
      with_known_placement(r, [&](const auto& map) {
        for (int begin = 0; begin < near.kCount; begin += kLanes) {
#pragma GCC ivdep
          for (int lane = 0; lane < kLanes; ++lane) {
            const int i = begin + lane;
            Vec<int, D> voxel = source.place(first);
            voxel[0] += i;
            Vec<T, D> u{};
            if constexpr (R::kField) u = load_vec<T, D>(field + i * D);
            const Vec<T, D> q = map.template source<R::kField>(voxel, u);
            for (int j = 0; j < D; ++j) {
              for (int k = 0; k < D; ++k) {
                const bool counts = grad_p[j][i] != 0;
                lanes[j * (D + 1) + k][lane] += counts ? grad_p[j][i] * q[k] : T(0);
              }
              lanes[j * (D + 1) + D][lane] += grad_p[j][i];
            }
          }
        }
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, opaque_pointer(grad_output.at(group, item))};
  }

  // The factor that turns a sum into the gradient of entry (j, k), in normalised units.
  REGKERNELS_HD double scale(int entry) const {
    const int j = entry / (D + 1), k = entry % (D + 1);
    const double half = resampling.map.in.half[j];
    return k == D ? half : half * resampling.map.out.inverse[k];
  }
};

}  // namespace regkernels

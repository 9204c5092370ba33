// The gradient with respect to the affine that places the samples.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "core/operand.h"
#include "maths/voxel_vectors.h"
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
  static constexpr int kMinBlocks = 4;

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

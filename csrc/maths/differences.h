// The derivatives of a displacement field that jacobian_determinant and some penalties share.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "maths/coordinates.h"
#include "maths/matrix.h"
#include "maths/vec.h"

namespace regkernels {

// Takes the differences of a displacement field: they are central inside, one-sided at the two
// ends, and none along an axis of one voxel.
template <class T, int D>
struct Differences {
  Frame<T, D> frame;

  REGKERNELS_HD int64_t plane() const {
    return D == 3 ? static_cast<int64_t>(frame.size[1]) * frame.size[0] : frame.size[0];
  }
  REGKERNELS_HD int64_t offset(const Vec<int, D>& i) const {
    int64_t row = D == 3 ? i[D - 1] * static_cast<int64_t>(frame.size[1]) + i[1] : i[1];
    return row * frame.size[0] + i[0];
  }

  // Jacobian of u(x) at voxel i, in voxel units: entry (k, axis) is d u_k / d axis. The numbers of
  // a voxel j begin at at(j).
  template <class At>
  REGKERNELS_HD Matrix<T, D> slopes_from(const At& at, const Vec<int, D>& i) const {
    Matrix<T, D> result;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < D; ++axis) {
      Vec<int, D> low = i, high = i;
      if (i[axis] > 0) low[axis] -= 1;
      if (i[axis] < frame.size[axis] - 1) high[axis] += 1;
      const int steps = high[axis] - low[axis];
      const T scale = steps == 2 ? T(0.5) : T(1);
      const T* a = at(low);
      const T* b = at(high);
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        // A product with 0 would let through a displacement that is not finite.
        const bool counts = steps != 0 && frame.half[k] != 0;
        result.m[k][axis] = counts ? scale * frame.half[k] * (b[k] - a[k]) : T(0);
      }
    }
    return result;
  }
  // The same of a field in memory.
  REGKERNELS_HD Matrix<T, D> slopes(const T* u, const Vec<int, D>& i) const {
    return slopes_from([&](const Vec<int, D>& j) { return u + offset(j) * D; }, i);
  }

  // Calls collect(j, axis, weight) for each difference that voxel i enters: the one at voxel j
  // along `axis`, which contains its value `weight` times.
  template <class Collect>
  REGKERNELS_HD void for_each_use(const Vec<int, D>& i, const Collect& collect) const {
    REGKERNELS_UNROLL
    for (int axis = 0; axis < D; ++axis) {
      const int last = frame.size[axis] - 1;
      if (last == 0) continue;
      Vec<int, D> j = i;
      if (i[axis] > 0) {
        j[axis] = i[axis] - 1;
        collect(j, axis, j[axis] == 0 ? T(1) : T(0.5));
      }
      if (i[axis] < last) {
        j[axis] = i[axis] + 1;
        collect(j, axis, j[axis] == last ? T(-1) : T(-0.5));
      }
      if (i[axis] == 0) collect(i, axis, T(-1));
      if (i[axis] == last) collect(i, axis, T(1));
    }
  }
};

// The Jacobian of x + u(x), from that of u(x).
template <class T, int D>
REGKERNELS_HD Matrix<T, D> plus_identity(Matrix<T, D> slopes) {
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) slopes.m[k][k] += T(1);
  return slopes;
}

}  // namespace regkernels

#pragma once

#include <vector>

#include "core/check.h"
#include "core/host_device.h"

namespace regkernels {

// The linear system of one axis. A cubic B-spline with the coefficients c has, at voxel k, the
// value v[k] = (c[k-1] + 4 c[k] + c[k+1]) / 6, and at both ends a coefficient outside is 0 or that
// of a voxel inside: what this adds to the matrix of (1, 4, 1) is here. All ends are alike, so that
// the matrix is that of the same lines walked through backwards.
struct SplineSystem {
  int end_diagonal;   // of the first and of the last voxel, where they are two
  int end_inward;     // what they are multiplied with besides: their only neighbour's coefficient
  int next_outward;   // what their neighbours have of them
  int only_diagonal;  // where there is one voxel only

  REGKERNELS_HD int diagonal(int64_t k, int64_t n) const {
    return n == 1 ? only_diagonal : k == 0 || k == n - 1 ? end_diagonal : 4;
  }
  // What row k has in the column before it, and in the one behind it.
  REGKERNELS_HD int before(int64_t k, int64_t n) const {
    return (k == 1 ? next_outward : 1) * (k == n - 1 ? end_inward : 1);
  }
  REGKERNELS_HD int behind(int64_t k, int64_t n) const {
    return (k == 0 ? end_inward : 1) * (k == n - 2 ? next_outward : 1);
  }
};

// The system is solved by elimination, forwards and backwards (Thomas):
//
//   d[k] = (6 v[k] - before d[k-1]) pivot[k]        c[k] = d[k] - behind pivot[k] c[k+1]
//   pivot[k] = 1 / (diagonal - before behind[k-1] pivot[k-1])
//
// The pivots come to 2 - sqrt(3) by a factor of 14 with each voxel, so that those of the first few
// voxels will do, and the last one, which the end of the line has a part in.
inline constexpr int kPivots = 20;

// One pass, along an axis of `size` elements that lie `stride` apart, in each of `outer` slabs of
// size * stride elements.
struct SplinePass {
  SplineSystem system;
  int64_t outer;
  int64_t size;
  int64_t stride;

  // The pivots of the first voxels, up to the one before the last.
  template <class T>
  REGKERNELS_HD void find_pivots(T (&pivot)[kPivots]) const {
    double last = 0;
    for (int k = 0; k < kPivots; ++k) {
      if (k < size) last = next_pivot(k, last);
      pivot[k] = static_cast<T>(last);
    }
  }
  REGKERNELS_HD double next_pivot(int64_t k, double last) const {
    const double eliminated = k == 0 ? 0 : system.before(k, size) * system.behind(k - 1, size);
    return 1 / (system.diagonal(k, size) - eliminated * last);
  }
  // The pivot of the last voxel.
  template <class T>
  REGKERNELS_HD T last_pivot(const T (&pivot)[kPivots]) const {
    if (size <= kPivots) return pivot[size - 1];
    return static_cast<T>(next_pivot(size - 1, static_cast<double>(pivot[kPivots - 1])));
  }
};

// What a checked call amounts to.
struct SplineCall {
  DType dtype;
  int64_t count;  // elements
  std::vector<SplinePass> passes;
};

}  // namespace regkernels

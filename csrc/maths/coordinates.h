// Where things are: normalised coordinates, voxel positions, and the maps between grids.
//
// Along an axis of n voxels, voxel i sits at the normalised coordinate (i - c) / s with the centre
// c = (n - 1) / 2 and the half extent s = (n - 1) / 2 (align_corners: -1 and 1 are the centres of
// the first and last voxel) or s = n / 2 (they are the outer edges). With align_corners and n = 1,
// s = 0: the only coordinate is 0.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "maths/product_plus.h"
#include "maths/vec.h"

namespace regkernels {

REGKERNELS_HD double half_extent(int64_t n, bool align_corners) {
  return align_corners ? 0.5 * static_cast<double>(n - 1) : 0.5 * static_cast<double>(n);
}

// The axes of a grid in x, y, z order, in the arithmetic type T.
template <class T, int D>
struct Frame {
  int size[D];
  T centre[D];
  T half[D];     // half extent s, in voxels
  T inverse[D];  // 1 / s, or 0 where s is 0
};

// `sizes` are in x, y, z order.
template <class T, int D>
Frame<T, D> make_frame(const int64_t (&sizes)[3], bool align_corners) {
  Frame<T, D> frame;
  for (int k = 0; k < D; ++k) {
    const double half = half_extent(sizes[k], align_corners);
    frame.size[k] = static_cast<int>(sizes[k]);
    frame.centre[k] = static_cast<T>(0.5 * static_cast<double>(sizes[k] - 1));
    frame.half[k] = static_cast<T>(half);
    frame.inverse[k] = static_cast<T>(half > 0 ? 1 / half : 0);
  }
  return frame;
}

// How a vector field `u` places the samples.
enum class Placement {
  kAffineFirst,  // A x + u
  kAffineLast,   // A (x + u)
  kFull,         // u itself
};

// The map from an output voxel (and the field's vector there) to a position in the input, in input
// voxels:  p = c_in + s_in * (A (x [+ u]) [+ u]).
//
// Everything is written about the centres, i' = i - c_out, which floating point holds exactly: with
// equal sizes, no affine (or the identity) and u = 0 the position is exactly i.
template <class T, int D, bool kAffine>
struct PositionMap {
  Placement placement;
  Frame<T, D> in;
  Frame<T, D> out;
  T ratio[D];  // s_in / s_out; exactly 1 for equal sizes

  // The affine of one batch item in voxel units: p = offset + matrix i'.
  struct Item {
    T matrix[kAffine ? D : 1][kAffine ? D : 1];
    T offset[D];
  };

  REGKERNELS_HD Item item(const T* affine) const {
    Item result;
    REGKERNELS_UNROLL
    for (int j = 0; j < D; ++j) {
      result.offset[j] = in.centre[j];
      if constexpr (kAffine) {
        result.offset[j] += in.half[j] * affine[j * (D + 1) + D];
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          // This is s_in,j / s_out,k, with the exact ratio on the diagonal.
          const T scale = j == k ? ratio[j] : in.half[j] * out.inverse[k];
          result.matrix[j][k] = affine[j * (D + 1) + k] * scale;
        }
      }
    }
    return result;
  }

  // a b + c. With kOnce it is rounded once, which otherwise the compiler decides for each kernel.
  template <bool kOnce>
  static REGKERNELS_HD T plus(const T& a, const T& b, const T& c) {
    if constexpr (kOnce) return product_plus(a, b, c);
    return c + a * b;
  }

  // What the matrix acts on: i' = i - c_out, which for kAffineLast is displaced by u in output
  // voxels.
  template <bool kField = true, bool kOnce = false>
  REGKERNELS_HD Vec<T, D> source(const Vec<int, D>& voxel, const Vec<T, D>& u) const {
    Vec<T, D> q;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      q[k] = static_cast<T>(voxel[k]) - out.centre[k];
      if (kField && kAffine && placement == Placement::kAffineLast && out.half[k] != 0) {
        q[k] = plus<kOnce>(u[k], out.half[k], q[k]);
      }
    }
    return q;
  }

  // The position that the map gives. Without a field, terms that do not change along z come first,
  // so that the compiler can move them out of loops. A kernel that has to find the same position
  // twice needs kOnce.
  template <bool kField = true, bool kOnce = false>
  REGKERNELS_HD Vec<T, D> position(const Item& item, const Vec<int, D>& voxel,
                                   const Vec<T, D>& u) const {
    Vec<T, D> p;
    if (kField && placement == Placement::kFull) {
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) p[j] = plus<kOnce>(in.half[j], u[j], in.centre[j]);
      return p;
    }
    const Vec<T, D> q = source<kField, kOnce>(voxel, u);
    const bool add = kField && (!kAffine || placement == Placement::kAffineFirst);
    REGKERNELS_UNROLL
    for (int j = 0; j < D; ++j) {
      if constexpr (kAffine) {
        T sum = item.offset[j];
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sum = plus<kOnce>(item.matrix[j][k], q[k], sum);
        p[j] = sum;
      } else {
        p[j] = plus<kOnce>(ratio[j], q[j], item.offset[j]);
      }
      if (add) p[j] = plus<kOnce>(in.half[j], u[j], p[j]);
    }
    return p;
  }

  // Without an affine a position is found axis by axis: where the voxel is, and where the vector
  // takes it from there. It is the position above, with kOnce.
  REGKERNELS_HD T undisplaced(int axis, int voxel) const {
    const T step = placement == Placement::kFull ? T(0) : ratio[axis];
    return product_plus(step, static_cast<T>(voxel) - out.centre[axis], in.centre[axis]);
  }
  REGKERNELS_HD T displaced(int axis, const T& from, const T& u) const {
    return product_plus(in.half[axis], u, from);
  }

  // The extremes of the positions, with kOnce, of the voxels from `first` to `last` where the
  // affine alone gives them. They are at corners of that box, exactly, as rounding keeps numbers in
  // order. If a matrix has infinite entries, the extremes are right or not numbers.
  REGKERNELS_HD void extremes(const Item& item, const Vec<int, D>& first, const Vec<int, D>& last,
                              Vec<T, D>& low, Vec<T, D>& high) const {
    const Vec<T, D> begin = source<false>(first, {}), end = source<false>(last, {});
    REGKERNELS_UNROLL
    for (int j = 0; j < D; ++j) {
      low[j] = high[j] = item.offset[j];
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const T factor = item.matrix[j][k];
        low[j] = product_plus(factor, factor > 0 ? begin[k] : end[k], low[j]);
        high[j] = product_plus(factor, factor > 0 ? end[k] : begin[k], high[j]);
      }
    }
  }

  // By the chain rule, the gradient with respect to u from the one with respect to p.
  REGKERNELS_HD Vec<T, D> pull_back(const Item& item, const Vec<T, D>& grad_p) const {
    Vec<T, D> grad_u;
    if (kAffine && placement == Placement::kAffineLast) {
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        T sum = 0;
        if constexpr (kAffine) {
          REGKERNELS_UNROLL
          for (int j = 0; j < D; ++j) {
            // An infinite entry places all samples outside, where their gradient is 0.
            if (grad_p[j] != 0) sum += item.matrix[j][k] * grad_p[j];
          }
        }
        grad_u[k] = sum * out.half[k];
      }
    } else {
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) grad_u[k] = in.half[k] * grad_p[k];
    }
    return grad_u;
  }
};

}  // namespace regkernels

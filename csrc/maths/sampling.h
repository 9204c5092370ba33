// What linear and nearest sampling compute for one voxel: boundary rules, corner weights,
// derivatives.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"
#include "maths/vec.h"

namespace regkernels {

enum class Mode { kBilinear, kNearest, kCubic, kBSpline };  // the last two: see cubic.h
REGKERNELS_HD bool is_cubic(Mode mode) { return mode == Mode::kCubic || mode == Mode::kBSpline; }
enum class Padding { kZeros, kBorder, kReflection };

// How positions become voxels. These are plain run-time values, since the branches are the same for
// every voxel and fewer template instantiations keep builds short.
struct Sampling {
  Mode mode;
  Padding padding;
  bool align_corners;
};

// std::floor would be a library call on a CPU without SSE4.1.
REGKERNELS_HD float fast_floor(float p) {
#ifdef __CUDA_ARCH__
  return floorf(p);
#else
  const float f = static_cast<float>(static_cast<int>(p));
  return f > p ? f - 1 : f;
#endif
}
REGKERNELS_HD double fast_floor(double p) {
#ifdef __CUDA_ARCH__
  return floor(p);
#else
  const double f = static_cast<double>(static_cast<int>(p));
  return f > p ? f - 1 : f;
#endif
}
REGKERNELS_HD float round_half_even(float p) { return rintf(p); }
REGKERNELS_HD double round_half_even(double p) { return rint(p); }

// Reflects p into the volume. `mirrored` tells that the coordinate now runs backwards.
template <class T>
REGKERNELS_HD T reflect(T p, int n, bool align_corners, bool* mirrored) {
  const T low = align_corners ? T(0) : T(-0.5);
  const T span = align_corners ? T(n - 1) : T(n);
  if (!(span > 0)) {
    *mirrored = false;
    return 0;
  }
  T t = p - low;
  if (t < 0 || t >= span) {  // inside, p passes through untouched and so exactly
    t -= 2 * span * floor(t / (2 * span));
    *mirrored = t >= span;
    return (*mirrored ? 2 * span - t : t) + low;
  }
  *mirrored = false;
  return p;
}

// Where a sample lies along one axis: between the voxels `index` and `index + 1`, `fraction` (0 to
// 1) of the way, with the derivative of the in-volume coordinate with respect to the position: 1,
// -1 where reflected, 0 where clamped or rounded.
template <class T>
struct AxisCell {
  int index;
  T fraction;
  T slope;
};

// A position that is not a number or infinite samples as outside: zero, or the clamped voxel.
template <class T>
REGKERNELS_HD AxisCell<T> locate(T p, int n, const Sampling& sampling) {
  AxisCell<T> cell;
  // The only coordinate of such an axis is 0, whatever a displacement along it says.
  const bool pinned = n == 1 && sampling.align_corners;
  if (pinned) p = 0;
  cell.slope = pinned ? 0 : 1;
  bool mirrored = false;
  if (sampling.padding == Padding::kZeros) {
    // A position far outside samples like one just outside, which is safe to turn into an integer.
    p = p > T(-2) ? p : T(-2);
    p = p < T(n + 1) ? p : T(n + 1);
  } else {
    const T last = static_cast<T>(n - 1);
    if (sampling.padding == Padding::kReflection) {
      p = reflect(p, n, sampling.align_corners, &mirrored);
      if (mirrored) cell.slope = -1;
    }
    // The derivative is the right-sided one: at the last voxel it is that of the clamp, at the
    // first one that of the image (the other way round where the coordinate runs backwards).
    if (!(p >= 0) || (mirrored && p == 0)) {
      p = 0;
      cell.slope = 0;
    }
    if (p > last || (!mirrored && p == last)) {
      p = last;
      cell.slope = 0;
    }
  }
  T floor_p;
  if (sampling.mode == Mode::kNearest) {
    p = floor_p = round_half_even(p);
    cell.slope = 0;
  } else {
    floor_p = fast_floor(p);
    // Right-sided derivatives of a coordinate that runs backwards look at the cell on the left.
    if (mirrored && floor_p == p && p > 0) floor_p -= 1;
  }
  cell.index = static_cast<int>(floor_p);
  cell.fraction = p - floor_p;
  return cell;
}

// The 2^D voxels around a sample. Bit k of a corner's number picks the upper voxel of axis k
// (x, y, z).
template <class T, int D>
struct Cell {
  Vec<int, D> index;   // the voxel of corner 0
  Vec<T, D> fraction;  // how far on each axis, 0 to 1

  REGKERNELS_HD T axis_weight(int k, int upper) const {
    return upper ? fraction[k] : 1 - fraction[k];
  }
  REGKERNELS_HD T weight(int corner) const {
    T result = axis_weight(0, corner & 1);
    REGKERNELS_UNROLL
    for (int k = 1; k < D; ++k) result *= axis_weight(k, corner >> k & 1);
    return result;
  }
  // Whether a corner lies inside the volume. One that does not must not be read and counts as 0.
  REGKERNELS_HD bool inside(int corner, const int (&size)[D]) const {
    bool result = true;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      // As an unsigned number, -1 is large.
      result = result & (corner >> k & 1 ? index[k] + 1u < unsigned(size[k])
                                         : unsigned(index[k]) < unsigned(size[k]));
    }
    return result;
  }
};

// Splits a position of at most 2^22 in size into its floor and fraction. Conversions between
// floating point and integers are slow on GPUs: adding 1.5 * 2^23, rounded down, leaves the integer
// in the low bits. A larger position, or one that is not a number, gives an index that is beyond
// 2^22 as an unsigned number.
inline constexpr int kMaxSplit = 1 << 22;
template <class T>
REGKERNELS_HD void split(T p, int* index, T* fraction) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) {
    const float shifted = __fadd_rd(p, 12582912.0f);
    *index = __float_as_int(shifted) - 0x4B400000;
    *fraction = p - (shifted - 12582912.0f);
    return;
  }
#endif
  const T below = fast_floor(p);
  *index = static_cast<int>(below);
  *fraction = p - below;
}

// Tells whether a position is strictly between 0 and `limit`; if it is, splits it, too.
REGKERNELS_HD bool split_inside(float p, int limit, int* index, float* fraction) {
#ifndef __CUDA_ARCH__
  if (!(p > 0 && p < static_cast<float>(limit))) return false;
#endif
  split(p, index, fraction);
  return static_cast<unsigned>(*index) < static_cast<unsigned>(limit);
}
REGKERNELS_HD bool split_inside(double p, int limit, int* index, double* fraction) {
  if (!(p > 0 && p < static_cast<double>(limit))) return false;
  *index = static_cast<int>(p);
  *fraction = p - static_cast<double>(*index);
  return true;
}

// The sizes of a volume and its boundary rules, with what follows from them.
template <class T, int D>
struct Boundary {
  Sampling sampling;
  int size[D];
  int inner_limit[D];  // inner cells are at positions below this; 0: there are none
  bool is_clamp;       // the boundary rule is no more than a clamp to [low, high]
  T low[D], high[D];

  // Finds the cell of a sample whose corners all lie inside and all count; returns false for any
  // other sample. Nearly all samples have such a cell, and no boundary rule applies to them: these
  // few lines are what the kernels spend their time in.
  REGKERNELS_HD bool find_inner_cell(const Vec<T, D>& p, Cell<T, D>& cell) const {
    bool inside = true;
    T product = 1;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      inside = split_inside(p[k], inner_limit[k], &cell.index[k], &cell.fraction[k]) & inside;
#ifndef __CUDA_ARCH__  // on CUDA a branch costs more than the few instructions it saves
      if (!inside) return false;
#endif
      product *= cell.fraction[k];
    }
    return inside & (product != 0);
  }

  // Finds the cell of a sample within the volume, to whose value no boundary rule applies. There is
  // no branch, so that this becomes vector code. The sample may touch only some of the corners;
  // lerp is then told so by kChecked. For any other sample this returns false, with a cell that may
  // be read if the volume has inner cells. With `kValues`, samples that touch the last voxels alone
  // count as within, and so do all that are clamped to the border: they have values like others,
  // but derivatives look at what is outside.
  template <bool kValues>
  bool find_cell_within(const Vec<T, D>& p, Cell<T, D>& cell) const {
    const bool clamps = kValues && sampling.padding == Padding::kBorder;
    bool within = true;
    for (int k = 0; k < D; ++k) {
      const T last = static_cast<T>(inner_limit[k]);
      T q = p[k] > 0 ? p[k] : T(0);  // 0 also where p is not a number
      q = q < last ? q : last;
      const int index = static_cast<int>(q);
      const bool is_last = index == inner_limit[k];
      cell.index[k] = is_last ? index - 1 : index;
      cell.fraction[k] = q - static_cast<T>(cell.index[k]);
      within = within & (kValues ? (p[k] == q) | clamps : (p[k] == q) & !is_last);
    }
    return within;
  }

  // Tells, without a branch, whether a sample lies so far outside that no voxel counts, not
  // even for a derivative, which looks up from where the sample is.
  bool counts_nothing(const Vec<T, D>& p) const {
    bool near = true;
    for (int k = 0; k < D; ++k) near = near & (p[k] >= -1) & (p[k] < static_cast<T>(size[k]));
    return !near & (sampling.padding == Padding::kZeros);
  }

  // Applies the boundary rules: the cell of any sample, in any mode and padding. For `slope` see
  // AxisCell.
  REGKERNELS_HD Cell<T, D> find_cell(const Vec<T, D>& p, Vec<T, D>& slope) const {
    Cell<T, D> cell;
    if (is_clamp) {
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        T q = p[k] > low[k] ? p[k] : low[k];  // low also where p is not a number
        q = q < high[k] ? q : high[k];
        split(q, &cell.index[k], &cell.fraction[k]);
        slope[k] = q == p[k] && q != high[k] ? 1 : 0;
      }
    } else {
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const AxisCell<T> axis = locate(p[k], size[k], sampling);
        cell.index[k] = axis.index;
        cell.fraction[k] = axis.fraction;
        slope[k] = axis.slope;
      }
    }
    return cell;
  }
};

// `sizes` are in x, y, z order.
template <class T, int D>
Boundary<T, D> make_boundary(const int64_t (&sizes)[3], const Sampling& sampling) {
  Boundary<T, D> result;
  result.sampling = sampling;
  const bool linear = sampling.mode == Mode::kBilinear;
  const bool zeros = sampling.padding == Padding::kZeros;
  result.is_clamp = linear && sampling.padding != Padding::kReflection;
  for (int k = 0; k < D; ++k) {
    const int64_t n = sizes[k];
    result.size[k] = static_cast<int>(n);
    result.inner_limit[k] = linear && n < kMaxSplit ? static_cast<int>(n) - 1 : 0;
    if (n + 1 >= kMaxSplit) result.is_clamp = false;
    // A position far outside samples like one just outside. The only coordinate of an axis of
    // length 1 is 0.
    const bool pinned = n == 1 && sampling.align_corners;
    result.low[k] = static_cast<T>(zeros && !pinned ? -2 : 0);
    result.high[k] = static_cast<T>(pinned ? 0 : zeros ? n + 1 : n - 1);
  }
  return result;
}

// Returns (1 - fraction) a + fraction b. With kChecked, a value that does not count may be anything
// and is not touched: NaN times 0 is not 0.
template <bool kChecked, class T>
REGKERNELS_HD T lerp(T a, T b, T fraction) {
  if (kChecked) {
    if (fraction == 0) return a;
    if (fraction == 1) return b;
  }
  return (1 - fraction) * a + fraction * b;
}

// Computes the sample from the values at the corners: along one axis after the other, each pair
// becomes one value.
template <bool kChecked, class T, int D>
REGKERNELS_HD T sample_value(const Cell<T, D>& cell, const T (&corners)[1 << D]) {
  T value[1 << D];
  REGKERNELS_UNROLL
  for (int i = 0; i < (1 << D); ++i) value[i] = corners[i];
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) {
    REGKERNELS_UNROLL
    for (int i = 0; i < (1 << (D - 1 - k)); ++i) {
      value[i] = lerp<kChecked>(value[2 * i], value[2 * i + 1], cell.fraction[k]);
    }
  }
  return value[0];
}

// Computes the derivative of the sample with respect to the in-volume coordinate in the same way.
template <bool kChecked, class T, int D>
REGKERNELS_HD Vec<T, D> sample_gradient(const Cell<T, D>& cell, const T (&corners)[1 << D]) {
  T value[1 << D];
  T slope[D][1 << (D - 1)];
  REGKERNELS_UNROLL
  for (int i = 0; i < (1 << D); ++i) value[i] = corners[i];
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) {
    REGKERNELS_UNROLL
    for (int i = 0; i < (1 << (D - 1 - k)); ++i) {
      REGKERNELS_UNROLL
      for (int j = 0; j < k; ++j) {
        slope[j][i] = lerp<kChecked>(slope[j][2 * i], slope[j][2 * i + 1], cell.fraction[k]);
      }
      slope[k][i] = value[2 * i + 1] - value[2 * i];
      value[i] = lerp<kChecked>(value[2 * i], value[2 * i + 1], cell.fraction[k]);
    }
  }
  Vec<T, D> result;
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) result[k] = slope[k][0];
  return result;
}

}  // namespace regkernels

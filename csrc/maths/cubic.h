// What cubic sampling computes for one voxel: the four voxels along each axis that a sample is made
// of, their weights, and the derivatives of these.
//
// With Mode::kCubic the weights are Keys' (Cubic convolution interpolation for digital image
// processing, IEEE Trans. ASSP 1981, equation 4 for any a) with a = -3/4, and every voxel has its
// own value. With Mode::kBSpline they are the cubic B-spline's, and what is sampled are
// coefficients: see ops/spline_coefficients.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "maths/product_plus.h"
#include "maths/sampling.h"

namespace regkernels {

// Voxels along an axis that a sample is made of.
inline constexpr int kTaps = 4;

// The weights of the four voxels around a position that is `t` (0 to 1) of the way from the second
// one to the third.
template <class T>
REGKERNELS_HD void tap_weights(Mode mode, T t, T (&weight)[kTaps]) {
  const T s = 1 - t;
  if (mode == Mode::kCubic) {
    constexpr T a = T(-0.75);
    weight[0] = a * t * (s * s);
    weight[1] = product_plus(-(t * t), product_plus(-(a + 2), t, a + 3), T(1));
    weight[2] = product_plus(-(s * s), product_plus(-(a + 2), s, a + 3), T(1));
    weight[3] = a * s * (t * t);
  } else {
    constexpr T sixth = T(1.0 / 6), two_thirds = T(2.0 / 3);
    weight[0] = sixth * (s * s * s);
    weight[1] = product_plus(-(t * t), product_plus(T(-0.5), t, T(1)), two_thirds);
    weight[2] = product_plus(-(s * s), product_plus(T(-0.5), s, T(1)), two_thirds);
    weight[3] = sixth * (t * t * t);
  }
}

// The derivatives of these weights with respect to the position.
template <class T>
REGKERNELS_HD void tap_slopes(Mode mode, T t, T (&slope)[kTaps]) {
  const T s = 1 - t;
  if (mode == Mode::kCubic) {
    constexpr T a = T(-0.75);
    slope[0] = a * s * (1 - 3 * t);
    slope[1] = t * (3 * (a + 2) * t - 2 * (a + 3));
    slope[2] = s * (2 * (a + 3) - 3 * (a + 2) * s);
    slope[3] = a * t * (2 - 3 * t);
  } else {
    slope[0] = T(-0.5) * (s * s);
    slope[1] = t * (T(1.5) * t - 2);
    slope[2] = s * (2 - T(1.5) * s);
    slope[3] = T(0.5) * (t * t);
  }
}

// The voxel that one outside of the volume mirrors. With `centres` the planes of symmetry go
// through the centres of the outermost voxels, otherwise along their outer edges.
REGKERNELS_HD int mirrored_index(int index, int n, bool centres) {
  const int edge = centres ? 0 : 1;
  int near = index < 0 ? -index - edge : index;
  if (near >= n) near = (n - 1) - (near - n) - (1 - edge);
  if (unsigned(near) < unsigned(n)) return near;
  // Mirrored more than once, by a few voxels: a division, which takes long, is seldom needed.
  const int64_t period = 2 * (static_cast<int64_t>(n) - (centres ? 1 : 0));
  if (period == 0) return 0;
  int64_t m = index % period;
  if (m < 0) m += period;
  return static_cast<int>(m < n ? m : period - edge - m);
}

// A position that is reflected, a whole number of periods nearer; 0 if it is not a number, or
// infinite. It is seldom that far from the volume.
template <class T>
REGKERNELS_HD_APART T within_period(T p, int n, bool align_corners) {
  const T period = static_cast<T>(2 * (static_cast<int64_t>(n) - align_corners));
  T q = p - period * floor(p / period);
  q = q > 0 ? q : T(0);
  return q < period ? q : T(0);
}

// Whether nothing changes along an axis: the only coordinate of one without extent is 0, whatever a
// displacement along it says; and what a single voxel continues as is its value everywhere.
REGKERNELS_HD bool is_constant_axis(int n, const Sampling& sampling) {
  return n == 1 && (sampling.align_corners || sampling.padding != Padding::kZeros);
}

// Beyond these positions along an axis nothing changes any more, where nothing is reflected. Only a
// B-spline is clamped to the border as a whole: so its values beyond are those of the border, and
// its derivative is continuous there.
template <class T>
struct TapLimits {
  T low, high;
};
template <class T>
REGKERNELS_HD TapLimits<T> tap_limits(int n, const Sampling& sampling) {
  const bool zeros = sampling.padding == Padding::kZeros;
  const bool clamps = sampling.mode == Mode::kBSpline && !zeros;
  return {zeros    ? T(-3)
          : clamps ? T(0)
                   : T(-1),
          static_cast<T>(zeros    ? n + 1
                         : clamps ? n - 1
                                  : n)};
}

// The first of the taps around a position, which is `fraction` of the way from the second to the
// third.
template <class T>
REGKERNELS_HD int first_tap(T position, T& fraction) {
  const T below = fast_floor(position);
  fraction = position - below;
  return static_cast<int>(below) - 1;
}

// The voxel that an array goes on with at an index beyond its ends; -1 for zero. What is outside is
// 0, the border's voxel or the mirrored one; the coefficients of a B-spline are mirrored at a
// border that it is clamped to.
REGKERNELS_HD int continued_index(int index, int n, const Sampling& sampling) {
  if (unsigned(index) < unsigned(n)) return index;
  const bool reflects = sampling.padding == Padding::kReflection;
  if (sampling.padding == Padding::kZeros) return -1;
  if (reflects || sampling.mode == Mode::kBSpline) {
    return mirrored_index(index, n, !reflects || sampling.align_corners);
  }
  return index < 0 ? 0 : n - 1;
}

// The taps of a sample along one axis, to which the boundary rules have been applied. One that does
// not count has the weight and the slope 0, and the index of one that may be read.
template <class T>
struct AxisTaps {
  int index[kTaps];
  T weight[kTaps];
  T slope[kTaps];
  int nearest;  // the voxel of the volume at or below the sample, as far as there is one
};

// Applies the boundary rules along one axis, tap by tap.
template <class T>
REGKERNELS_HD AxisTaps<T> locate_taps(T p, int n, const Sampling& sampling) {
  AxisTaps<T> taps;
  if (is_constant_axis(n, sampling)) {
    REGKERNELS_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      taps.index[i] = 0;
      taps.weight[i] = i == 1 ? T(1) : T(0);
      taps.slope[i] = 0;
    }
    taps.nearest = 0;
    return taps;
  }
  const bool reflects = sampling.padding == Padding::kReflection;
  // A position that is not a number or infinite samples as outside: zero, or the clamped voxel.
  bool varies;
  if (reflects) {
    varies = p - p == 0;  // it is a number, and finite
    if (!(p > -4 && p < static_cast<T>(n + 4))) p = within_period(p, n, sampling.align_corners);
  } else {
    const TapLimits<T> limits = tap_limits<T>(n, sampling);
    varies = p > limits.low && p < limits.high;
    p = p > limits.low ? p : limits.low;  // so it is where p is not a number
    p = p < limits.high ? p : limits.high;
  }
  T fraction;
  const int first = first_tap(p, fraction);
  tap_weights(sampling.mode, fraction, taps.weight);
  tap_slopes(sampling.mode, fraction, taps.slope);
  REGKERNELS_UNROLL
  for (int i = 0; i < kTaps; ++i) {
    const int index = first + i;
    const int there = continued_index(index, n, sampling);
    if (there < 0) taps.weight[i] = taps.slope[i] = 0;
    taps.index[i] = there >= 0 ? there : index < 0 ? 0 : n - 1;
    if (!varies) taps.slope[i] = 0;
  }
  int nearest = first + 1;
  if (reflects) {
    // The lower one of the two voxels that the sample lies between, whichever comes first.
    const int other = mirrored_index(nearest + 1, n, sampling.align_corners);
    nearest = mirrored_index(nearest, n, sampling.align_corners);
    nearest = nearest < other ? nearest : other;
  }
  taps.nearest = nearest < 0 ? 0 : nearest < n ? nearest : n - 1;
  return taps;
}

// The taps of a sample of which all voxels lie within the volume, with weights other than 0, so
// that no boundary rule applies.
template <class T, int D>
struct InnerTaps {
  Vec<int, D> first;
  T fraction[D];
};

// Finds them; returns false for any other sample.
template <class T, int D>
REGKERNELS_HD bool find_inner_taps(const Vec<T, D>& p, const int (&size)[D],
                                   InnerTaps<T, D>& taps) {
  bool inside = true;
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) {
    // Larger positions than an int holds are outside; what is not a number is, too.
    inside = inside & (p[k] > 1) & (p[k] < static_cast<T>(size[k] - 2));
    const T q = inside ? p[k] : T(1);
    const T below = fast_floor(q);
    taps.first[k] = static_cast<int>(below) - 1;
    taps.fraction[k] = q - below;
    inside = inside & (taps.fraction[k] != 0);
  }
  return inside;
}

}  // namespace regkernels

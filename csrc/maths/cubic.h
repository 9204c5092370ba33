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
    weight[1] = 1 - t * t * ((a + 3) - (a + 2) * t);
    weight[2] = 1 - s * s * ((a + 3) - (a + 2) * s);
    weight[3] = a * s * (t * t);
  } else {
    constexpr T sixth = T(1.0 / 6), two_thirds = T(2.0 / 3);
    weight[0] = sixth * (s * s * s);
    weight[1] = two_thirds - t * t * (1 - T(0.5) * t);
    weight[2] = two_thirds - s * s * (1 - T(0.5) * s);
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

// The taps of a sample along one axis, to which the boundary rules have been applied. One that does
// not count has the weight and the slope 0, and the index of one that may be read.
template <class T>
struct AxisTaps {
  int index[kTaps];
  T weight[kTaps];
  T slope[kTaps];
  int nearest;  // the voxel of the volume at or below the sample, as far as there is one
};

// Applies the boundary rules along one axis, tap by tap: what is outside is 0, the border's voxel
// or the mirrored one, and so is its coefficient. Only a B-spline is clamped to the border as a
// whole, from where the coefficients are mirrored: so its values beyond are those of the border,
// and its derivative is continuous there.
//
// A position that is not a number or infinite samples as outside: zero, or the clamped voxel.
template <class T>
REGKERNELS_HD AxisTaps<T> locate_taps(T p, int n, const Sampling& sampling) {
  AxisTaps<T> taps;
  const bool is_spline = sampling.mode == Mode::kBSpline;
  const bool zeros = sampling.padding == Padding::kZeros;
  const bool reflects = sampling.padding == Padding::kReflection;
  // The only coordinate of an axis without extent is 0, whatever a displacement along it says; and
  // what a single voxel continues as is its value everywhere.
  if (n == 1 && (sampling.align_corners || !zeros)) {
    REGKERNELS_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      taps.index[i] = 0;
      taps.weight[i] = i == 1 ? T(1) : T(0);
      taps.slope[i] = 0;
    }
    taps.nearest = 0;
    return taps;
  }
  bool varies;  // with the position
  if (reflects) {
    const T limit = static_cast<T>(n + 4);
    varies = true;
    if (!(p > -4 && p < limit)) {
      // Whole periods further on all is the same.
      const T period = static_cast<T>(2 * (static_cast<int64_t>(n) - sampling.align_corners));
      T q = p - period * floor(p / period);
      varies = q == q;  // which is not so of infinities either
      q = q > 0 ? q : T(0);
      p = q < period ? q : T(0);
    }
  } else {
    // From here on nothing changes any more.
    const bool clamps = is_spline && !zeros;
    const T low = zeros ? T(-3) : clamps ? T(0) : T(-1);
    const T high = static_cast<T>(zeros ? n + 1 : clamps ? n - 1 : n);
    varies = p > low && p < high;
    p = p > low ? p : low;  // low also where p is not a number
    p = p < high ? p : high;
  }
  const T below = fast_floor(p);
  const T t = p - below;
  const int first = static_cast<int>(below) - 1;
  tap_weights(sampling.mode, t, taps.weight);
  tap_slopes(sampling.mode, t, taps.slope);
  REGKERNELS_UNROLL
  for (int i = 0; i < kTaps; ++i) {
    int index = first + i;
    const bool inside = unsigned(index) < unsigned(n);
    if (!inside) {
      if (zeros) {
        taps.weight[i] = taps.slope[i] = 0;
        index = index < 0 ? 0 : n - 1;
      } else if (reflects || is_spline) {
        index = mirrored_index(index, n, !reflects || sampling.align_corners);
      } else {
        index = index < 0 ? 0 : n - 1;
      }
    }
    taps.index[i] = index;
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

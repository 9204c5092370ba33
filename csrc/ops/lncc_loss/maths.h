// What a window's sums say about one voxel: its correlation and the derivatives of that.
#pragma once

#include <cstdint>
#include <limits>

#include "core/host_device.h"
#include "maths/fast_math.h"

namespace regkernels {

inline constexpr int kMaxWindow = 31;
inline constexpr int kMaxRadius = kMaxWindow / 2;
inline constexpr int kWindowSums = 5;  // the sums of I, J, I², J² and I J

// The window and the constants of the formula. The weights belong to the offsets 0, 1, ... along
// the axes x, y and z; they are the same on both sides, and 0 where a window is narrower than the
// widest.
template <class T>
struct Window {
  bool rectangular;  // all weights are 1, and as many along each axis
  int radius;
  int radius_z;  // 0 in 2-D
  T weight[3][kMaxRadius + 1];
  T inverse_mass;  // 1 / (sum of the window's weights)
  T smooth_nr, smooth_dr;
  T smooth_product;    // what is added to the product of the variances
  T common;            // what is added to both variances and to the covariance
  bool replaces_flat;  // the correlation of windows that are constant in both images is both_flat
  T both_flat;
  // How much of a window the volume can fill. The sums are taken about this part of a typical
  // value, since a window that is mostly outside holds mostly zeros.
  T coverage;
  // This is less than half the last place of the largest number, so that no finite value less a
  // pivot overflows. Where values lie beyond it, the squares of their differences overflow in any
  // case.
  T largest_pivot;
  // A variance below this share of the sum of squares is no more than the rounding of its own sums.
  T rounding;
};

// Adds to a window's sums what a voxel with a weight contributes.
template <class T>
REGKERNELS_HD void add_products(T weight, T value_i, T value_j, T (&sums)[kWindowSums]) {
  const T weighted_i = weight * value_i, weighted_j = weight * value_j;
  sums[0] += weighted_i;
  sums[1] += weighted_j;
  sums[2] += weighted_i * value_i;
  sums[3] += weighted_j * value_j;
  sums[4] += weighted_i * value_j;
}

// Adds to a window's sums what a voxel whose weight is 1 contributes.
template <class T>
REGKERNELS_HD void add_products(T value_i, T value_j, T (&sums)[kWindowSums]) {
  sums[0] += value_i;
  sums[1] += value_j;
  sums[2] += value_i * value_i;
  sums[3] += value_j * value_j;
  sums[4] += value_i * value_j;
}

// With c = ΣIJ - ΣI ΣJ / m and the variances v, raised to smooth_dr at least, and what the images
// have in common added to all three,
//   ncc = (c² + smooth_nr) / (v_I v_J + smooth_product),
// whose denominator is (v_I + smooth_product / v_J) v_J.
// Its derivatives: `cross` with respect to c, `variance_*` with respect to ΣI² and ΣJ². A window
// that is constant as far as its sums can tell has no covariance; a variance that was raised has
// no derivative.
template <class T>
struct Correlation {
  T ncc;
  T mean_i, mean_j;
  T cross;
  T variance_i, variance_j;
};

// Whether 0 is what the sums are taken about, rather than the mean of some samples: images that are
// exactly 0 somewhere fade into that. Windows there vary by little about nearly 0, so that their
// correlations have the largest slopes of all, and would be lost beside any other pivot.
template <class Count>
REGKERNELS_HD bool fades_to_zero(Count zeros, Count samples) {
  return zeros > 0 && zeros * 32 >= samples;
}

// The pivot that the sums are taken about, from a typical value of an image.
template <class T>
REGKERNELS_HD T pivot_near(T typical, const Window<T>& window) {
  const bool usable = typical <= window.largest_pivot && typical >= -window.largest_pivot;
  return usable ? window.coverage * typical : T(0);
}

// Whether a window's variance is no more than rounding. A window whose squares are beyond the range
// of T counts as flat, too; one with a value that is not a number does not, so that it stays so.
template <class T, class S>
REGKERNELS_HD bool is_flat(S variance, S squares, S rounding) {
  bool varies = variance > rounding * squares;
  // Sums in T would be infinite here.
  if constexpr (sizeof(S) > sizeof(T)) varies &= squares <= S(std::numeric_limits<T>::max());
  return !varies & (squares == squares);
}

// What the sums of a window say before the constants of the formula come in: the means, m times
// the variances and the covariance, and whether images are constant as far as the sums can tell.
template <class T>
struct WindowMoments {
  T mean_i, mean_j;
  T variance_i, variance_j, covariance;
  bool flat_i, flat_j;
};

// The sums may have more precision than what is made of them.
template <class T, class S>
REGKERNELS_HD WindowMoments<T> window_moments(const S (&sums)[kWindowSums], S inverse_mass,
                                              S rounding) {
  const S mean_i = sums[0] * inverse_mass, mean_j = sums[1] * inverse_mass;
  const S variance_i = sums[2] - sums[0] * mean_i, variance_j = sums[3] - sums[1] * mean_j;
  const S covariance = sums[4] - sums[0] * mean_j;
  return {static_cast<T>(mean_i),
          static_cast<T>(mean_j),
          static_cast<T>(variance_i),
          static_cast<T>(variance_j),
          static_cast<T>(covariance),
          is_flat<T>(variance_i, sums[2], rounding),
          is_flat<T>(variance_j, sums[3], rounding)};
}

// The correlation from a window's moments. Every case is computed for every voxel and one of them
// chosen at the end, which makes vector code on the CPU.
template <class T>
REGKERNELS_HD Correlation<T> correlate(const WindowMoments<T>& moments, const Window<T>& window) {
  Correlation<T> result;
  const T mean_i = moments.mean_i, mean_j = moments.mean_j;
  const T raw_i = moments.variance_i, raw_j = moments.variance_j, raw_c = moments.covariance;
  const bool flat_i = moments.flat_i, flat_j = moments.flat_j;
  const bool clamped_i = flat_i | (raw_i < window.smooth_dr);
  const bool clamped_j = flat_j | (raw_j < window.smooth_dr);
  const T variance_i = (clamped_i ? window.smooth_dr : raw_i) + window.common;
  const T variance_j = (clamped_j ? window.smooth_dr : raw_j) + window.common;
  const T inverse_j = reciprocal(variance_j);
  const T inverse_i = reciprocal(variance_i + window.smooth_product * inverse_j);
  const T c = (flat_i | flat_j ? T(0) : raw_c) + window.common;
  // Without a covariance no derivative of a flat window involves its mean, which need not be
  // finite.
  const bool unlinked = window.common == 0;
  const T flat_mean_i = unlinked ? T(0) : mean_i, flat_mean_j = unlinked ? T(0) : mean_j;
  result.mean_i = flat_i ? flat_mean_i : mean_i;
  result.mean_j = flat_j ? flat_mean_j : mean_j;
  // In this order nothing overflows that the result does not.
  const T by_j = c * inverse_j;
  const T ncc = c * inverse_i * by_j + window.smooth_nr * inverse_i * inverse_j;
  const T flat_ncc = window.replaces_flat ? window.both_flat : ncc;
  result.ncc = flat_i & flat_j ? flat_ncc : ncc;
  result.cross = 2 * inverse_i * by_j;
  const T slope_i = -result.ncc * inverse_i;
  const T share = window.smooth_product == 0 ? T(1) : variance_i * inverse_i;
  const T slope_j = -result.ncc * inverse_j * share;
  result.variance_i = clamped_i ? T(0) : slope_i;
  result.variance_j = clamped_j ? T(0) : slope_j;
  return result;
}

// The correlation from a window's sums.
template <class T>
REGKERNELS_HD Correlation<T> correlate(const T (&sums)[kWindowSums], const Window<T>& window) {
  return correlate(window_moments<T>(sums, window.inverse_mass, window.rounding), window);
}

// The gradient with respect to I(y) sums, over the windows x that hold y and with their weights,
//   cross(x) (J(y) - mean_J(x)) + 2 variance_I(x) (I(y) - mean_I(x)),
// that is J(y) Σ cross + 2 I(y) Σ variance_I - Σ (cross mean_J + 2 variance_I mean_I): window sums
// of three adjoint fields. With the gradient with respect to J, which shares the first, there are
// five. The order: cross, variance_i, offset_i, variance_j, offset_j; a single gradient is that of
// the image called I, whichever that is.
template <class T, int kFields>
REGKERNELS_HD void adjoint_fields(const Correlation<T>& at, T mean_i, T mean_j,
                                  T (&fields)[kFields]) {
  fields[0] = at.cross;
  fields[1] = at.variance_i;
  fields[2] = at.cross * mean_j + 2 * at.variance_i * mean_i;
  if constexpr (kFields == 5) {
    fields[3] = at.variance_j;
    fields[4] = at.cross * mean_i + 2 * at.variance_j * mean_j;
  }
}

// The gradient at a voxel from the window sums of the adjoint fields there.
template <class T>
REGKERNELS_HD T assemble(T own, T other, T cross, T variance, T offset) {
  return other * cross + own * (2 * variance) - offset;  // twice the value itself may overflow
}

}  // namespace regkernels

// Parzen windows, and the terms of the mutual information.
#pragma once

#include <cmath>

#include "core/host_device.h"
#include "maths/fast_math.h"

namespace regkernels {

enum class ParzenKernel { kGaussian, kBSpline, kDelta };

// How many bins to either side of the nearest one a Gaussian window covers. It is one of three
// numbers, so that the compiler knows it. What is further away than kWidths widths of the Gaussian
// is below the rounding of the sum; the window is half a bin wider, as the nearest bin may be that
// far away. The narrow number is for a sigma_ratio of 1 (half a bin), the wide one for 4.
template <class T>
struct GaussianReach {
  static constexpr double kWidths = sizeof(T) == 4 ? 6.5 : 8.6;
  static constexpr int kNarrow = sizeof(T) == 4 ? 3 : 4;
  static constexpr int kMiddling = sizeof(T) == 4 ? 7 : 9;
  static constexpr int kWide = sizeof(T) == 4 ? 13 : 17;

  static int of(double width_in_bins) {
    const double needed = kWidths * width_in_bins + 0.5;
    return needed < kNarrow + 1 ? kNarrow : needed < kMiddling + 1 ? kMiddling : kWide;
  }
};
constexpr int kBSplineReach = 2;

// Intensities are counted in bins: t = x num_bins - 1/2, so that the centre of bin b is at t = b.
template <class T>
struct Parzen {
  int num_bins;
  T sharpness;      // log2(e) / (2 s^2), s being the Gaussian's width in bins
  T inverse_width;  // 1 / s^2
  T falloff[GaussianReach<T>::kWide + 1];  // 2^(-sharpness j^2)
};

// How intensities map to [0, 1]. An empty range maps everything to 0 and has no derivative. What is
// not a number stays so, and a range whose ends are not finite makes it of everything.
template <class T>
struct IntensityRange {
  T low, high;
  T inverse;  // 2 / (high - low), or 0

  REGKERNELS_HD IntensityRange(T l, T h) : low(l), high(h), inverse(0) {
    // The difference is taken by halves, since it may be more than the largest number.
    const T half = T(0.5) * h - T(0.5) * l;
    if (half > 0) inverse = 1 / half;
    if (inverse > largest_inverse()) inverse = 0;
    if (!(half - half == 0)) inverse = half - half;
  }
  REGKERNELS_HD T position(T value, int num_bins) const {
    const T inside = at_least(at_most(value, high), low);
    const T x = (T(0.5) * inside - T(0.5) * low) * inverse;
    return at_most(x, T(1)) * static_cast<T>(num_bins) - T(0.5);
  }
  // The derivative dt / dvalue. At the two ends the clamp passes it.
  REGKERNELS_HD T slope(T value, int num_bins) const {
    return value >= low && value <= high ? T(0.5) * inverse * static_cast<T>(num_bins) : T(0);
  }

 private:
  // The largest inverse with which the slope is finite for any number of bins.
  static REGKERNELS_HD T largest_inverse() { return sizeof(T) == 4 ? T(2.6e36) : T(1.4e306); }
};

// The cubic B-spline and its derivative.
template <class T>
REGKERNELS_HD T b_spline(T d) {
  const T a = d < 0 ? -d : d;
  const T outer = a < 2 ? 2 - a : T(0);
  return a < 1 ? T(2.0 / 3) - a * a * (1 - T(0.5) * a) : outer * outer * outer * T(1.0 / 6);
}
template <class T>
REGKERNELS_HD T b_spline_slope(T d) {
  const T a = d < 0 ? -d : d;
  const T outer = a < 2 ? 2 - a : T(0);
  const T slope = a < 1 ? a * (T(1.5) * a - 2) : T(-0.5) * outer * outer;
  return d < 0 ? -slope : slope;
}

// The bin that a sample is nearest to.
template <ParzenKernel kKernel, class T>
REGKERNELS_HD Rounded<T> nearest_bin(T t, int num_bins) {
  Rounded<T> bin = round_small(t);
  // Bins are half open: what lies between two belongs to the upper one.
  if (kKernel == ParzenKernel::kDelta && t - bin.value == T(0.5))
    bin = {bin.value + 1, bin.integer + 1};
  const bool beyond = bin.integer >= num_bins;
  return {beyond ? static_cast<T>(num_bins - 1) : bin.value, beyond ? num_bins - 1 : bin.integer};
}

// The weights of a sample on the bins about the nearest one, which add up to 1, and their
// derivatives with respect to t.
template <class T, int kReach>
struct ParzenWeights {
  int middle;
  T weight[2 * kReach + 1];
  T slope[2 * kReach + 1];
};

// The values of a Gaussian ever further from the middle, at f + j and f - j for j = 1, 2, ..., from
// exp(-(f - j)^2 / 2s^2) = exp(-f^2 / 2s^2) exp(f / s^2)^j exp(-j^2 / 2s^2)
template <class T>
struct GaussianWings {
  T ratio, inverse_ratio;
  T up, down;

  // Both wings begin in the middle. Without its factor those of a narrow window would overflow.
  REGKERNELS_HD GaussianWings(const Parzen<T>& window, T f)
      : ratio(exp2_of(2 * (window.sharpness * f))),
        inverse_ratio(reciprocal(ratio)),
        up(exp2_of(-(window.sharpness * f) * f)),
        down(up) {}
  REGKERNELS_HD void advance() {
    up *= ratio;
    down *= inverse_ratio;
  }
};

template <ParzenKernel kKernel, bool kSlopes, class T, int kReach>
REGKERNELS_HD void parzen_weights(const Parzen<T>& window, T t, ParzenWeights<T, kReach>& out) {
  const Rounded<T> bin = nearest_bin<kKernel>(t, window.num_bins);
  const T f = t - bin.value;
  out.middle = bin.integer;
  if constexpr (kKernel == ParzenKernel::kDelta) {
    out.weight[kReach] = 1;
    return;
  }
  T sum, slopes;
  if constexpr (kKernel == ParzenKernel::kGaussian) {
    GaussianWings<T> wings(window, f);
    sum = out.weight[kReach] = wings.up;
    slopes = kSlopes ? out.slope[kReach] = -f * wings.up : T(0);
    REGKERNELS_UNROLL
    for (int j = 1; j <= kReach; ++j) {
      wings.advance();
      // The products are not conditional: a conditional load would keep this from vector code.
      const T to_above = wings.up * window.falloff[j], to_below = wings.down * window.falloff[j];
      const T above = out.middle + j < window.num_bins ? to_above : T(0);
      const T below = out.middle - j >= 0 ? to_below : T(0);
      out.weight[kReach + j] = above;
      out.weight[kReach - j] = below;
      sum += above + below;
      if constexpr (kSlopes) {
        out.slope[kReach + j] = (static_cast<T>(j) - f) * above;
        out.slope[kReach - j] = (static_cast<T>(-j) - f) * below;
        slopes += out.slope[kReach + j] + out.slope[kReach - j];
      }
    }
  } else {
    sum = slopes = 0;
    REGKERNELS_UNROLL
    for (int j = -kReach; j <= kReach; ++j) {
      const int b = out.middle + j;
      const bool inside = b >= 0 && b < window.num_bins;
      out.weight[kReach + j] = inside ? b_spline(f - static_cast<T>(j)) : T(0);
      sum += out.weight[kReach + j];
      if constexpr (kSlopes) {
        out.slope[kReach + j] = inside ? b_spline_slope(f - static_cast<T>(j)) : T(0);
        slopes += out.slope[kReach + j];
      }
    }
  }
  const T inverse_sum = reciprocal(sum);
  const T mean_slope = slopes * inverse_sum;
  const T unit = kKernel == ParzenKernel::kGaussian ? window.inverse_width : T(1);
  REGKERNELS_UNROLL
  for (int j = -kReach; j <= kReach; ++j) {
    T& weight = out.weight[kReach + j];
    if constexpr (kSlopes) {
      T& slope = out.slope[kReach + j];
      slope = (slope - weight * mean_slope) * inverse_sum * unit;
    }
    weight *= inverse_sum;
  }
}

// One bin's term of the sum, p log((p + nr) / (q + dr) + dr), and its derivatives with respect to
// p and to q = p_a p_b.
struct InformationTerm {
  double value;
  double by_p;
  double by_q;
};

REGKERNELS_HD InformationTerm information_term(double p, double q, double smooth_nr,
                                               double smooth_dr) {
  const double inverse = 1 / (q + smooth_dr);
  const double ratio = (p + smooth_nr) * inverse;
  const double argument = ratio + smooth_dr;
  const double logarithm = log(argument);
  const double slope = p * inverse / argument;
  return {p * logarithm, logarithm + slope, -slope * ratio};
}

// One share's term of an entropy.
REGKERNELS_HD double entropy_term(double p) { return p == 0 ? 0.0 : -p * log(p); }

// The normalised mutual information, (H(A) + H(B)) / H(A, B), and its derivatives.
class NormalisedInformation {
 public:
  // Takes H(A) + H(B) and H(A, B). Where the latter is 0, or as good as that, neither image tells
  // anything: as for images that are independent the value is 1, and nothing would change it.
  REGKERNELS_HD NormalisedInformation(double separate, double joint)
      : value_(joint < kLeastEntropy ? 1.0 : separate / joint),
        inverse_(joint < kLeastEntropy ? 0.0 : 1 / joint) {}

  REGKERNELS_HD double value() const { return value_; }
  // The derivative with respect to p, marginals included, but for a constant, which makes no
  // difference because the slopes of a sample's weights add up to 0. It is 0 where A and B are
  // independent. No sample has a part in a bin of p = 0.
  REGKERNELS_HD double slope(double p, double p_a, double p_b) const {
    return p == 0 ? 0.0 : (value_ * log(p) - log(p_a) - log(p_b)) * inverse_;
  }

 private:
  // Far below the joint entropy of two images of which a single voxel of 2^31 differs from the
  // others, 1e-8, and far above what rounding makes of the shares of a constant image, 1e-15.
  static constexpr double kLeastEntropy = 1e-10;
  double value_, inverse_;
};

}  // namespace regkernels

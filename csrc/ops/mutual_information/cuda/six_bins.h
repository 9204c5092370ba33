// Gaussian windows of the six bins nearest to a sample, three on either side of it: all that counts
// in single precision where the Gaussian is no wider than half a bin. What is further away than
// three bins is then below e^-18, a quarter of the rounding of the weights' sum.
#pragma once

#include <cmath>

#include "core/for_each.h"
#include "ops/mutual_information/call.h"

namespace regkernels {
namespace {

inline constexpr int kSixBins = 6;
inline constexpr int kSixReach = 3;  // how far a window reaches over the ends of the bins

// Bins about a sample at t are at the distances 1/2 - e, 3/2 - e, ... above and 1/2 + e, ... below,
// e being how far it is above the middle between the two nearest ones. With x = exp(e / 2s^2) their
// weights are x, x^3 second, x^5 second third above, and the same with 1 / x below, in units of
// what a bin half a bin away would have: the units drop out when weights are divided by their sum.
struct SixBins {
  int num_bins;
  float sharpness;      // log2(e) / (2 s^2), as in Parzen
  float inverse_width;  // 1 / s^2
  float second, third;

  explicit SixBins(const Parzen<float>& window)
      : num_bins(window.num_bins),
        sharpness(window.sharpness),
        inverse_width(window.inverse_width),
        second(static_cast<float>(std::exp2(-2.0 * window.sharpness))),
        third(static_cast<float>(std::exp2(-4.0 * window.sharpness))) {}

  // The first of the six bins of a sample at t.
  __device__ __forceinline__ static int first(float t) { return round_small(t - 0.5f).integer - 2; }

  // Whether six bins are all that counts.
  static bool suffice(const MutualInformationCall& checked, const Parzen<float>& window) {
    return checked.kernel == ParzenKernel::kGaussian && window.inverse_width >= 4;
  }
};

// The weights of a sample on bins first, first + 1, ..., those beyond the ends included, and what
// they add up to without these.
struct SixWeights {
  int first;
  float weight[kSixBins];
  float sum;
  float moment;  // sum of (b - 2) weight[b], if kMoment

  // All weights are multiplied by `unit`, a power of two.
  template <bool kMoment>
  __device__ __forceinline__ static SixWeights at(const SixBins& bins, float t, float unit) {
    SixWeights out;
    const Rounded<float> below = round_small(t - 0.5f);
    const float exponent = bins.sharpness * (t - 0.5f - below.value);
    const float up = exp2_of(exponent), down = exp2_of(-exponent);
    const float up_squared = up * up, down_squared = down * down;
    float (&w)[kSixBins] = out.weight;
    w[3] = up * unit, w[2] = down * unit;
    w[4] = w[3] * (up_squared * bins.second), w[1] = w[2] * (down_squared * bins.second);
    w[5] = w[4] * (up_squared * bins.third), w[0] = w[1] * (down_squared * bins.third);
    out.first = SixBins::first(t);
    out.sum = out.moment = 0;
    // From the middle outwards, so that the small ones of an end do not vanish beside what is not
    // there.
    REGKERNELS_UNROLL
    for (int k = 0; k < kSixReach; ++k) {
      const int lower = 2 - k, upper = 3 + k;
      if (below.integer >= k) {
        out.sum += w[lower];
        if constexpr (kMoment) out.moment += static_cast<float>(lower - 2) * w[lower];
      }
      if (below.integer < bins.num_bins - 1 - k) {
        out.sum += w[upper];
        if constexpr (kMoment) out.moment += static_cast<float>(upper - 2) * w[upper];
      }
    }
    return out;
  }
};

}  // namespace
}  // namespace regkernels

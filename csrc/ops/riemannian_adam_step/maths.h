#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dispatch.h"
#include "core/half.h"
#include "core/host_device.h"
#include "core/operand.h"
#include "maths/fast_math.h"
#include "maths/product_plus.h"
#include "ops/riemannian_adam_step/call.h"

namespace regkernels {

// The unsigned integer with the bits of a T. Numbers that are not negative are in the order of
// their bits, and what is not a number comes after infinity: so that the largest of many can be
// found in any order, and is one that is not a number if any is.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = unsigned long long;
};

template <class T>
REGKERNELS_HD typename BitsOf<T>::type magnitude_bits(T value) {
  using Bits = typename BitsOf<T>::type;
  Bits bits;
  memcpy(&bits, &value, sizeof(T));
  return bits & ~(Bits(1) << (8 * sizeof(T) - 1));
}

template <class T>
REGKERNELS_HD T value_of_bits(typename BitsOf<T>::type bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// 32 bits that look random, for a component of a vector of the whole volume in a step.
REGKERNELS_HD uint32_t dither_bits(int64_t component, int32_t count) {
  uint32_t bits = static_cast<uint32_t>(component) * 0x9e3779b1u +
                  static_cast<uint32_t>(component >> 32) * 0x85ebca77u +
                  static_cast<uint32_t>(count) * 0xc2b2ae3du;
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
  return bits ^ (bits >> 16);
}

// A moment as it is stored. What changes by less than half a last place in a step would not change
// at all if it were rounded to the nearest; so it is rounded up as often as its lower bits are
// large beside 16 others, which hit all numbers alike from step to step.
template <class M, class T>
REGKERNELS_HD M stored_moment(T value, uint32_t dither) {
  if constexpr (std::is_same_v<M, T>) {
    return value;
  } else {
    static_assert(std::is_same_v<M, BFloat16> && std::is_same_v<T, float>);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    // What is not finite keeps its upper bits, of which those of a NaN may not become 0.
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    const bool is_nan = !finite && (bits & 0x007fffffu) != 0;
    return {static_cast<uint16_t>((bits + (finite ? dither & 0xffffu : 0u)) >> 16 |
                                  (is_nan ? 0x40u : 0u))};
  }
}

// The operands of one batch item that are the same for all of its voxels.
template <class T>
struct AdamRule {
  T beta1, beta2;
  T first, second;  // what the moments are multiplied by so that they are without bias
  T scale;          // of the gradient
  int32_t count;

  REGKERNELS_HD T mean(T gradient, T mu) const {
    return product_plus(beta1, mu, (1 - beta1) * (scale * gradient));
  }
  REGKERNELS_HD T mean_square(T gradient, T nu) const {
    const T scaled = scale * gradient;
    return product_plus(beta2, nu, (1 - beta2) * (scaled * scaled));
  }
  REGKERNELS_HD T direction(T mu, T nu, T epsilon_here) const {
    return first * mu * reciprocal(root(second * nu) + epsilon_here);
  }
};

// What a step makes of one number: its moments as they are stored, and its direction.
template <class T, class M>
struct MomentsOfNumber {
  M mu, nu;
  T direction;

  // Which number of the whole volume it is decides how its moments are rounded.
  REGKERNELS_HD MomentsOfNumber(const AdamRule<T>& rule, T gradient, T mu_before, T nu_before,
                                T epsilon, int64_t in_volume) {
    const uint32_t dither = std::is_same_v<M, T> ? 0 : dither_bits(in_volume, rule.count);
    mu = stored_moment<M>(rule.mean(gradient, mu_before), dither >> 16);
    nu = stored_moment<M>(rule.mean_square(gradient, nu_before), dither);
    // The step is made of what is stored.
    direction = rule.direction(to_arithmetic(mu), to_arithmetic(nu), epsilon);
  }
};

// Makes the rule of an item.
template <class T>
struct AdamRules {
  T beta1, beta2;
  double log_beta1, log_beta2;
  Operand<const int32_t> count;
  Operand<const T> epsilon, scale;

  AdamRules(const Call& call, const AdamCall& checked, const Tensor& scale)
      : beta1(static_cast<T>(checked.beta1)),
        beta2(static_cast<T>(checked.beta2)),
        log_beta1(std::log(checked.beta1)),
        log_beta2(std::log(checked.beta2)),
        count(call.input("count")),
        epsilon(call.input("epsilon")),
        scale(scale) {}

  REGKERNELS_HD AdamRule<T> of(int64_t group, int64_t item) const {
    AdamRule<T> rule;
    rule.beta1 = beta1;
    rule.beta2 = beta2;
    // 1 - beta^step; a beta of 0 has a logarithm of minus infinity, and leaves 1.
    const T step = static_cast<T>(*count.at(group, item)) + 1;
    rule.first = -1 / expm1(step * static_cast<T>(log_beta1));
    rule.second = -1 / expm1(step * static_cast<T>(log_beta2));
    rule.count = *count.at(group, item);
    rule.scale = scale.data == nullptr ? T(1) : *scale.at(group, item);
    return rule;
  }
};

// What a direction is multiplied by, so that it is a displacement in normalised coordinates.
template <class T, int D>
struct StepScale {
  T learning_rate;
  T voxel[D];  // the distance of two voxels, x first; 0 along an axis of one voxel

  StepScale(const AdamCall& checked) : learning_rate(static_cast<T>(checked.learning_rate)) {
    const int64_t sizes[3] = {checked.sizes.x, checked.sizes.y, checked.planes};
    for (int k = 0; k < D; ++k) {
      voxel[k] = static_cast<T>(sizes[k] > 1 ? 2.0 / static_cast<double>(sizes[k] - 1) : 0.0);
    }
  }

  // The common factor of an item's displacements. What is not a number stays so.
  REGKERNELS_HD T length(T longest) const {
    return -learning_rate * (longest <= T(0.5) ? T(1) : T(0.5) / longest);
  }
};

// Calls body(checked, TypeTag<T>, TypeTag<M>, IntTag<D>) with the types for this call; moments are
// stored as M.
template <class Body>
void with_adam(const Call& call, const Body& body) {
  const auto& checked = call.checked<AdamCall>();
  dispatch_dtype(checked.dtype, [&](auto type) {
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      if constexpr (std::is_same_v<typename decltype(type)::type, float>) {
        if (checked.moments == DType::kBFloat16) {
          return body(checked, type, TypeTag<BFloat16>{}, dimensions);
        }
      }
      body(checked, type, type, dimensions);
    });
  });
}

}  // namespace regkernels

// Elementary functions that are faster than the standard ones, nearly as exact, and exact enough
// for what they are used for here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace regkernels {

// The reciprocal of a normal number, to within a unit in the last place: on CUDA an exact quotient
// takes ten instructions.
REGKERNELS_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / x;
#endif
}
REGKERNELS_HD double reciprocal(double x) { return 1 / x; }

// The square root, to within two units in the last place; that of a number below the normal ones
// is 0 on CUDA.
REGKERNELS_HD float root(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::sqrt(x);
#endif
}
REGKERNELS_HD double root(double x) { return sqrt(x); }

// The smaller or the larger of x, which stays NaN if it is, and a bound that is a number. On CUDA
// that is one instruction instead of two.
REGKERNELS_HD float at_most(float x, float bound) {
#ifdef __CUDA_ARCH__
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(bound));
  return result;
#else
  return x > bound ? bound : x;
#endif
}
REGKERNELS_HD float at_least(float x, float bound) {
#ifdef __CUDA_ARCH__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(bound));
  return result;
#else
  return x < bound ? bound : x;
#endif
}
REGKERNELS_HD double at_most(double x, double bound) { return x > bound ? bound : x; }
REGKERNELS_HD double at_least(double x, double bound) { return x < bound ? bound : x; }

// An integer, as a number of type T and as an int.
template <class T>
struct Rounded {
  T value;
  int integer;
};

// Rounds a number below 2^21 in magnitude to the nearest integer, half to even: a large number is
// added that leaves no room for the fraction.
REGKERNELS_HD Rounded<float> round_small(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return {shifted - 12582912.0f, bits - 0x4b400000};
}
REGKERNELS_HD Rounded<double> round_small(double x) {
  const double shifted = x + 6755399441055744.0;  // 1.5 2^52
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return {shifted - 6755399441055744.0, static_cast<int>(bits)};
}

REGKERNELS_HD double exp2_of(double x) {
#ifdef __CUDA_ARCH__
  return exp2(x);
#else
  return std::exp2(x);
#endif
}

// 2^x, to about a unit in the last place. A result below the normal numbers is 0 (nearly 0 on the
// CPU). There is no branch, so that the compiler makes vector code.
REGKERNELS_HD float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  x = x < -126.0f ? -126.0f : x;
  const Rounded<float> whole = round_small(x);
  const float y = (x - whole.value) * 0.693147181f;
  float power = 1.0f / 5040;
  power = power * y + 1.0f / 720;
  power = power * y + 1.0f / 120;
  power = power * y + 1.0f / 24;
  power = power * y + 1.0f / 6;
  power = power * y + 0.5f;
  power = power * y + 1.0f;
  power = power * y + 1.0f;
  const int32_t scale_bits = (whole.integer + 127) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  return power * scale;
#endif
}

// The logarithm to the base 2, to about a unit in the last place; that of 0 is -infinity.
REGKERNELS_HD float log2_of(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}
REGKERNELS_HD double log2_of(double x) {
#ifdef __CUDA_ARCH__
  return log2(x);
#else
  return std::log2(x);
#endif
}

}  // namespace regkernels

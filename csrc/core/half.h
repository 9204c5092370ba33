// Numbers of 16 bits: a way to store values, which are computed with as float.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace regkernels {

struct Float16 {
  uint16_t bits;  // IEEE 754 binary16: sign, 5 bits of exponent, 10 of mantissa
};
struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

// The type that values stored as S are computed in.
template <class S>
struct ArithmeticOf {
  using type = S;
};
template <>
struct ArithmeticOf<Float16> {
  using type = float;
};
template <>
struct ArithmeticOf<BFloat16> {
  using type = float;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Exponents of float are biased by 112 more than those of binary16, mantissas are 13 bits longer.
inline constexpr uint32_t kRebias = 112u << 23;

REGKERNELS_HD float to_arithmetic(float value) { return value; }
REGKERNELS_HD double to_arithmetic(double value) { return value; }
REGKERNELS_HD float to_arithmetic(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x400) {
    // A subnormal number goes by way of an integer: a thread that takes subnormal floats for 0
    // (XLA's do) would lose it on any other.
    const float size = static_cast<float>(magnitude) * 0x1p-24f;
    return float_from_bits(sign | float_bits(size));
  }
  // Infinities and NaN have the largest exponent in both.
  const uint32_t rebias = magnitude < 0x7c00 ? kRebias : 2 * kRebias;
  return float_from_bits(sign | ((magnitude << 13) + rebias));
#endif
}
REGKERNELS_HD float to_arithmetic(BFloat16 value) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
#endif
}

// Rounds to the nearest value that can be stored, to the even one of two. Values that are too large
// become infinite.
inline Float16 round_to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= float_bits(65536.0f)) {
    result = 0x7c00u;
  } else if (magnitude < float_bits(0x1p-14f)) {
    // A subnormal result is a multiple of 2^-24, which is also the spacing of floats from 0.5 on.
    result = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    const uint32_t odd = magnitude >> 13 & 1u;
    result = (magnitude - kRebias + 0xfffu + odd) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}
inline BFloat16 round_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t odd = bits >> 16 & 1u;
  const uint32_t result = is_nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + odd) >> 16;
  return {static_cast<uint16_t>(result)};
}

// Converts a value of the arithmetic type to the type S that it is stored in.
template <class S>
REGKERNELS_HD S to_storage(Arithmetic<S> value) {
  return value;
}
template <>
REGKERNELS_HD Float16 to_storage<Float16>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return round_to_float16(value);
#endif
}
template <>
REGKERNELS_HD BFloat16 to_storage<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return round_to_bfloat16(value);
#endif
}

}  // namespace regkernels

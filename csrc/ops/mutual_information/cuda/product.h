// The product of two matrices, (bins x samples) (samples x bins), that the joint histogram is, on
// the tensor cores: a tile of 32 x 32 bins at a time. A dense product does many times the additions
// that windows of seven bins need, and yet takes less time than to add them where they belong:
// shared memory is not involved, and it makes no difference which intensities there are, so that a
// background of one intensity does not slow it down.
//
// Single precision is kept by splitting weights into two halves, w = high + low, and leaving out
// low x low.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/cuda/counting.h"

namespace regkernels {
namespace {

inline constexpr int kTile = 32;  // bins along either side of a tile
// Every lane looks after the bins of one residue modulo 8, of which a tile has four.
inline constexpr int kResidues = 8;
inline constexpr int kQuotients = kTile / kResidues;

// The sums that a lane has of the product; its Factor is the lane's share of the weights of some
// samples on the bins of a tile, for one image, laid out as the tensor cores take either factor.
//
// In single precision a step takes 16 samples, four of them to each lane; a lane and its seven
// neighbours with the same samples have all 32 bins. In double precision it takes four.
template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int kSamples = 16, kPerLane = 4;
  static constexpr float kScale =
      4096;  // multiplies weights, which keeps halves from the subnormal

  struct Factor {
    uint32_t high[kQuotients][2], low[kQuotients][2];

    // The bits of a pair of values in half precision, and those of what is left of them.
    __device__ __forceinline__ static uint2 split(float first, float second) {
      const __half2 high = __floats2half2_rn(first, second);
      const float2 rounded = __half22float2(high);
      const __half2 low = __floats2half2_rn(first - rounded.x, second - rounded.y);
      return {reinterpret_cast<const uint32_t&>(high), reinterpret_cast<const uint32_t&>(low)};
    }
    // Each sample's one weight goes to the bin of its quotient.
    __device__ __forceinline__ void place(const float (&weight)[4], const int (&quotient)[4]) {
      REGKERNELS_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const uint2 bits = split(weight[2 * pair], weight[2 * pair + 1]);
        // The byte of the quotient gets a sign bit, if it is one of the four: the permutation below
        // makes sixteen bits of it.
        const uint32_t first = sign_in_byte(quotient[2 * pair]);
        const uint32_t second = sign_in_byte(quotient[2 * pair + 1]);
        REGKERNELS_UNROLL
        for (int q = 0; q < kQuotients; ++q) {
          const uint32_t select = halves_of_signs(first, second, q);
          high[q][pair] = bits.x & select;
          low[q][pair] = bits.y & select;
        }
      }
    }
    __device__ __forceinline__ void set(int q, const float (&weight)[4]) {
      REGKERNELS_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const uint2 bits = split(weight[2 * pair], weight[2 * pair + 1]);
        high[q][pair] = bits.x;
        low[q][pair] = bits.y;
      }
    }

   private:
    __device__ __forceinline__ static uint32_t sign_in_byte(int quotient) {
      // Shifts by more than the width of a word give 0 in PTX, though not in C++.
      uint32_t result;
      asm("shl.b32 %0, %1, %2;" : "=r"(result) : "r"(0x80u), "r"(8 * quotient));
      return result;
    }
    // The sign of byte q of either word, as the lower and the upper half.
    __device__ __forceinline__ static uint32_t halves_of_signs(uint32_t first, uint32_t second,
                                                               int q) {
      uint32_t result;
      asm("prmt.b32 %0, %1, %2, %3;"
          : "=r"(result)
          : "r"(first), "r"(second), "r"(0xcc88 + 0x1111 * q));
      return result;
    }
  };

  float recent[2][kQuotients][4];
  float sums[2][kQuotients][4];
  int steps = 0;

  __device__ Product() {
    each([&](int m, int n, int k) { recent[m][n][k] = sums[m][n][k] = 0; });
  }

  __device__ __forceinline__ void add(const Factor& pred, const Factor& target) {
    REGKERNELS_UNROLL
    for (int m = 0; m < 2; ++m) {
      REGKERNELS_UNROLL
      for (int n = 0; n < kQuotients; ++n) {
        multiply(recent[m][n], pred.high, m, target.high[n]);
        multiply(recent[m][n], pred.high, m, target.low[n]);
        multiply(recent[m][n], pred.low, m, target.high[n]);
      }
    }
    // The tensor cores cut off instead of rounding, so not too many sums may follow each other.
    if (++steps % 16 == 0) settle();
  }
  __device__ __forceinline__ void settle() {
    each([&](int m, int n, int k) {
      sums[m][n][k] += recent[m][n][k];
      recent[m][n][k] = 0;
    });
  }
  // Calls body(a, b, sum) for the bins of the tile that this lane has.
  template <class Body>
  __device__ __forceinline__ void for_each_bin(const Body& body) const {
    const int row = threadIdx.x % kWarp / 4, column = 2 * (threadIdx.x % 4);
    each([&](int m, int n, int k) {
      body(16 * m + row + 8 * (k / 2), 8 * n + column + k % 2, sums[m][n][k]);
    });
  }

 private:
  template <class Body>
  __device__ __forceinline__ static void each(const Body& body) {
    REGKERNELS_UNROLL
    for (int m = 0; m < 2; ++m) {
      REGKERNELS_UNROLL
      for (int n = 0; n < kQuotients; ++n) {
        REGKERNELS_UNROLL
        for (int k = 0; k < 4; ++k) body(m, n, k);
      }
    }
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4],
                                                  const uint32_t (&rows)[kQuotients][2], int m,
                                                  const uint32_t (&columns)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows[2 * m][0]), "r"(rows[2 * m + 1][0]), "r"(rows[2 * m][1]),
          "r"(rows[2 * m + 1][1]), "r"(columns[0]), "r"(columns[1]));
  }
};

template <>
struct Product<double> {
  static constexpr int kSamples = 4, kPerLane = 1;
  static constexpr double kScale = 1;

  struct Factor {
    double value[kQuotients];

    __device__ __forceinline__ void place(const double (&weight)[1], const int (&quotient)[1]) {
      REGKERNELS_UNROLL
      for (int q = 0; q < kQuotients; ++q) value[q] = quotient[0] == q ? weight[0] : 0.0;
    }
    __device__ __forceinline__ void set(int q, const double (&weight)[1]) { value[q] = weight[0]; }
  };

  double sums[kQuotients][kQuotients][2];

  __device__ Product() {
    each([&](int m, int n, int k) { sums[m][n][k] = 0; });
  }
  __device__ __forceinline__ void add(const Factor& pred, const Factor& target) {
    REGKERNELS_UNROLL
    for (int m = 0; m < kQuotients; ++m) {
      REGKERNELS_UNROLL
      for (int n = 0; n < kQuotients; ++n) {
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(sums[m][n][0]), "+d"(sums[m][n][1])
            : "d"(pred.value[m]), "d"(target.value[n]));
      }
    }
  }
  __device__ __forceinline__ void settle() {}
  template <class Body>
  __device__ __forceinline__ void for_each_bin(const Body& body) const {
    const int row = threadIdx.x % kWarp / 4, column = 2 * (threadIdx.x % 4);
    each([&](int m, int n, int k) { body(8 * m + row, 8 * n + column + k, sums[m][n][k]); });
  }

 private:
  template <class Body>
  __device__ __forceinline__ static void each(const Body& body) {
    REGKERNELS_UNROLL
    for (int m = 0; m < kQuotients; ++m) {
      REGKERNELS_UNROLL
      for (int n = 0; n < kQuotients; ++n) {
        REGKERNELS_UNROLL
        for (int k = 0; k < 2; ++k) body(m, n, k);
      }
    }
  }
};

}  // namespace
}  // namespace regkernels

// The joint histogram of few bins and windows of six: every sample is added where it belongs. Each
// lane of a warp has a copy of all bins in its own bank of shared memory, if there is room, so that
// lanes never wait for each other whatever the intensities are.
//
// Sums are integers of 32 bits, for which shared memory has an adder: their order makes no
// difference, nor does it how many copies there are or how samples are dealt out. What is below
// half of a unit is lost, so this is for samples that all weigh the same, without a mask.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/extremes.h"
#include "ops/mutual_information/cuda/six_bins.h"

namespace regkernels {
namespace {

// There is one block to a multiprocessor, and its registers are for so many threads.
inline constexpr int kDirectThreads = 1024;
// With so many bins 32 copies fit into the shared memory of a large GPU, and four into any.
inline constexpr int kMostDirectBins = 36;
inline constexpr int kLeastLogDirectCopies = 2;

// A sample adds 2^bits to all bins together. Of small volumes a bin has room for more.
inline int direct_bits(int64_t whole_samples) {
  int bits = 23;
  while (bits > 21 && (int64_t{1} << (44 - bits)) < whole_samples) --bits;
  return bits;
}
// The most samples that a block may add up in copies of 32 bits. Their threads are dealt out evenly
// to the copies, each with a sample more than the average at most.
inline int64_t most_direct_samples(int bits, int log_copies) {
  return (((int64_t{1} << (32 - bits)) - 1) << log_copies) - kDirectThreads;
}

inline int64_t direct_bytes(int num_bins) {
  const int64_t size = num_bins + 2 * kSixReach;
  return size * size * static_cast<int64_t>(sizeof(uint32_t));
}

// Each block counts one part of the samples of an element. The axes of the grid are parts and
// elements. There are 2^log_copies copies of the bins; kLogCopies is that number if the compiler is
// to know it, else negative.
template <int kLogCopies>
__global__ void __launch_bounds__(kDirectThreads, 1)
    direct_count_kernel(const __grid_constant__ Counting<float> call,
                        const __grid_constant__ SixBins bins, int bits, int given_log_copies) {
  extern __shared__ uint4 shared_quads[];
  uint32_t* const copies = reinterpret_cast<uint32_t*>(shared_quads);
  const int num_bins = bins.num_bins, size = num_bins + 2 * kSixReach;
  const int log_copies = kLogCopies >= 0 ? kLogCopies : given_log_copies;
  const int stride = 1 << log_copies;
  uint32_t* const own = copies + threadIdx.x % stride;
  // The product of two weights is to be a subnormal number, whose bits are its multiple of 2^-149
  // as an integer, rounded to the nearest. Either factor is a normal one, though.
  constexpr float kColumnUnit = 1.0f / (int64_t{1} << 62);
  const float row_unit = exp2f(static_cast<float>(bits - 149 + 62));
  for (int64_t element = blockIdx.y; element < call.elements; element += gridDim.y) {
    __syncthreads();
    for (int i = threadIdx.x; i < size * size * stride / 4; i += kDirectThreads) {
      shared_quads[i] = {0, 0, 0, 0};
    }
    const PairScale<float> scale = read_scale(call.scales, element);  // with a barrier
    const auto [group, item, channel] = call.scales.space.index(element);
    const HistogramOperands<float>& images = call.images;
    const int64_t samples = images.own.of(group);
    const int64_t begin = samples * blockIdx.x / gridDim.x;
    const int count = static_cast<int>(samples * (blockIdx.x + 1) / gridDim.x - begin);
    const float* const pred = images.pred.at(group, item, channel) + begin;
    const float* const target = images.target.at(group, item, channel) + begin;
    unsigned long long* const counts = call.counts + element * (call.bins() + 1);
    bool broken = false;
    float next_pred = 0, next_target = 0;  // on their way while a sample is added
    const auto load = [&](int i) {
      if (i < count) next_pred = pred[i], next_target = target[i];
    };
    load(threadIdx.x);
    REGKERNELS_NO_UNROLL
    for (int i = threadIdx.x; i < count; i += kDirectThreads) {
      const float t_pred = scale.pred.position(next_pred, num_bins);
      const float t_target = scale.target.position(next_target, num_bins);
      load(i + kDirectThreads);
      const float both = t_pred + t_target;
      if (!(both - both == 0)) {
        broken = true;
        continue;
      }
      const SixWeights rows = SixWeights::at<false>(bins, t_pred, 1.0f);
      const SixWeights columns = SixWeights::at<false>(bins, t_target, kColumnUnit);
      const float factor =
          reciprocal(rows.sum) * (reciprocal(columns.sum) * kColumnUnit) * row_unit;
      uint32_t* row = own + ((rows.first + kSixReach) * size + columns.first + kSixReach) * stride;
      REGKERNELS_UNROLL
      for (int a = 0; a < kSixBins; ++a, row += size * stride) {
        const float row_weight = rows.weight[a] * factor;
        REGKERNELS_UNROLL
        for (int b = 0; b < kSixBins; ++b) {
          atomicAdd(row + b * stride, __float_as_uint(__fmul_rn(row_weight, columns.weight[b])));
        }
      }
    }
    __syncthreads();
    // A lane begins with its own copy: together they read from all banks.
    const double units = call.units / static_cast<double>(int64_t{1} << bits);
    for (int i = threadIdx.x; i < num_bins * num_bins; i += kDirectThreads) {
      const int a = i / num_bins + kSixReach, b = i % num_bins + kSixReach;
      unsigned long long sum = 0;
      for (int copy = 0; copy < stride; ++copy) {
        sum += copies[(a * size + b) * stride + (copy + threadIdx.x) % stride];
      }
      if (sum == 0) continue;
      const long long rounded = __double2ll_rn(static_cast<double>(sum) * units);
      atomicAdd(counts + i, static_cast<unsigned long long>(rounded));
    }
    if (broken) atomicOr(counts + call.bins(), 1ull);
  }
}

}  // namespace
}  // namespace regkernels

// The joint histogram of windows of six bins: every sample is added where it belongs. With few bins
// each lane of a warp has a copy of all of them in its own bank of shared memory, if there is room,
// so that lanes never wait for each other whatever the intensities are. With more of them lanes
// share copies, and with many each block counts what touches a tile of the bins.
//
// Sums are integers of 32 bits, for which shared memory has an adder: their order makes no
// difference, nor does it how many copies there are or how samples are dealt out. What is below
// half of a unit is lost, so this is for samples that all weigh the same, without a mask. What is
// rounded evens out over samples that differ. A background does not: its samples, which are at an
// end of the range in both images, are numbered, and what they add is computed once.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/extremes.h"
#include "ops/mutual_information/cuda/six_bins.h"

namespace regkernels {
namespace {

inline constexpr int kLogWarp = 5;
static_assert(1 << kLogWarp == kWarp);

// There is one block to a multiprocessor, and its registers are for so many threads.
inline constexpr int kDirectThreads = 1024;
// Of tiles of so many bins a side there are eight copies in the shared memory of a large GPU, and
// two in any.
inline constexpr int kMostDirectBins = 64;

// The tiles that the bins are cut into, along either axis, and how a copy of one lies in memory: as
// a square, with margins for what windows reach beyond it. Windows begin three bins before the
// first one at the earliest; those that touch a tile of several may begin five before it.
struct DirectTiles {
  int count, bins, margin;

  explicit DirectTiles(int num_bins)
      : count((num_bins + kMostDirectBins - 1) / kMostDirectBins),
        bins((num_bins + count - 1) / count),
        margin(count == 1 ? kSixReach : kSixBins - 1) {}
  REGKERNELS_HD int size() const { return bins + 2 * margin; }
  int64_t bytes() const { return int64_t{1} * size() * size() * int64_t{sizeof(uint32_t)}; }
};

// A sample adds 2^bits to all bins together. Of small volumes a bin has room for more.
inline int direct_bits(int64_t whole_samples) {
  int bits = 23;
  while (bits > 21 && (int64_t{1} << (44 - bits)) < whole_samples) --bits;
  return bits;
}
// The most samples that a block may add up in copies of 32 bits, to which they are dealt out in
// turn.
inline int64_t most_direct_samples(int bits, int log_copies) {
  return ((int64_t{1} << (32 - bits)) - 1) << log_copies;
}

// Samples at an end of the range in both images, of which there are four kinds.
inline constexpr int kEnds = 4;
struct Ends {
  PairScale<float> scale;
  int num_bins;

  __device__ float pred(int kind) const {
    return scale.pred.position(kind % 2 == 0 ? scale.pred.low : scale.pred.high, num_bins);
  }
  __device__ float target(int kind) const {
    return scale.target.position(kind / 2 == 0 ? scale.target.low : scale.target.high, num_bins);
  }
  // What kind of such a sample this is, or -1.
  __device__ __forceinline__ int kind(float value_pred, float value_target) const {
    const bool low_pred = value_pred <= scale.pred.low;
    const bool low_target = value_target <= scale.target.low;
    const bool at_ends = (low_pred | (value_pred >= scale.pred.high)) &
                         (low_target | (value_target >= scale.target.high));
    return at_ends ? (low_pred ? 0 : 1) + (low_target ? 0 : 2) : -1;
  }
};

// Adds a sample's products of weights, each rounded, 2^log_times times.
__device__ __forceinline__ void add_products(const SixWeights& rows, const SixWeights& columns,
                                             float factor, uint32_t* row, int row_stride,
                                             int stride, int log_times) {
  REGKERNELS_UNROLL
  for (int a = 0; a < kSixBins; ++a, row += row_stride) {
    const float row_weight = rows.weight[a] * factor;
    REGKERNELS_UNROLL
    for (int b = 0; b < kSixBins; ++b) {
      const uint32_t product = __float_as_uint(__fmul_rn(row_weight, columns.weight[b]));
      atomicAdd(row + b * stride, product << log_times);
    }
  }
}

// Adds as many samples at the ends as there are of each kind. A product is rounded before it is
// multiplied by their number, so that it makes no difference how they are dealt out to blocks.
__device__ inline void add_ends(const Ends& ends, const SixBins& bins, const int* at_ends,
                                double units, unsigned long long* counts) {
  constexpr int kProducts = kSixBins * kSixBins;
  if (threadIdx.x >= kEnds * kProducts) return;
  const int kind = threadIdx.x / kProducts, place = threadIdx.x % kProducts;
  if (at_ends[kind] == 0) return;
  const SixWeights rows = SixWeights::at<false>(bins, ends.pred(kind), 1.0f);
  const SixWeights columns = SixWeights::at<false>(bins, ends.target(kind), 1.0f);
  float row_weight = 0, column_weight = 0;
  REGKERNELS_UNROLL
  for (int k = 0; k < kSixBins; ++k) {
    if (place / kSixBins == k) row_weight = rows.weight[k];
    if (place % kSixBins == k) column_weight = columns.weight[k];
  }
  const int row = rows.first + place / kSixBins, column = columns.first + place % kSixBins;
  if (unsigned(row) >= unsigned(bins.num_bins) || unsigned(column) >= unsigned(bins.num_bins)) {
    return;
  }
  const double share = static_cast<double>(row_weight) / rows.sum *
                       (static_cast<double>(column_weight) / columns.sum);
  const auto each = static_cast<unsigned long long>(__double2ll_rn(share * units));
  atomicAdd(counts + row * bins.num_bins + column, each * at_ends[kind]);
}

// Each block counts one part of the samples of an element that touch one tile. The axes of the grid
// are parts, elements and tiles. There are 2^log_copies copies of the tile; kLogCopies is that
// number if the compiler is to know it, else negative.
template <int kLogCopies>
__global__ void __launch_bounds__(kDirectThreads, 1)
    direct_count_kernel(const __grid_constant__ Counting<float> call,
                        const __grid_constant__ SixBins bins,
                        const __grid_constant__ DirectTiles tiles, int bits, int given_log_copies) {
  extern __shared__ uint4 shared_quads[];
  uint32_t* const copies = reinterpret_cast<uint32_t*>(shared_quads);
  const int num_bins = bins.num_bins, size = tiles.size();
  const int first_row = static_cast<int>(blockIdx.z) / tiles.count * tiles.bins;
  const int first_column = static_cast<int>(blockIdx.z) % tiles.count * tiles.bins;
  const int log_copies = kLogCopies >= 0 ? kLogCopies : given_log_copies;
  constexpr bool kShares = kLogCopies < kLogWarp;  // lanes have copies in common
  const int stride = 1 << log_copies;
  const int lane = threadIdx.x % kWarp;
  uint32_t* const own = copies + threadIdx.x % stride;
  __shared__ int at_ends[kEnds];
  // The product of two weights is to be a subnormal number, whose bits are its multiple of 2^-149
  // as an integer, rounded to the nearest. Either factor is a normal one, though.
  constexpr float kColumnUnit = 1.0f / (int64_t{1} << 62);
  const float row_unit = exp2f(static_cast<float>(bits - 149 + 62));
  for (int64_t element = blockIdx.y; element < call.elements; element += gridDim.y) {
    __syncthreads();
    for (int i = threadIdx.x; i < size * size * stride / 4; i += kDirectThreads) {
      shared_quads[i] = {0, 0, 0, 0};
    }
    if (threadIdx.x < kEnds) at_ends[threadIdx.x] = 0;
    const PairScale<float> scale = read_scale(call.scales, element);  // with a barrier
    const Ends ends{scale, num_bins};
    const auto [group, item, channel] = call.scales.space.index(element);
    const HistogramOperands<float>& images = call.images;
    const int64_t samples = images.own.of(group);
    const int64_t begin = samples * blockIdx.x / gridDim.x;
    const int count = static_cast<int>(samples * (blockIdx.x + 1) / gridDim.x - begin);
    const float* const pred = images.pred.at(group, item, channel) + begin;
    const float* const target = images.target.at(group, item, channel) + begin;
    unsigned long long* const counts = call.counts + element * (call.bins() + 1);
    bool broken = false;
    unsigned own_ends = 0;  // eight bits for each kind: a thread takes no more than 64 samples
    float next_pred = 0, next_target = 0;  // on their way while a sample is added
    const auto load = [&](int i) {
      if (i < count) next_pred = pred[i], next_target = target[i];
    };
    load(threadIdx.x);
    REGKERNELS_NO_UNROLL
    for (int i = threadIdx.x; i - lane < count; i += kDirectThreads) {
      const float t_pred = scale.pred.position(next_pred, num_bins);
      const float t_target = scale.target.position(next_target, num_bins);
      const int kind = ends.kind(next_pred, next_target);
      load(i + kDirectThreads);
      const float both = t_pred + t_target;
      bool counted = i < count;
      if (counted && !(both - both == 0)) {
        broken = true;
        counted = false;
      }
      if (counted && kind >= 0) {
        own_ends += 1u << (8 * kind);
        counted = false;
      }
      const int row = SixBins::first(t_pred) - first_row + tiles.margin;
      const int column = SixBins::first(t_target) - first_column + tiles.margin;
      if constexpr (kShares) {
        const unsigned last = size - kSixBins;
        counted = counted & (unsigned(row) <= last) & (unsigned(column) <= last);
      }
      int log_times = 0;
      if constexpr (kShares) {
        // Where all lanes have the same sample, as in a background, those that share a copy would
        // wait for each other: one adds what all of them would.
        const bool alike = counted & (t_pred == __shfl_sync(kAllLanes, t_pred, 0)) &
                           (t_target == __shfl_sync(kAllLanes, t_target, 0));
        if (__all_sync(kAllLanes, alike)) {
          counted = lane < stride;
          log_times = kLogWarp - log_copies;
        }
      }
      if (!counted) continue;
      const SixWeights rows = SixWeights::at<false>(bins, t_pred, 1.0f);
      const SixWeights columns = SixWeights::at<false>(bins, t_target, kColumnUnit);
      const float factor =
          reciprocal(rows.sum) * (reciprocal(columns.sum) * kColumnUnit) * row_unit;
      uint32_t* const place = own + (row * size + column) * stride;
      if (log_times == 0) {
        add_products(rows, columns, factor, place, size * stride, stride, 0);
      } else {
        add_products(rows, columns, factor, place, size * stride, stride, log_times);
      }
    }
    if (blockIdx.z == 0) {
      REGKERNELS_UNROLL
      for (int kind = 0; kind < kEnds; ++kind) {
        const int count = warp_sum(static_cast<int>(own_ends >> (8 * kind) & 255));
        if (lane == 0 && count > 0) atomicAdd(&at_ends[kind], count);
      }
    }
    __syncthreads();
    add_ends(ends, bins, at_ends, call.units, counts);
    // A lane begins with its own copy: together they read from all banks.
    const double units = call.units / static_cast<double>(int64_t{1} << bits);
    for (int i = threadIdx.x; i < tiles.bins * tiles.bins; i += kDirectThreads) {
      const int a = i / tiles.bins, b = i % tiles.bins;
      if (first_row + a >= num_bins || first_column + b >= num_bins) continue;
      const int place = (a + tiles.margin) * size + b + tiles.margin;
      unsigned long long sum = 0;
      for (int copy = 0; copy < stride; ++copy) {
        sum += copies[place * stride + (copy + threadIdx.x) % stride];
      }
      if (sum == 0) continue;
      const long long rounded = __double2ll_rn(static_cast<double>(sum) * units);
      atomicAdd(counts + (first_row + a) * num_bins + first_column + b,
                static_cast<unsigned long long>(rounded));
    }
    if (broken) atomicOr(counts + call.bins(), 1ull);
  }
}

}  // namespace
}  // namespace regkernels

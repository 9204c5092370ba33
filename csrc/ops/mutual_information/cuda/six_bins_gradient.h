// The gradient of a sample with windows of six bins, from copies of the table in shared memory.
//
// With rows a and columns b of the table, T_ab, and weights w_a and v_b that are not divided by
// their sums W and V yet, the derivative with respect to the position of the rows is
//
//   (sum_a a w_a S_a - M / W sum_a w_a S_a) / (s^2 W V),   S_a = sum_b T_ab v_b,   M = sum_a a w_a,
//
// where W, V and M leave out what is beyond the ends, and T is 0 there. It does not depend on where
// a is counted from.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/call.h"
#include "ops/mutual_information/cuda/six_bins.h"

namespace regkernels {
namespace {

inline constexpr int kSixThreads = 1024;

// The table is stored as pairs of neighbours along a row, so that three loads get six entries. A
// pair is copied for each half of a warp, which is what a load of pairs takes at a time.
inline constexpr int kLogPairCopies = 4;
// Other numbers of copies, as the template below takes them.
inline constexpr int kFewerPairCopies = -1, kNoPairs = -2;

// Each block computes the gradients of one part of the samples of an element, or, where items share
// a gradient, of all elements of a group and channel. The axes of the grid are parts and `batch`,
// the number of elements or of groups and channels. There are 2^kLogCopies copies of the table, or
// 2^given_log_copies, or none: then it is read from where it is.
template <int kLogCopies, bool kPred, bool kTarget>
__global__ void __launch_bounds__(kSixThreads, 1)
    six_bins_gradient_kernel(const __grid_constant__ GradientOperands<float> call,
                             const __grid_constant__ SixBins bins, int64_t batch,
                             int given_log_copies) {
  extern __shared__ float2 shared_pairs[];
  const int num_bins = bins.num_bins, size = num_bins + 2 * kSixReach, entries = size * size;
  const int log_copies = kLogCopies >= 0 ? kLogCopies : given_log_copies;
  const int stride = kLogCopies == kNoPairs ? 1 : 1 << log_copies;
  const int64_t items_here = call.items_together() ? call.space.items : 1;
  const ElementSpace outer{call.space.items / items_here, call.space.channels};
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    ElementIndex index = outer.index(b);
    const int64_t samples = call.own.of(index.group);
    const int64_t begin = samples * blockIdx.x / gridDim.x;
    const int count = static_cast<int>(samples * (blockIdx.x + 1) / gridDim.x - begin);
    for (int64_t n = 0; n < items_here; ++n) {
      if (items_here > 1) index.item = n;
      const auto [group, item, channel] = index;
      const float* const table = call.table_of(index);
      if constexpr (kLogCopies != kNoPairs) {
        __syncthreads();
        for (int i = threadIdx.x; i < entries << log_copies; i += kSixThreads) {
          const int entry = i >> log_copies;
          shared_pairs[i] = {table[entry], table[min(entry + 1, entries - 1)]};
        }
        __syncthreads();
      }
      const float2* const own_pairs = shared_pairs + (threadIdx.x & (stride - 1));
      const PairScale<float> scale = call.scale(index);
      const float factor = call.factor(index) * bins.inverse_width;
      const float* const pred = call.pred.at(group, item, channel) + begin;
      const float* const target = call.target.at(group, item, channel) + begin;
      const float* const mask =
          call.mask.present() ? call.mask.at(group, item, channel) + begin : nullptr;
      float* const grad_pred = kPred ? call.grad_pred.at(group, item, channel) + begin : nullptr;
      float* const grad_target =
          kTarget ? call.grad_target.at(group, item, channel) + begin : nullptr;
      const bool add_pred = call.sum_pred && n > 0, add_target = call.sum_target && n > 0;
      float next_pred = 0, next_target = 0;  // on their way while a gradient is computed
      const auto load = [&](int i) {
        if (i < count) next_pred = pred[i], next_target = target[i];
      };
      load(threadIdx.x);
      REGKERNELS_NO_UNROLL
      for (int i = threadIdx.x; i < count; i += kSixThreads) {
        const float value_pred = next_pred, value_target = next_target;
        load(i + kSixThreads);
        float t_pred = scale.pred.position(value_pred, num_bins);
        float t_target = scale.target.position(value_target, num_bins);
        if (!(t_pred + t_target == t_pred + t_target)) {
          t_pred = t_target = 0;  // what is not a number has no place in the table
        }
        const SixWeights rows = SixWeights::at<kPred>(bins, t_pred, 1.0f);
        const SixWeights columns = SixWeights::at<kTarget>(bins, t_target, 1.0f);
        const int place = (rows.first + kSixReach) * size + columns.first + kSixReach;
        const float2* pairs = own_pairs + place * stride;
        const float* entry = table + place;
        float whole = 0, first_pred = 0, first_target = 0;
        REGKERNELS_UNROLL
        for (int a = 0; a < kSixBins; ++a, pairs += size * stride, entry += size) {
          float sum = 0, first = 0;
          REGKERNELS_UNROLL
          for (int b = 0; b < kSixBins; b += 2) {
            float2 pair;
            if constexpr (kLogCopies != kNoPairs) {
              pair = pairs[b * stride];
            } else {
              pair = {entry[b], entry[b + 1]};
            }
            sum += pair.x * columns.weight[b];
            sum += pair.y * columns.weight[b + 1];
            if constexpr (kTarget) {
              first += pair.x * (static_cast<float>(b - 2) * columns.weight[b]);
              first += pair.y * (static_cast<float>(b - 1) * columns.weight[b + 1]);
            }
          }
          const float part = sum * rows.weight[a];
          whole += part;
          if constexpr (kPred) first_pred += static_cast<float>(a - 2) * part;
          if constexpr (kTarget) first_target += first * rows.weight[a];
        }
        const float per_pred = reciprocal(rows.sum), per_target = reciprocal(columns.sum);
        const float weight = mask == nullptr ? 1.0f : scale.weight(mask[i]);
        const float unit = weight * factor * (per_pred * per_target);
        const auto store = [&](float* to, float gradient, float slope, bool add) {
          const float scaled = weight * factor == 0 ? 0.0f : unit * gradient * slope;
          to[i] = add ? to[i] + scaled : scaled;
        };
        if constexpr (kPred) {
          store(grad_pred, first_pred - rows.moment * per_pred * whole,
                scale.pred.slope(value_pred, num_bins), add_pred);
        }
        if constexpr (kTarget) {
          store(grad_target, first_target - columns.moment * per_target * whole,
                scale.target.slope(value_target, num_bins), add_target);
        }
      }
    }
  }
}

}  // namespace
}  // namespace regkernels

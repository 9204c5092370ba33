// The gradient of a sample is a sum over the same windows of bins as its counts, with weights from
// a small table. Each lane has a copy of the table in its own bank of shared memory, if there is
// room.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/call.h"

namespace regkernels {
namespace {

// There are registers for so many threads.
template <class T>
inline constexpr int kGradientThreads = sizeof(T) == 4 ? 1024 : 512;

// Each block computes the gradients of one part of the samples of an element, or, where items share
// a gradient, of all elements of a group and channel. The axes of the grid are parts and `batch`,
// the number of elements or of groups and channels. 2^log_copies copies of the table are in shared
// memory; none if it is negative. kLogCopies is that number if the compiler is to know it, else
// negative.
template <ParzenKernel kKernel, int kReach, int kLogCopies, bool kPred, bool kTarget, class T>
__global__ void __launch_bounds__(kGradientThreads<T>)
    gradient_kernel(const __grid_constant__ GradientOperands<T> call, int64_t batch,
                    int given_log_copies) {
  extern __shared__ char shared_bytes[];
  T* const shared = reinterpret_cast<T*>(shared_bytes);
  const int size = call.window.num_bins + 2 * kReach;
  const int64_t items_here = call.items_together() ? call.space.items : 1;
  const ElementSpace outer{call.space.items / items_here, call.space.channels};
  const int log_copies = kLogCopies >= 0 ? kLogCopies : given_log_copies;
  const int stride = log_copies > 0 ? 1 << log_copies : 1;
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    ElementIndex index = outer.index(b);
    const int64_t own = call.own.of(index.group);
    const int64_t begin = own * blockIdx.x / gridDim.x;
    const int64_t end = own * (blockIdx.x + 1) / gridDim.x;
    for (int64_t n = 0; n < items_here; ++n) {
      if (items_here > 1) index.item = n;
      const auto [group, item, channel] = index;
      const T* table = call.table_of(index);
      if (log_copies >= 0) {
        __syncthreads();
        for (int i = threadIdx.x; i < (size * size) << log_copies; i += kGradientThreads<T>) {
          shared[i] = table[i >> log_copies];
        }
        __syncthreads();
        table = shared + (threadIdx.x & (stride - 1));
      }
      const PairScale<T> scale = call.scale(index);
      const T factor = call.factor(index);
      const T* const pred = call.pred.at(group, item, channel);
      const T* const target = call.target.at(group, item, channel);
      const T* const mask = call.mask.present() ? call.mask.at(group, item, channel) : nullptr;
      T* const grad_pred = kPred ? call.grad_pred.at(group, item, channel) : nullptr;
      T* const grad_target = kTarget ? call.grad_target.at(group, item, channel) : nullptr;
      for (int64_t i = begin + threadIdx.x; i < end; i += kGradientThreads<T>) {
        const T weight = (mask == nullptr ? T(1) : scale.weight(mask[i])) * factor;
        const T value_pred = pred[i], value_target = target[i];
        T by_pred = 0, by_target = 0;
        T t_pred = scale.pred.position(value_pred, call.window.num_bins);
        T t_target = scale.target.position(value_target, call.window.num_bins);
        if (!(t_pred + t_target == t_pred + t_target)) {
          t_pred = t_target = 0;  // what is not a number has no place in the table
        }
        ParzenWeights<T, kReach> rows, columns;
        parzen_weights<kKernel, kPred>(call.window, t_pred, rows);
        parzen_weights<kKernel, kTarget>(call.window, t_target, columns);
        const T* row = table + (rows.middle * size + columns.middle) * stride;
        REGKERNELS_UNROLL
        for (int a = -kReach; a <= kReach; ++a, row += size * stride) {
          T sum = 0, slope_sum = 0;
          REGKERNELS_UNROLL
          for (int b = -kReach; b <= kReach; ++b) {
            const T entry = row[(b + kReach) * stride];
            if constexpr (kPred) sum += entry * columns.weight[kReach + b];
            if constexpr (kTarget) slope_sum += entry * columns.slope[kReach + b];
          }
          if constexpr (kPred) by_pred += sum * rows.slope[kReach + a];
          if constexpr (kTarget) by_target += slope_sum * rows.weight[kReach + a];
        }
        const auto store = [&](T* to, T gradient, bool add) {
          to[i] = add ? to[i] + gradient : gradient;
        };
        const auto times = [&](T slope, T by) { return weight == 0 ? T(0) : weight * by * slope; };
        if constexpr (kPred) {
          store(grad_pred, times(scale.pred.slope(value_pred, call.window.num_bins), by_pred),
                call.sum_pred && n > 0);
        }
        if constexpr (kTarget) {
          store(grad_target,
                times(scale.target.slope(value_target, call.window.num_bins), by_target),
                call.sum_target && n > 0);
        }
      }
    }
  }
}

inline constexpr int kPaddingThreads = 256;

// Clears the gradient with respect to padding, which gradient_kernel leaves out.
template <class T>
__global__ void __launch_bounds__(kPaddingThreads)
    clear_padding_kernel(Channels<T> gradient, OwnSamples own, ElementSpace space,
                         int64_t elements) {
  for (int64_t element = blockIdx.y; element < elements; element += gridDim.y) {
    const auto [group, item, channel] = space.index(element);
    T* const values = gradient.at(group, item, channel);
    const int64_t first = own.of(group) + int64_t{1} * blockIdx.x * kPaddingThreads + threadIdx.x;
    const int64_t step = int64_t{1} * gridDim.x * kPaddingThreads;
    for (int64_t i = first; i < own.samples; i += step) values[i] = 0;
  }
}

}  // namespace
}  // namespace regkernels

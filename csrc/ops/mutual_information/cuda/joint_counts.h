// The joint histogram: which samples touch a tile of it, their weights, and the sums of their
// products.
//
// The sums of a block go to memory as 64-bit integers, in units of a power of two that leaves room
// for all samples: the order in which blocks arrive makes no difference.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/extremes.h"
#include "ops/mutual_information/cuda/product.h"

namespace regkernels {
namespace {

// A block adds up no more samples than this in single precision.
inline constexpr int64_t kMaxBlockSamples = 1 << 17;

// A sample as the product needs it. Its weight on bin b is weight_at(t - b, factor), where the
// factor combines the sum of the sample's weights with what the sample itself weighs. For the
// Gaussian it is a logarithm.
template <class T>
struct alignas(4 * sizeof(T)) Staged {
  T t_pred, factor_pred;
  T t_target, factor_target;
};

template <ParzenKernel kKernel, class T>
__device__ __forceinline__ T weight_at(const Parzen<T>& window, T d, T factor) {
  if constexpr (kKernel == ParzenKernel::kGaussian) {
    return exp2_of(factor - window.sharpness * d * d);
  }
  if constexpr (kKernel == ParzenKernel::kBSpline) return b_spline(d) * factor;
  return d == 0 ? factor : T(0);
}

// The factor of a sample that weighs `weight`. With kDelta, t moves to the centre of its one bin.
template <ParzenKernel kKernel, int kReach, class T>
__device__ __forceinline__ T sample_factor(const Parzen<T>& window, T& t, T weight) {
  const Rounded<T> bin = nearest_bin<kKernel>(t, window.num_bins);
  if constexpr (kKernel == ParzenKernel::kDelta) {
    t = bin.value;
    return weight;
  }
  const T f = t - bin.value;
  T sum = 0;
  if constexpr (kKernel == ParzenKernel::kGaussian) {
    GaussianWings<T> wings(window, f);
    sum = wings.up;
    REGKERNELS_UNROLL
    for (int j = 1; j <= kReach; ++j) {
      wings.advance();
      if (bin.integer < window.num_bins - j) sum += wings.up * window.falloff[j];
      if (bin.integer >= j) sum += wings.down * window.falloff[j];
    }
    return log2_of(weight * reciprocal(sum));
  }
  REGKERNELS_UNROLL
  for (int j = -kReach; j <= kReach; ++j) {
    const bool inside = bin.integer + j >= 0 && bin.integer + j < window.num_bins;
    if (inside) sum += b_spline(f - static_cast<T>(j));
  }
  return weight * reciprocal(sum);
}

// Computes the weights of a lane's samples on its bins.
template <ParzenKernel kKernel, int kReach, class T>
__device__ __forceinline__ void make_factor(const Parzen<T>& window,
                                            const T (&t)[Product<T>::kPerLane],
                                            const T (&factor)[Product<T>::kPerLane], T first_bin,
                                            typename Product<T>::Factor& out) {
  constexpr int kCount = Product<T>::kPerLane;
  // A window covers its sample's nearest bin, half a bin away at most, and kReach bins beyond.
  // Where that is less than half the way to the next bin with this lane's residue, only the nearest
  // of those counts.
  constexpr bool kNarrow = kReach < kResidues / 2;
  T weight[kCount];
  if constexpr (kNarrow) {
    int quotient[kCount];
    REGKERNELS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const T d = t[k] - first_bin;
      const Rounded<T> nearest = round_small(d * T(1.0 / kResidues));
      quotient[k] = nearest.integer;
      weight[k] = weight_at<kKernel>(window, d - nearest.value * kResidues, factor[k]);
    }
    out.place(weight, quotient);
  } else {
    REGKERNELS_UNROLL
    for (int q = 0; q < kQuotients; ++q) {
      REGKERNELS_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const T d = t[k] - (first_bin + static_cast<T>(q * kResidues));
        weight[k] = weight_at<kKernel>(window, d, factor[k]);
      }
      out.set(q, weight);
    }
  }
}

template <class T>
struct Sample {
  T t_pred, t_target, weight;
};

// The samples that touch a tile are in this interval. One that is not a number is in none.
template <class T>
struct Interval {
  T low, high;

  __device__ Interval(int tile, int num_bins, int reach) {
    const T margin = static_cast<T>(reach) + T(0.5);
    low = tile == 0 ? -INFINITY : static_cast<T>(tile) - margin;
    high = tile + kTile >= num_bins ? INFINITY : static_cast<T>(tile + kTile - 1) + margin;
  }
  __device__ __forceinline__ bool has(T t) const { return (t >= low) & (t <= high); }
};

// The samples of a warp that touch a tile are collected, and counted 32 at a time.
template <ParzenKernel kKernel, int kReach, class T>
struct TileCounter {
  const Parzen<T>& window;
  Staged<T>* staged;   // the warp's 32, in shared memory
  Sample<T>* waiting;  // the warp's 64, likewise
  T first_pred, first_target;
  int count = 0;
  Product<T> product;

  __device__ __forceinline__ void offer(bool touches, const Sample<T>& sample) {
    const unsigned those = __ballot_sync(kAllLanes, touches);
    if (those == kAllLanes && count == 0) return add(sample);
    const unsigned lane = threadIdx.x % kWarp;
    if (touches) waiting[count + __popc(those & ((1u << lane) - 1))] = sample;
    count += __popc(those);
    if (count < kWarp) return;
    __syncwarp();
    const Sample<T> full = waiting[lane];
    const Sample<T> rest = waiting[kWarp + lane];
    __syncwarp();
    count -= kWarp;
    if (lane < count) waiting[lane] = rest;
    add(full);
  }

  __device__ __forceinline__ void finish() {
    const unsigned lane = threadIdx.x % kWarp;
    __syncwarp();
    if (count > 0) add(lane < count ? waiting[lane] : Sample<T>{0, 0, 0});
    product.settle();
  }

 private:
  __device__ __forceinline__ void add(Sample<T> sample) {
    constexpr int kSamples = Product<T>::kSamples, kPerLane = Product<T>::kPerLane;
    const int lane = threadIdx.x % kWarp;
    Staged<T> own;
    own.factor_pred =
        sample_factor<kKernel, kReach>(window, sample.t_pred, Product<T>::kScale * sample.weight);
    own.factor_target =
        sample_factor<kKernel, kReach>(window, sample.t_target, T(Product<T>::kScale));
    own.t_pred = sample.t_pred;
    own.t_target = sample.t_target;
    __syncwarp();
    staged[lane] = own;
    __syncwarp();
    REGKERNELS_UNROLL
    for (int step = 0; step < kWarp / kSamples; ++step) {
      T t_pred[kPerLane], factor_pred[kPerLane], t_target[kPerLane], factor_target[kPerLane];
      REGKERNELS_UNROLL
      for (int k = 0; k < kPerLane; ++k) {
        const Staged<T> sample_k = staged[step * kSamples + k * 4 + lane % 4];
        t_pred[k] = sample_k.t_pred;
        factor_pred[k] = sample_k.factor_pred;
        t_target[k] = sample_k.t_target;
        factor_target[k] = sample_k.factor_target;
      }
      const T residue = static_cast<T>(lane / 4);
      typename Product<T>::Factor pred, target;
      make_factor<kKernel, kReach>(window, t_pred, factor_pred, first_pred + residue, pred);
      make_factor<kKernel, kReach>(window, t_target, factor_target, first_target + residue, target);
      product.add(pred, target);
    }
  }
};

// Each block counts one part of the samples for one tile of an element's histogram. The axes of the
// grid are parts, tiles and elements.
template <ParzenKernel kKernel, int kReach, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    count_kernel(const __grid_constant__ Counting<T> call) {
  __shared__ Staged<T> staged[kWarps][kWarp];
  __shared__ Sample<T> waiting[kWarps][2 * kWarp];
  __shared__ T sums[kTile * kTile];
  const int warp = threadIdx.x / kWarp;
  const int num_bins = call.window.num_bins;
  const int tiles = (num_bins + kTile - 1) / kTile;
  const int tile_pred = blockIdx.y / tiles * kTile;
  const int tile_target = blockIdx.y % tiles * kTile;
  for (int64_t element = blockIdx.z; element < call.elements; element += gridDim.z) {
    const PairScale<T> scale = read_scale(call.scales, element);
    const auto [group, item, channel] = call.scales.space.index(element);
    const HistogramOperands<T>& images = call.images;
    const int64_t samples = images.own.of(group);
    const int64_t begin = samples * blockIdx.x / gridDim.x;
    const int64_t end = samples * (blockIdx.x + 1) / gridDim.x;
    const T* const pred = images.pred.at(group, item, channel);
    const T* const target = images.target.at(group, item, channel);
    const T* const mask = images.mask.present() ? images.mask.at(group, item, channel) : nullptr;
    unsigned long long* const counts = call.counts + element * (call.bins() + 1);
    TileCounter<kKernel, kReach, T> counter{call.window, staged[warp], waiting[warp],
                                            static_cast<T>(tile_pred), static_cast<T>(tile_target)};
    const Interval<T> near_pred(tile_pred, num_bins, call.reach);
    const Interval<T> near_target(tile_target, num_bins, call.reach);
    bool broken = false;
    // Several loads are on their way at a time.
    constexpr int kAhead = 4;
    const int count = static_cast<int>(end - begin);
    for (int base = warp * (kAhead * kWarp); base < count; base += kAhead * kThreads) {
      T values_pred[kAhead], values_target[kAhead], weights[kAhead];
      REGKERNELS_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const int i = base + k * kWarp + threadIdx.x % kWarp;
        values_pred[k] = i < count ? pred[begin + i] : T(0);
        values_target[k] = i < count ? target[begin + i] : T(0);
        weights[k] = i < count ? (mask == nullptr ? T(1) : mask[begin + i]) : T(0);
      }
      // What follows is too long to be unrolled: the values move up instead.
      REGKERNELS_NO_UNROLL
      for (int k = 0; k < kAhead; ++k) {
        const Sample<T> sample{scale.pred.position(values_pred[0], num_bins),
                               scale.target.position(values_target[0], num_bins),
                               mask == nullptr ? weights[0] : scale.weight(weights[0])};
        const bool weighs = weights[0] != 0;
        const T sum = sample.t_pred + sample.t_target + sample.weight;
        broken |= weighs & !(sum - sum == 0);
        counter.offer(weighs & near_pred.has(sample.t_pred) & near_target.has(sample.t_target) &
                          (sample.weight - sample.weight == 0),
                      sample);
        REGKERNELS_UNROLL
        for (int next = 1; next < kAhead; ++next) {
          values_pred[next - 1] = values_pred[next];
          values_target[next - 1] = values_target[next];
          weights[next - 1] = weights[next];
        }
      }
    }
    counter.finish();
    // The sums of the warps are added in their order, and then as integers in any order.
    for (int next_warp = 0; next_warp < kWarps; ++next_warp) {
      __syncthreads();
      if (warp == next_warp) {
        counter.product.for_each_bin([&](int a, int b, T sum) {
          T& place = sums[a * kTile + b];
          place = next_warp == 0 ? sum : place + sum;
        });
      }
    }
    __syncthreads();
    const double units =
        call.units / (static_cast<double>(Product<T>::kScale) * Product<T>::kScale);
    for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int a = tile_pred + i / kTile, b = tile_target + i % kTile;
      if (a < num_bins && b < num_bins && sums[i] != 0) {
        const long long rounded = __double2ll_rn(static_cast<double>(sums[i]) * units);
        atomicAdd(counts + a * num_bins + b, static_cast<unsigned long long>(rounded));
      }
    }
    if (broken) atomicOr(counts + call.bins(), 1ull);
  }
}

}  // namespace
}  // namespace regkernels

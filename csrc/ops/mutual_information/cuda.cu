// The joint histogram is a product of two matrices, (bins x samples) (samples x bins), and is
// computed as one on the tensor cores, a tile of 32 x 32 bins at a time. A dense product does many
// times the additions that windows of seven bins need, and yet takes less time than to add them
// where they belong: shared memory is not involved, and it makes no difference which intensities
// there are, so that a background of one intensity does not slow it down.
//
// Single precision is kept by splitting weights into two halves, w = high + low, and leaving out
// low x low. The sums of a block go to memory as 64-bit integers, in units of a power of two that
// leaves room for all samples: the order in which blocks arrive makes no difference.
//
// The gradient of a sample is a sum over the same windows of bins, with weights from a small table.
// Each lane has a copy of the table in its own bank of shared memory, if there is room.
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/mutual_information/call.h"
#include "ops/mutual_information/mutual_information.h"

namespace regkernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kTile = 32;  // bins
// Every lane looks after the bins of one residue modulo 8, of which a tile has four.
constexpr int kResidues = 8;
constexpr int kQuotients = kTile / kResidues;
// No more samples than this go into a block's sums in single precision.
constexpr int64_t kMaxBlockSamples = 1 << 17;

// Everything that the kernels but that of the gradient need.
template <class T>
struct Counting {
  Parzen<T> window;
  Channels<const T> pred, target, mask;
  Operand<const T> value_range;
  ElementSpace space;
  int64_t elements, samples;
  bool joint_range;
  const T* extremes;  // null: not needed
  int extreme_parts;
  unsigned long long* counts;  // num_bins^2 + 1 of each element
  double units;                // of the counts, per sample
  double smooth_nr, smooth_dr;
  int reach;

  __device__ int bins() const { return window.num_bins * window.num_bins; }
};

template <class T>
__device__ T warp_least(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = min(value, __shfl_xor_sync(kAll, value, step));
  }
  return value;
}

// The extremes of finite values. Low ones are kept with the sign changed.
template <class T>
struct Extremes {
  T highest[kExtremes];

  __device__ Extremes() {
    for (int k = 0; k < kExtremes; ++k) highest[k] = -INFINITY;
    highest[kHighMask] = 0;
  }
  __device__ void see(int low, int high, T value) {
    if (!isfinite(value)) return;
    highest[low] = max(highest[low], -value);
    highest[high] = max(highest[high], value);
  }
  // Of all threads; right in the first.
  __device__ void combine() {
    __shared__ T shared[kWarps][kExtremes];
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      const T highest_of_warp = -warp_least(-highest[k]);
      if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp][k] = highest_of_warp;
    }
    __syncthreads();
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      for (int warp = 0; warp < kWarps; ++warp) highest[k] = max(highest[k], shared[warp][k]);
    }
  }
};

// One block per part of an element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    extremes_kernel(const __grid_constant__ Counting<T> call, bool own_range, T* extremes) {
  const int64_t part = blockIdx.x, parts = gridDim.x;
  const int64_t begin = call.samples * part / parts, end = call.samples * (part + 1) / parts;
  for (int64_t element = blockIdx.y; element < call.elements; element += gridDim.y) {
    const auto [group, item, channel] = call.space.index(element);
    const T* const pred = call.pred.at(group, item, channel);
    const T* const target = call.target.at(group, item, channel);
    const T* const mask = call.mask.present() ? call.mask.at(group, item, channel) : nullptr;
    Extremes<T> found;
    if (own_range) {
#pragma unroll 8
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        found.see(kLowPred, kHighPred, pred[i]);
        found.see(kLowTarget, kHighTarget, target[i]);
      }
    }
    if (mask != nullptr) {
#pragma unroll 4
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const T weight = mask[i];
        found.highest[kHighMask] = max(found.highest[kHighMask], isfinite(weight) ? weight : T(0));
      }
    }
    __syncthreads();
    found.combine();
    if (threadIdx.x < kExtremes) {
      const int k = threadIdx.x;
      // An unrolled choice: an index into registers would send them to memory.
      T value = found.highest[0];
      REGKERNELS_UNROLL
      for (int other = 1; other < kExtremes; ++other) {
        if (k == other) value = found.highest[other];
      }
      const bool low = k == kLowPred || k == kLowTarget;
      extremes[(element * parts + part) * kExtremes + k] = low ? -value : value;
    }
  }
}

// What extremes_kernel has found in all parts of an element. All threads get it.
template <class T>
__device__ PairScale<T> read_scale(const Counting<T>& call, int64_t element) {
  __shared__ T shared[kExtremes];
  __syncthreads();
  if (call.extremes != nullptr && threadIdx.x < kWarp) {
    const T* const parts = call.extremes + element * call.extreme_parts * kExtremes;
    REGKERNELS_UNROLL
    for (int k = 0; k < kExtremes; ++k) {
      const T sign = k == kLowPred || k == kLowTarget ? T(1) : T(-1);
      T least = INFINITY;
      for (int part = threadIdx.x; part < call.extreme_parts; part += kWarp) {
        least = min(least, sign * parts[part * kExtremes + k]);
      }
      least = warp_least(least);
      if (threadIdx.x == 0) shared[k] = sign * least;
    }
  }
  __syncthreads();
  const auto [group, item, channel] = call.space.index(element);
  const T* const given =
      call.value_range.data == nullptr ? nullptr : call.value_range.at(group, item);
  return PairScale<T>::from(given, call.joint_range, shared, call.mask.present());
}

// A sample as the product needs it. Its weight on bin b is weight_at(t - b, factor), where the
// factor is of the sum of a sample's weights and its weight among the samples, a logarithm for the
// Gaussian.
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

// The factor of a sample that weighs `weight`. With kDelta, t becomes that of the one bin.
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

// A lane's share of the weights of some samples on the bins of a tile, for one image, laid out as
// the tensor cores take either factor; and the product.
//
// In single precision a step takes 16 samples, four of them to each lane; a lane and its seven
// neighbours with the same samples have all 32 bins. In double precision it takes four.
template <class T>
struct Product;

template <>
struct Product<float> {
  static constexpr int kSamples = 16, kPerLane = 4;
  static constexpr float kScale = 4096;  // of weights, to keep halves away from the subnormal

  struct Factor {
    uint32_t high[kQuotients][2], low[kQuotients][2];

    // Bits of a pair of values, and of what single precision has beyond it.
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
        // A sign bit in the byte of the quotient, if it is one of the four: the permutation below
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
    // The tensor cores cut off instead of rounding: not too many times in a row.
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

// The weights of a lane's samples on its bins.
template <ParzenKernel kKernel, int kReach, class T>
__device__ __forceinline__ void make_factor(const Parzen<T>& window,
                                            const T (&t)[Product<T>::kPerLane],
                                            const T (&factor)[Product<T>::kPerLane], T first_bin,
                                            typename Product<T>::Factor& out) {
  constexpr int kCount = Product<T>::kPerLane;
  // Where windows reach no further than this, only the nearest of the bins with this lane's residue
  // counts: the others are at least as far away, where weights are cut.
  constexpr bool kNarrow = kReach <= kResidues / 2;
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

// Where samples are that touch a tile. What is not a number is nowhere.
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
  Staged<T>* staged;   // of this warp, 32
  Sample<T>* waiting;  // 64
  T first_pred, first_target;
  int count = 0;
  Product<T> product;

  __device__ __forceinline__ void offer(bool touches, const Sample<T>& sample) {
    const unsigned those = __ballot_sync(kAll, touches);
    if (those == kAll && count == 0) return add(sample);
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

// Blocks: parts of the samples, tiles of the histogram, elements.
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
  const int64_t begin = call.samples * blockIdx.x / gridDim.x;
  const int64_t end = call.samples * (blockIdx.x + 1) / gridDim.x;
  for (int64_t element = blockIdx.z; element < call.elements; element += gridDim.z) {
    const PairScale<T> scale = read_scale(call, element);
    const auto [group, item, channel] = call.space.index(element);
    const T* const pred = call.pred.at(group, item, channel);
    const T* const target = call.target.at(group, item, channel);
    const T* const mask = call.mask.present() ? call.mask.at(group, item, channel) : nullptr;
    unsigned long long* const counts = call.counts + element * (call.bins() + 1);
    TileCounter<kKernel, kReach, T> counter{call.window, staged[warp], waiting[warp],
                                            static_cast<T>(tile_pred), static_cast<T>(tile_target)};
    const Interval<T> near_pred(tile_pred, num_bins, call.reach);
    const Interval<T> near_target(tile_target, num_bins, call.reach);
    bool broken = false;
    // Several loads at a time.
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
      // Not unrolled, as what follows is long: the values move up instead.
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
    // In the order of the warps, then as integers in any order.
    for (int turn = 0; turn < kWarps; ++turn) {
      __syncthreads();
      if (warp == turn) {
        counter.product.for_each_bin([&](int a, int b, T sum) {
          T& place = sums[a * kTile + b];
          place = turn == 0 ? sum : place + sum;
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

__device__ double block_total(double value) {
  __shared__ double shared[kWarp];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += shared[warp];
  return total;
}

constexpr int kMaxBins = 256;
constexpr int kFinishThreads = 512;

// One block per element: from its counts to its mutual information, and to the table of
// derivatives if there is one to make.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    information_kernel(const __grid_constant__ Counting<T> call, T* maps, double* values, T* table,
                       T* scaling) {
  __shared__ double p_pred[kMaxBins], p_target[kMaxBins];
  __shared__ double by_pred[kMaxBins], by_target[kMaxBins];
  const int num_bins = call.window.num_bins;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kFinishWarps = kFinishThreads / kWarp;
  for (int64_t element = blockIdx.x; element < call.elements; element += gridDim.x) {
    const unsigned long long* const counts = call.counts + element * (call.bins() + 1);
    const PairScale<T> scale = read_scale(call, element);
    // Marginals: of integers, in any order.
    unsigned long long sum_of_warp = 0;
    __shared__ unsigned long long sums[kFinishWarps];
    for (int a = warp; a < num_bins; a += kFinishWarps) {
      unsigned long long sum = 0;
      for (int b = lane; b < num_bins; b += kWarp) sum += counts[a * num_bins + b];
      for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
      if (lane == 0) p_pred[a] = static_cast<double>(sum);
      sum_of_warp += sum;
    }
    if (lane == 0) sums[warp] = sum_of_warp;
    for (int b = threadIdx.x; b < num_bins; b += kFinishThreads) {
      unsigned long long sum = 0;
      for (int a = 0; a < num_bins; ++a) sum += counts[a * num_bins + b];
      p_target[b] = static_cast<double>(sum);
    }
    __syncthreads();
    unsigned long long total = 0;
    for (int w = 0; w < kFinishWarps; ++w) total += sums[w];
    double share = total == 0 ? 0 : 1 / static_cast<double>(total);
    if (counts[call.bins()] != 0) share = NAN;
    if (threadIdx.x < num_bins) {
      p_pred[threadIdx.x] *= share;
      p_target[threadIdx.x] *= share;
    }
    __syncthreads();
    const auto term_at = [&](int a, int b) {
      return information_term(static_cast<double>(counts[a * num_bins + b]) * share,
                              p_pred[a] * p_target[b], call.smooth_nr, call.smooth_dr);
    };
    double information = 0;
    for (int a = warp; a < num_bins; a += kFinishWarps) {
      double slope = 0;
      for (int b = lane; b < num_bins; b += kWarp) {
        const InformationTerm term = term_at(a, b);
        information += term.value;
        slope += term.by_q * p_target[b];
      }
      slope = warp_sum(slope);
      if (lane == 0) by_pred[a] = slope;
    }
    information = block_total(information);
    if (threadIdx.x == 0) {
      if (values != nullptr) {
        values[element] = -information;
      } else {
        maps[element] = static_cast<T>(-information);
      }
    }
    if (table == nullptr) continue;
    for (int b = warp; b < num_bins; b += kFinishWarps) {
      double slope = 0;
      for (int a = lane; a < num_bins; a += kWarp) slope += term_at(a, b).by_q * p_pred[a];
      slope = warp_sum(slope);
      if (lane == 0) by_target[b] = slope;
    }
    __syncthreads();
    // The slopes of a sample's weights add up to nothing, so that a constant makes no difference.
    // With this one, what is left where the images are independent is near 0, not near -1.
    const int size = num_bins + 2 * call.reach;
    T* const rows = table + element * size * size;
    for (int i = threadIdx.x; i < size * size; i += kFinishThreads) {
      const int a = i / size - call.reach, b = i % size - call.reach;
      const bool inside = a >= 0 && a < num_bins && b >= 0 && b < num_bins;
      rows[i] =
          inside ? static_cast<T>(-(term_at(a, b).by_p + by_pred[a] + by_target[b] + 1)) : T(0);
    }
    if (threadIdx.x == 0) {
      T* const values_here = scaling + element * kScalings;
      values_here[kRangePred] = scale.pred.low;
      values_here[kRangePred + 1] = scale.pred.high;
      values_here[kRangeTarget] = scale.target.low;
      values_here[kRangeTarget + 1] = scale.target.high;
      values_here[kInverseTotal] = total == 0 ? T(0) : static_cast<T>(call.units * share);
      values_here[kLargestWeight] = scale.largest_weight;
    }
  }
}

// One block per group.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    total_kernel(const double* values, int64_t count, double scale, T* output) {
  const int64_t group = blockIdx.x;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += values[group * count + i];
  sum = block_total(sum);
  if (threadIdx.x == 0) output[group] = static_cast<T>(sum * scale);
}

// One block per element.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    share_kernel(const unsigned long long* counts, int bins, int64_t elements, T* output) {
  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const unsigned long long* const those = counts + element * (bins + 1);
    double sum = 0;
    for (int i = threadIdx.x; i < bins; i += kFinishThreads) {
      sum += static_cast<double>(those[i]);
    }
    sum = block_total(sum);
    double share = sum == 0 ? 0 : 1 / sum;
    if (those[bins] != 0) share = NAN;
    for (int i = threadIdx.x; i < bins; i += kFinishThreads) {
      output[element * bins + i] = static_cast<T>(static_cast<double>(those[i]) * share);
    }
  }
}

template <class T>
void launch_count(const Cuda& device, const Counting<T>& counting,
                  const MutualInformationCall& checked) {
  const int tiles = (checked.num_bins + kTile - 1) / kTile;
  const int64_t elements = std::min<int64_t>(counting.elements, 65535);
  // Two blocks on each multiprocessor of a large GPU, unless there is little for them to do.
  const int64_t wanted = std::max<int64_t>(1, 264 / (elements * tiles * tiles));
  const int64_t parts = std::max({std::min(wanted, (counting.samples + 4095) / 4096),
                                  (counting.samples + kMaxBlockSamples - 1) / kMaxBlockSamples});
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(tiles * tiles),
                  static_cast<unsigned>(elements));
  const auto launch = [&](auto* function) {
    function<<<grid, kThreads, 0, device.stream>>>(counting);
    check_launch();
  };
  dispatch_window<T>(checked, [&](auto kernel, auto reach) {
    constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
    launch(&count_kernel<kKernel, decltype(reach)::value, T>);
  });
}

// Counts the samples of all elements of a loss or a histogram.
template <class T>
Counting<T> count_samples(const Cuda& device, const Call& call) {
  const HistogramOperands<T> histogram(call);
  const MutualInformationCall& checked = histogram.checked;
  const Tensor& extremes = call.output("extremes");
  const Tensor& counts = call.output("counts");
  Counting<T> counting{};
  counting.window = histogram.window;
  counting.pred = histogram.pred;
  counting.target = histogram.target;
  counting.mask = histogram.mask;
  counting.value_range = Operand<const T>(call.input("value_range"));
  counting.space = histogram.space();
  counting.elements = checked.elements();
  counting.samples = checked.samples;
  counting.joint_range = checked.joint_range;
  counting.counts = counts.as<unsigned long long>();
  counting.reach = checked.reach;
  int bits = 0;
  while ((int64_t{1} << bits) < checked.samples) ++bits;
  counting.units = static_cast<double>(int64_t{1} << (62 - bits));
  clear(device, counts);
  if (counting.elements == 0) return counting;
  if (extremes.present) {
    counting.extremes = extremes.as<T>();
    counting.extreme_parts = static_cast<int>(extremes.shape[3]);
    const dim3 grid(static_cast<unsigned>(counting.extreme_parts),
                    static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535)));
    extremes_kernel<<<grid, kThreads, 0, device.stream>>>(
        counting, counting.value_range.data == nullptr, extremes.as<T>());
    check_launch();
  }
  launch_count(device, counting, checked);
  return counting;
}

template <class T>
void loss_run(const Cuda& device, const Call& call) {
  Counting<T> counting = count_samples<T>(device, call);
  counting.smooth_nr = call.number("smooth_nr");
  counting.smooth_dr = call.number("smooth_dr");
  const Tensor& output = call.output("output");
  const Tensor& values = call.output("values");
  if (counting.elements > 0) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535));
    information_kernel<<<blocks, kFinishThreads, 0, device.stream>>>(
        counting, output.as<T>(), values.present ? values.as<double>() : nullptr,
        call.output("table").as<T>(), call.output("scaling").as<T>());
    check_launch();
  }
  if (!values.present) return;
  const int64_t groups = output.shape[0];
  if (groups == 0) return;
  const int64_t count = values.shape.count(1);
  const bool mean = call.choice<Reduction>("reduction") == Reduction::kMean;
  total_kernel<<<static_cast<unsigned>(groups), kFinishThreads, 0, device.stream>>>(
      values.as<double>(), count, mean && count > 0 ? 1 / static_cast<double>(count) : 1.0,
      output.as<T>());
  check_launch();
}

template <class T>
void histogram_run(const Cuda& device, const Call& call) {
  const Counting<T> counting = count_samples<T>(device, call);
  if (counting.elements == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535));
  share_kernel<<<blocks, kFinishThreads, 0, device.stream>>>(
      counting.counts, counting.window.num_bins * counting.window.num_bins, counting.elements,
      call.output("output").as<T>());
  check_launch();
}

// As many as there are registers for.
template <class T>
inline constexpr int kGradientThreads = sizeof(T) == 4 ? 1024 : 512;

// Blocks: parts of the samples, elements (or groups and channels, where items share a gradient).
// 2^log_copies copies of the table are in shared memory; none if it is negative. `kLogCopies` is
// that number if the compiler is to know it, else negative.
template <ParzenKernel kKernel, int kReach, int kLogCopies, bool kPred, bool kTarget, class T>
__global__ void __launch_bounds__(kGradientThreads<T>)
    gradient_kernel(const __grid_constant__ GradientOperands<T> call, int64_t work, int64_t samples,
                    int given_log_copies) {
  extern __shared__ char shared_bytes[];
  T* const shared = reinterpret_cast<T*>(shared_bytes);
  const int size = call.window.num_bins + 2 * kReach;
  const int64_t turns = call.items_together() ? call.space.items : 1;
  const ElementSpace pieces{call.space.items / turns, call.space.channels};
  const int64_t begin = samples * blockIdx.x / gridDim.x;
  const int64_t end = samples * (blockIdx.x + 1) / gridDim.x;
  const int log_copies = kLogCopies >= 0 ? kLogCopies : given_log_copies;
  const int stride = log_copies > 0 ? 1 << log_copies : 1;
  for (int64_t piece = blockIdx.y; piece < work; piece += gridDim.y) {
    ElementIndex index = pieces.index(piece);
    for (int64_t turn = 0; turn < turns; ++turn) {
      if (turns > 1) index.item = turn;
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
          t_pred = t_target = 0;  // has no place in the table
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
                call.sum_pred && turn > 0);
        }
        if constexpr (kTarget) {
          store(grad_target,
                times(scale.target.slope(value_target, call.window.num_bins), by_target),
                call.sum_target && turn > 0);
        }
      }
    }
  }
}

template <ParzenKernel kKernel, int kReach, bool kPred, bool kTarget, class T>
void launch_gradient(const Cuda& device, const GradientOperands<T>& gradient,
                     const MutualInformationCall& checked) {
  const int64_t most = shared_memory_limit();
  const int64_t bytes = gradient.table_count * static_cast<int64_t>(sizeof(T));
  int log_copies = 5;
  while (log_copies >= 0 && bytes << log_copies > most) --log_copies;
  auto* function = &gradient_kernel<kKernel, kReach, -1, kPred, kTarget, T>;
  // Worth a kernel of its own: every lane has its copy, in its own bank.
  if constexpr (sizeof(T) == 4 && kReach <= GaussianReach<T>::kNarrow) {
    if (log_copies == 5) function = &gradient_kernel<kKernel, kReach, 5, kPred, kTarget, T>;
  }
  const int64_t shared = log_copies < 0 ? 0 : bytes << log_copies;
  allow_shared_memory(function, shared);
  const int64_t work = checked.elements() / (gradient.items_together() ? gradient.space.items : 1);
  const int64_t pieces = std::min<int64_t>(work, 65535);
  // As many blocks as run at a time on a large GPU: each has to fill its shared memory.
  const int64_t together = most / std::max<int64_t>(1, shared);
  const int64_t blocks = 132 * std::max<int64_t>(1, std::min<int64_t>(2, together));
  const int64_t parts = std::max<int64_t>(
      1, std::min<int64_t>((blocks + pieces - 1) / pieces, (checked.samples + 4095) / 4096));
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(pieces));
  function<<<grid, kGradientThreads<T>, shared, device.stream>>>(gradient, work, checked.samples,
                                                                 log_copies);
  check_launch();
}

template <class T>
void gradient_run(const Cuda& device, const Call& call) {
  const HistogramOperands<T> histogram(call);
  const MutualInformationCall& checked = histogram.checked;
  if (checked.elements() * checked.samples == 0) {
    for (const char* name : {"grad_pred", "grad_target"}) {
      if (call.output(name).present) clear(device, call.output(name));
    }
    return;
  }
  const GradientOperands<T> gradient(call, histogram);
  dispatch_smooth_window<T>(checked, [&](auto kernel, auto reach) {
    constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
    constexpr int kReach = decltype(reach)::value;
    const bool pred = gradient.grad_pred.present(), target = gradient.grad_target.present();
    if (pred && target) {
      launch_gradient<kKernel, kReach, true, true>(device, gradient, checked);
    } else if (pred) {
      launch_gradient<kKernel, kReach, true, false>(device, gradient, checked);
    } else if (target) {
      launch_gradient<kKernel, kReach, false, true>(device, gradient, checked);
    }
  });
}

}  // namespace

void mutual_information_loss_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype,
                 [&](auto type) { loss_run<typename decltype(type)::type>(Cuda(context), call); });
}
void mutual_information_loss_grad_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    gradient_run<typename decltype(type)::type>(Cuda(context), call);
  });
}
void joint_histogram_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    histogram_run<typename decltype(type)::type>(Cuda(context), call);
  });
}

}  // namespace regkernels

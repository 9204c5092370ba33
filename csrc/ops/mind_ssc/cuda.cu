#include <algorithm>
#include <cmath>

#include "core/cuda_runtime.h"
#include "core/large_gpu.h"
#include "ops/mind_ssc/kernels.h"
#include "ops/mind_ssc/walk.h"

namespace regkernels {

namespace {

// A block averages one family of one volume over a tile in x and y, and walks along z. While it
// adds up the values of a plane along x and y, on their way through shared memory, those of the
// next one are being loaded; the sums of the planes that a patch spans add up in registers.
constexpr int kThreadRows = 8, kThreads = kWarp * kThreadRows;
// With the rows that patches reach beyond a tile of 24, the threads have four or five values each.
constexpr int kOwnRows = 3, kTileRows = kOwnRows * kThreadRows;

// For how many blocks per multiprocessor the compiler must leave registers.
template <class T, int kRadius>
inline constexpr int kBlocks = sizeof(T) == sizeof(double) ? 2
                               : kRadius > 2               ? 3
                                                           : 4;

// Neighbours along x that move through shared memory together.
template <class T>
struct alignas(16) Strip {
  static constexpr int kSize = 4;
  T value[kSize];
};

// The sums of the 2 kRadius + 1 planes up to the latest one, the oldest plane first.
template <class T, int kRadius>
struct PlaneSums {
  T pending[2 * kRadius] = {};

  __device__ __forceinline__ T add(T plane) {
    const T complete = pending[0] + plane;
    REGKERNELS_UNROLL
    for (int j = 0; j + 1 < 2 * kRadius; ++j) pending[j] = pending[j + 1] + plane;
    pending[2 * kRadius - 1] = plane;
    return complete;
  }
};
template <class T>
struct PlaneSums<T, 0> {
  __device__ __forceinline__ T add(T plane) { return plane; }
};

template <class Source, int kRadius>
__global__ void __launch_bounds__(kThreads, kBlocks<typename Source::T, kRadius>)
    average_patches_kernel(const __grid_constant__ Source source, int64_t arrays, int planes,
                           int tiles_x, typename Source::T scale, typename Source::T* out) {
  using T = typename Source::T;
  using View = typename Source::View;
  constexpr int kFamilies = pair_families(Source::D);
  constexpr int kRadiusZ = Source::D == 3 ? kRadius : 0;
  constexpr int kStrip = Strip<T>::kSize, kOwnStrips = kWarp / kStrip;
  constexpr int kSpan = 2 * kRadius + kStrip;  // values that a strip of sums takes
  constexpr int kSpannedStrips = (kSpan + kStrip - 1) / kStrip;
  constexpr int kStrips = kOwnStrips - 1 + kSpannedStrips, kRows = kTileRows + 2 * kRadius;
  using Tile = WalkTile<kRows, kStrips * kStrip, kThreads>;
  __shared__ Strip<T> values[kRows][kStrips];
  __shared__ Strip<T> along[kRows][kOwnStrips];
  const auto& around = source.around;
  const int columns = around.extent(0), rows = around.extent(1), depth = around.extent(2);
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const int tile_y = blockIdx.x / tiles_x;
  const int x0 = (blockIdx.x - tile_y * tiles_x) * kWarp, y0 = tile_y * kTileRows;
  const int x = x0 + threadIdx.x, y = y0 + threadIdx.y * kOwnRows;
  for (int64_t array = blockIdx.z; array < arrays; array += gridDim.z) {
    const View view = source.view(array / kFamilies, static_cast<int>(array % kFamilies));
    for (int first = blockIdx.y * planes; first < depth; first += gridDim.y * planes) {
      const int last = min(first + planes, depth);
      const int corner[3] = {x0 - kRadius - around.margin[0], y0 - kRadius - around.margin[1],
                             first - kRadiusZ - around.margin[2]};
      Walk<View, Tile> walk(view, around.size, corner, thread);
      walk.load();
      PlaneSums<T, kRadiusZ> sums[kOwnRows];
      T* target =
          out + array * around.voxels() + first * around.stride(2) + y * around.stride(1) + x;
#pragma unroll 1
      for (int z = first - kRadiusZ; z < last + kRadiusZ; ++z) {
        walk.for_each_value([&](int i, T value) {
          values[i / (kStrips * kStrip)][i / kStrip % kStrips].value[i % kStrip] = value;
        });
        walk.advance();
        if (z + 1 < last + kRadiusZ) walk.load();
        __syncthreads();
        static_assert(kRows * kOwnStrips <= kThreads, "more strips than threads");
        if (thread < kRows * kOwnStrips) {
          const int row = thread / kOwnStrips, strip = thread % kOwnStrips;
          T value[kSpannedStrips * kStrip];
          REGKERNELS_UNROLL
          for (int s = 0; s < kSpannedStrips; ++s) {
            const Strip<T> loaded = values[row][strip + s];
            REGKERNELS_UNROLL
            for (int j = 0; j < kStrip; ++j) value[s * kStrip + j] = loaded.value[j];
          }
          Strip<T> sum;
          REGKERNELS_UNROLL
          for (int s = 0; s < kStrip; ++s) {
            sum.value[s] = value[s];
            REGKERNELS_UNROLL
            for (int j = 1; j <= 2 * kRadius; ++j) sum.value[s] += value[s + j];
          }
          along[row][strip] = sum;
        }
        // All have left `values` here, and `along` by the time they meet again.
        __syncthreads();
        T value[kOwnRows + 2 * kRadius];
        REGKERNELS_UNROLL
        for (int j = 0; j < kOwnRows + 2 * kRadius; ++j) {
          value[j] =
              along[threadIdx.y * kOwnRows + j][threadIdx.x / kStrip].value[threadIdx.x % kStrip];
        }
        T average[kOwnRows];
        REGKERNELS_UNROLL
        for (int own = 0; own < kOwnRows; ++own) {
          T sum = value[own];
          REGKERNELS_UNROLL
          for (int j = 1; j <= 2 * kRadius; ++j) sum += value[own + j];
          average[own] = sums[own].add(sum) * scale;
        }
        if (z - kRadiusZ < first) continue;
        REGKERNELS_UNROLL
        for (int own = 0; own < kOwnRows; ++own) {
          if (x < columns && y + own < rows) target[own * around.stride(1)] = average[own];
        }
        target += around.stride(2);
      }
    }
  }
}

}  // namespace

template <class Source, class T>
void average_patches(const Cuda& device, const Source& source, int64_t volumes, int radius,
                     T* out) {
  constexpr int D = Source::D;
  const int64_t arrays = volumes * pair_families(D);
  if (arrays == 0) return;
  const auto& around = source.around;
  const int64_t tiles_x = (around.extent(0) + kWarp - 1) / kWarp;
  const int64_t tiles_y = (around.extent(1) + kTileRows - 1) / kTileRows;
  const int planes = planes_per_walk(around.extent(2), tiles_x * tiles_y * arrays);
  const int64_t walks = (around.extent(2) + planes - 1) / planes;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(walks, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(arrays, 65535)));
  const T scale = static_cast<T>(1 / std::pow(2 * radius + 1, D));
  const auto launch_radius = [&](auto tag) {
    constexpr int kRadius = decltype(tag)::value;
    average_patches_kernel<Source, kRadius><<<grid, dim3(kWarp, kThreadRows), 0, device.stream>>>(
        source, arrays, planes, static_cast<int>(tiles_x), scale, out);
    check_launch();
  };
  static_assert(kLargestPatchRadius == 4);
  if (radius == 1) return launch_radius(IntTag<1>{});
  if (radius == 2) return launch_radius(IntTag<2>{});
  if (radius == 3) return launch_radius(IntTag<3>{});
  launch_radius(IntTag<4>{});
}

void mind_ssc_cuda(const Context& context, const Call& call) { mind_ssc(Cuda(context), call); }
void mind_ssc_grad_cuda(const Context& context, const Call& call) {
  mind_ssc_grad(Cuda(context), call);
}
void mind_ssc_variances_cuda(const Context& context, const Call& call) {
  mind_ssc_variances(Cuda(context), call);
}
void mind_ssc_of_variance_cuda(const Context& context, const Call& call) {
  mind_ssc_of_variance(Cuda(context), call);
}

}  // namespace regkernels

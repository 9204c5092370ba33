#include <algorithm>
#include <cmath>

#include "core/cuda_runtime.h"
#include "ops/mind_ssc/kernels.h"

namespace regkernels {

namespace {

// A block averages one family of one volume over a tile in x and y, and walks along z. It adds up
// each plane along x and y on the way through shared memory; the sums of the planes that a patch
// spans wait in registers.
constexpr int kTileRows = 16, kThreadRows = 8, kOwnRows = kTileRows / kThreadRows;
constexpr int kThreads = kWarp * kThreadRows;
constexpr int kPlanes = 32;  // of results, to a walk

// For how many blocks per multiprocessor the compiler must leave registers.
template <class T, int kRadius>
inline constexpr int kBlocks = sizeof(T) == sizeof(double) ? 2
                               : kRadius > 2               ? 3
                                                           : 4;

template <class Source, int kRadius>
__global__ void __launch_bounds__(kThreads, kBlocks<typename Source::T, kRadius>)
    average_patches_kernel(const __grid_constant__ Source source, int64_t arrays, int radius_z,
                           int tiles_x, typename Source::T scale, typename Source::T* out) {
  using T = typename Source::T;
  constexpr int kFamilies = pair_families(Source::D);
  constexpr int kColumns = kWarp + 2 * kRadius, kRows = kTileRows + 2 * kRadius;
  constexpr int kWaiting = 2 * kRadius + 1;
  __shared__ T values[kRows][kColumns];
  __shared__ T along[kRows][kWarp];
  const auto& around = source.around;
  const int columns = around.extent(0), rows = around.extent(1), depth = around.extent(2);
  const int tile_y = blockIdx.x / tiles_x;
  const int x0 = (blockIdx.x - tile_y * tiles_x) * kWarp, y0 = tile_y * kTileRows;
  const int x = x0 + threadIdx.x;
  for (int64_t array = blockIdx.z; array < arrays; array += gridDim.z) {
    const auto view = source.view(array / kFamilies, static_cast<int>(array % kFamilies));
    T* const target = out + array * around.voxels();
    for (int first = blockIdx.y * kPlanes; first < depth; first += gridDim.y * kPlanes) {
      const int last = min(first + kPlanes, depth);
      T waiting[kOwnRows][kWaiting] = {};
#pragma unroll 1
      for (int z = first - radius_z; z < last + radius_z; ++z) {
        for (int row = threadIdx.y; row < kRows; row += kThreadRows) {
          const int y = y0 + row - kRadius - around.margin[1];
          for (int column = threadIdx.x; column < kColumns; column += kWarp) {
            values[row][column] =
                view(x0 + column - kRadius - around.margin[0], y, z - around.margin[2]);
          }
        }
        __syncthreads();
        for (int row = threadIdx.y; row < kRows; row += kThreadRows) {
          T sum = values[row][threadIdx.x];
          REGKERNELS_UNROLL
          for (int j = 1; j < kWaiting; ++j) sum += values[row][threadIdx.x + j];
          along[row][threadIdx.x] = sum;
        }
        // All have left `values` here, and `along` by the time they meet again.
        __syncthreads();
        REGKERNELS_UNROLL
        for (int own = 0; own < kOwnRows; ++own) {
          const int row = threadIdx.y + own * kThreadRows;
          T sum = along[row][threadIdx.x];
          REGKERNELS_UNROLL
          for (int j = 1; j < kWaiting; ++j) sum += along[row + j][threadIdx.x];
          REGKERNELS_UNROLL
          for (int j = 0; j + 1 < kWaiting; ++j) waiting[own][j] = waiting[own][j + 1];
          waiting[own][kWaiting - 1] = sum;
        }
        if (z - radius_z < first || x >= columns) continue;
        REGKERNELS_UNROLL
        for (int own = 0; own < kOwnRows; ++own) {
          const int y = y0 + threadIdx.y + own * kThreadRows;
          // In 2-D there is one plane, and nothing has come before it.
          T sum = waiting[own][0];
          REGKERNELS_UNROLL
          for (int j = 1; j < kWaiting; ++j) sum += waiting[own][j];
          if (y < rows) {
            target[(z - radius_z) * around.stride(2) + y * around.stride(1) + x] = sum * scale;
          }
        }
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
  const int64_t walks = (around.extent(2) + kPlanes - 1) / kPlanes;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(walks, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(arrays, 65535)));
  const T scale = static_cast<T>(1 / std::pow(2 * radius + 1, D));
  const auto launch_radius = [&](auto tag) {
    constexpr int kRadius = decltype(tag)::value;
    average_patches_kernel<Source, kRadius><<<grid, dim3(kWarp, kThreadRows), 0, device.stream>>>(
        source, arrays, D == 3 ? radius : 0, static_cast<int>(tiles_x), scale, out);
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

}  // namespace regkernels

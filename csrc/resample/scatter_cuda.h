// The gradient of the array that is sampled, on CUDA.
//
// A block of voxels adds, by way of a warp that does not vary much, to a block of targets of about
// the same size. It accumulates them in shared memory, in a tile placed about where its central
// voxel goes, and then adds each touched target to global memory once, in whole rows. What falls
// outside the tile goes to global memory directly: a wild warp is slower, not wrong.
#pragma once

#ifdef __CUDACC__

#include <algorithm>
#include <cstdint>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "resample/fixed_point.h"
#include "resample/resampling.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

template <class T, int D>
struct ScatterShape;
template <class T>
struct ScatterShape<T, 3> {
  static constexpr int kBlockX = 16, kBlockY = 8, kBlockZ = sizeof(T) == 4 ? 8 : 2;
  static constexpr int kTileX = 22, kTileY = 14, kTileZ = sizeof(T) == 4 ? 12 : 6;
};
template <class T>
struct ScatterShape<T, 2> {
  static constexpr int kBlockX = 32, kBlockY = 32, kBlockZ = 1;
  static constexpr int kTileX = 44, kTileY = 44, kTileZ = 1;
};
inline constexpr int kScatterThreads = 256;

template <class R>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ R resampling,
                   const __grid_constant__ Operand<const typename R::S> grad_output,
                   const __grid_constant__ Operand<typename R::T> grad_input,
                   const __grid_constant__ VoxelSpace space, int tiles_x) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Shape = ScatterShape<T, D>;
  constexpr int kChannels = R::Layout::kLast ? D : 1;  // accumulated at a time
  constexpr int kTileSize[3] = {Shape::kTileX, Shape::kTileY, Shape::kTileZ};
  constexpr int kTileStride[3] = {1, Shape::kTileX, Shape::kTileX * Shape::kTileY};
  constexpr int kTile = Shape::kTileX * Shape::kTileY * Shape::kTileZ * kChannels;
  constexpr int kRow = Shape::kTileX * kChannels;
  constexpr int kBlockVoxels = Shape::kBlockX * Shape::kBlockY * Shape::kBlockZ;
  static_assert(kTile % 4 == 0);
  __shared__ alignas(16) T tile[kTile];
  __shared__ int shared_origin[D];

  const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
  const int x0 = tile_x * Shape::kBlockX, y0 = tile_y * Shape::kBlockY;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto source = resampling.element(group, item);
    const typename R::S* grad = grad_output.at(group, item);
    T* target = source.plane_zero(grad_input.at(group, item));
    for (int z0 = blockIdx.y * Shape::kBlockZ; z0 < space.z; z0 += gridDim.y * Shape::kBlockZ) {
      if (threadIdx.x == 0) {
        const int x = min(x0 + Shape::kBlockX / 2, space.x - 1);
        const Voxel centre{min(z0 + Shape::kBlockZ / 2, space.z - 1),
                           min(y0 + Shape::kBlockY / 2, space.y - 1),
                           x,
                           true,
                           x,
                           space.x};
        T unused[1 << D];
        const Vec<int, D> middle =
            source.corner_weights(source.position(centre, source.vector(centre)), unused);
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) shared_origin[k] = middle[k] - (kTileSize[k] / 2 - 1);
      }
#pragma unroll 1
      for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
        for (int i = 4 * threadIdx.x; i < kTile; i += 4 * kScatterThreads) {
          REGKERNELS_UNROLL
          for (int j = 0; j < 4; ++j) tile[i + j] = 0;
        }
        __syncthreads();
        Vec<int, D> origin;  // the first voxel of the tile
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) origin[k] = shared_origin[k];

#pragma unroll 1
        for (int i = threadIdx.x; i < kBlockVoxels; i += kScatterThreads) {
          const int x = x0 + i % Shape::kBlockX;
          const int y = y0 + i / Shape::kBlockX % Shape::kBlockY;
          const int z = z0 + i / (Shape::kBlockX * Shape::kBlockY);
          if (x >= space.x || y >= space.y || z >= space.z) continue;
          const Voxel voxel{z, y, x, true, x, space.x};
          const Vec<T, D> p = source.position(voxel, source.vector(voxel));
          const int64_t here = source.voxel_offset(voxel);
          T g[kChannels], weight[1 << D];
          REGKERNELS_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            g[c] = to_arithmetic(grad[resampling.out_layout.at(here, channel + c)]);
          }
          const Vec<int, D> cell = source.corner_weights(p, weight);
          int in_tile = 0;
          bool fits = true;
          REGKERNELS_UNROLL
          for (int k = 0; k < D; ++k) {
            const int offset = cell[k] - origin[k];
            fits = fits & (offset >= 0) & (offset < kTileSize[k] - 1);
            in_tile += offset * kTileStride[k];
          }
          if (fits) {
            T* corner0 = tile + in_tile * kChannels;
            REGKERNELS_UNROLL
            for (int corner = 0; corner < (1 << D); ++corner) {
              if (weight[corner] == 0) continue;
              int step = 0;
              REGKERNELS_UNROLL
              for (int k = 0; k < D; ++k) step += corner >> k & 1 ? kTileStride[k] : 0;
              REGKERNELS_UNROLL
              for (int c = 0; c < kChannels; ++c) {
                atomicAdd(corner0 + step * kChannels + c, weight[corner] * g[c]);
              }
            }
          } else {
            const int64_t corner0 = resampling.voxel_offset(cell);
            REGKERNELS_UNROLL
            for (int corner = 0; corner < (1 << D); ++corner) {
              if (weight[corner] == 0) continue;
              T* place = target + resampling.in_layout.at(
                                      corner0 + resampling.corner_offset(corner), channel);
              REGKERNELS_UNROLL
              for (int c = 0; c < kChannels; ++c) atomicAdd(place + c, weight[corner] * g[c]);
            }
          }
        }
        __syncthreads();

        // Each warp adds one row of the tile after another. Elements that nobody touched are 0;
        // they may lie outside of the array.
        for (int row = threadIdx.x / kWarp; row < Shape::kTileY * Shape::kTileZ;
             row += kScatterThreads / kWarp) {
          Vec<int, D> first = origin;
          first[1] += row % Shape::kTileY;
          if constexpr (D == 3) first[2] += row / Shape::kTileY;
          T* start = target + resampling.in_layout.at(resampling.voxel_offset(first), channel);
          REGKERNELS_UNROLL
          for (int e = 0; e < kRow; e += kWarp) {
            const int element = e + threadIdx.x % kWarp;
            const T value = element < kRow ? tile[row * kRow + element] : T(0);
            if (value != 0) atomicAdd(start + element, value);
          }
        }
        __syncthreads();
      }
    }
  }
}

template <class R>
void scatter(const Cuda& device, const VoxelSpace& space, const R& resampling,
             const Tensor& grad_output, const Tensor& grad_input,
             const ScatterWorkspace& workspace) {
  if (workspace.fixed_sums->present) {
    return scatter_in_fixed_point(device, space, resampling, grad_output, grad_input,
                                  *workspace.fixed_sums, *workspace.largest);
  }
  using Shape = ScatterShape<typename R::T, R::D>;
  clear(device, grad_input);
  if (space.empty()) return;
  const int64_t tiles_x = (space.x + Shape::kBlockX - 1) / Shape::kBlockX;
  const int64_t tiles_y = (space.y + Shape::kBlockY - 1) / Shape::kBlockY;
  const int64_t tiles_z = (space.z + Shape::kBlockZ - 1) / Shape::kBlockZ;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  scatter_kernel<<<grid, kScatterThreads, 0, device.stream>>>(
      resampling, Operand<const typename R::S>(grad_output), Operand<typename R::T>(grad_input),
      space, static_cast<int>(tiles_x));
  check_launch();
}

}  // namespace regkernels

#endif

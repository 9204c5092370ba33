// Vectors at the voxels that a loop visits: where a voxel is, and a row of packed vectors.
#pragma once

#include <cstdint>

#include "core/for_each.h"
#include "core/host_device.h"
#include "maths/vec.h"

namespace regkernels {

// A voxel's indices in x, y, z order.
template <int D>
REGKERNELS_HD Vec<int, D> voxel_index(const Voxel& voxel) {
  Vec<int, D> result;
  result[0] = voxel.x;
  result[1] = voxel.y;
  if constexpr (D == 3) result[2] = voxel.z;
  return result;
}

// Writes one vector per voxel to a row of packed vectors. On CUDA the warp's vectors go through
// shared memory, so that each store instruction fills whole sectors. Every lane of the warp must
// take part.
template <class T, int D>
REGKERNELS_HD void store_packed(T* row, const Voxel& voxel, const Vec<T, D>& value) {
#ifdef __CUDA_ARCH__
  __shared__ T stage[kRowsPerBlock][kWarp * D];
  T* mine = stage[threadIdx.y];
  __syncwarp();
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) mine[threadIdx.x * D + k] = value[k];
  __syncwarp();
  const int remaining = voxel.row_size - voxel.tile_x;
  const int count = (remaining < kWarp ? remaining : kWarp) * D;
  T* tile = row + static_cast<int64_t>(voxel.tile_x) * D;
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k) {
    const int element = k * kWarp + threadIdx.x;
    if (element < count) tile[element] = mine[element];
  }
#else
  T* target = row + static_cast<int64_t>(voxel.x) * D;
  for (int k = 0; k < D; ++k) target[k] = value[k];
#endif
}

}  // namespace regkernels

// Sums over the voxels of each batch item, without atomics: the voxels are cut into a number of
// parts that depends on their count alone, each part leaves one partial sum, and the partial sums
// are added in order. The same bits come out every time, on any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/for_each.h"

namespace regkernels {

// Parts per batch item. They are enough to give each multiprocessor of a large GPU several blocks.
inline int64_t reduction_parts(const Sizes& sizes) {
  const int64_t by_size = (sizes.voxels() + 2047) / 2048;
  return std::max<int64_t>(1, std::min<int64_t>({by_size, sizes.rows(), 2048}));
}

// The workspace that reduce_voxels needs: (G, N, parts, sums).
inline Tensor partial_sums_spec(DType dtype, const Batch& batch, const Sizes& sizes, int sums) {
  return tensor_spec(dtype, {batch.groups, batch.items, reduction_parts(sizes), sums});
}

// Bytes of an element, for the dtypes that outputs have.
inline size_t dtype_size(DType dtype) {
  if (is_half(dtype)) return 2;
  return dtype == DType::kFloat64 || dtype == DType::kInt64 ? 8 : 4;
}

inline void clear(const Cpu&, const Tensor& tensor) {
  const size_t bytes = tensor.shape.count() * dtype_size(tensor.dtype);
  if (bytes > 0) std::memset(tensor.data, 0, bytes);  // an empty tensor may have no address
}

// Where the partial sums of one target begin and how many there are: those of one item, or those of
// all items of the group when they share the target.
template <class T>
struct PartialRange {
  const T* begin;
  int64_t count;
};

template <class T>
REGKERNELS_HD PartialRange<T> partial_range(const T* partial, int64_t target,
                                            int64_t targets_per_group, int64_t items, int64_t parts,
                                            int sums) {
  if (targets_per_group == items) return {partial + target * parts * sums, parts};
  return {partial + target * items * parts * sums, items * parts};
}

template <class Body>
void reduce_voxels(const Cpu&, const VoxelSpace& space, const Body& body, const Tensor& workspace,
                   const Tensor& result) {
  using T = typename Body::T;
  constexpr int kSums = Body::kSums;
  const int64_t parts = workspace.shape[2];
  const int64_t rows = space.rows();
  T* partial = workspace.as<T>();
  parallel_for(space.batch() * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, part = i % parts;
      const auto element = body.element(b / space.items, b % space.items);
      double total[kSums] = {};
      compute_rows(element, space.x, [&](const auto& add_row) {
        for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; ++row) {
          T sums[kSums] = {};
          add_row(static_cast<int>(row / space.y), static_cast<int>(row % space.y), sums);
          for (int k = 0; k < kSums; ++k) total[k] += sums[k];
        }
      });
      for (int k = 0; k < kSums; ++k) partial[i * kSums + k] = static_cast<T>(total[k]);
    }
  });
  const int64_t targets = result.shape[0] * result.shape[1];
  T* out = result.as<T>();
  for (int64_t target = 0; target < targets; ++target) {
    const auto range = partial_range(partial, target, result.shape[1], space.items, parts, kSums);
    for (int k = 0; k < kSums; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < range.count; ++i) sum += range.begin[i * kSums + k];
      out[target * kSums + k] = static_cast<T>(sum * body.scale(k));
    }
  }
}

#ifdef __CUDACC__

inline void clear(const Cuda& device, const Tensor& tensor) {
  const size_t bytes = tensor.shape.count() * dtype_size(tensor.dtype);
  if (bytes > 0) check_cuda(cudaMemsetAsync(tensor.data, 0, bytes, device.stream));
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  REGKERNELS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// Each block sums one part: first in the registers of a thread, then over a warp, then over the
// block.
template <class Body>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, Body::kMinBlocks)
    reduce_parts_kernel(const __grid_constant__ Body body, const __grid_constant__ VoxelSpace space,
                        int parts, typename Body::T* partial) {
  using T = typename Body::T;
  constexpr int kSums = Body::kSums;
  __shared__ T shared[kRowsPerBlock][kSums];
  const int64_t rows = space.rows();
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y) {
    const auto element = body.element(b / space.items, b % space.items);
    const int64_t part = blockIdx.x;
    const int64_t last = (part + 1) * rows / parts;
    T sums[kSums] = {};
    for (int64_t row = part * rows / parts + threadIdx.y; row < last; row += kRowsPerBlock) {
      const int z = static_cast<int>(row) / space.y;
      const int y = static_cast<int>(row) - z * space.y;
      for (int x = threadIdx.x; x < space.x; x += kWarp) {
        element(Voxel{z, y, x, true, x, space.x}, sums);
      }
    }
    __syncthreads();
    REGKERNELS_UNROLL
    for (int k = 0; k < kSums; ++k) {
      const T sum = warp_sum(sums[k]);
      if (threadIdx.x == 0) shared[threadIdx.y][k] = sum;
    }
    __syncthreads();
    const int k = threadIdx.y * kWarp + threadIdx.x;
    if (k < kSums) {
      T sum = 0;
      for (int warp = 0; warp < kRowsPerBlock; ++warp) sum += shared[warp][k];
      partial[(b * parts + part) * kSums + k] = sum;
    }
  }
}

// Each warp adds up the partial sums of one result.
template <class Body>
__global__ void __launch_bounds__(kWarp)
    reduce_partials_kernel(const __grid_constant__ Body body, int64_t results,
                           int64_t targets_per_group, int64_t items, int parts,
                           const typename Body::T* partial, typename Body::T* out) {
  using T = typename Body::T;
  constexpr int kSums = Body::kSums;
  for (int64_t result = blockIdx.x; result < results; result += gridDim.x) {
    const int64_t target = result / kSums;
    const int k = static_cast<int>(result - target * kSums);
    const auto range = partial_range(partial, target, targets_per_group, items, parts, kSums);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < range.count; i += kWarp) sum += range.begin[i * kSums + k];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) out[result] = static_cast<T>(sum * body.scale(k));
  }
}

template <class Body>
void reduce_voxels(const Cuda& device, const VoxelSpace& space, const Body& body,
                   const Tensor& workspace, const Tensor& result) {
  using T = typename Body::T;
  const int parts = static_cast<int>(workspace.shape[2]);
  T* partial = workspace.as<T>();
  if (space.batch() > 0) {
    const dim3 grid(parts, static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
    reduce_parts_kernel<<<grid, dim3(kWarp, kRowsPerBlock), 0, device.stream>>>(body, space, parts,
                                                                                partial);
    check_launch();
  }
  const int64_t results = result.shape.count();
  if (results == 0) return;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(results, 1 << 16));
  reduce_partials_kernel<<<blocks, kWarp, 0, device.stream>>>(
      body, results, result.shape[1], space.items, parts, partial, result.as<T>());
  check_launch();
}

#endif

}  // namespace regkernels

// Cubic samples on CUDA. A block of voxels samples a box of the array that is not much larger: the
// box goes to shared memory once, continued beyond the ends of the array as the boundary rules say,
// so that no rule is left to apply to a tap, and a row is read in one cycle wherever it begins.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "maths/cubic.h"
#include "maths/voxel_vectors.h"
#include "resample/cubic.h"

namespace regkernels {

// kPitch: voxels from row to row of a box, and so at most along x; multiples of the number of banks
// keep neighbours that sample different rows apart. kMinBlocks: of a multiprocessor.
template <int kPitchOfRows, int kBlocks>
struct CubicTiling {
  static constexpr int kDepth = 4;  // voxels along z of a thread
  static constexpr int kPitch = kPitchOfRows;
  static constexpr int kMinBlocks = kBlocks;
  static constexpr int kThreads = kWarp * kRowsPerBlock;
};

// The lowest and the highest of a number that each thread of a warp has.
inline __device__ void warp_extremes(int& low, int& high) {
#if __CUDA_ARCH__ >= 800
  low = __reduce_min_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
#else
  REGKERNELS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    low = min(low, __shfl_xor_sync(0xffffffffu, low, step));
    high = max(high, __shfl_xor_sync(0xffffffffu, high, step));
  }
#endif
}

// The box of an array that a block samples. Its rows begin and end at multiples of four voxels.
template <class R, class Tiling>
struct CubicBox {
  using T = typename R::T;
  using Source = typename R::Element;
  static constexpr int kPixel = R::Layout::kPixel;
  static constexpr int kRow = Tiling::kPitch * kPixel;
  static constexpr int kMaxRows = 448;

  int low[3], high[3];      // of the first taps
  const T* from[kMaxRows];  // where the rows of the array begin that rows of the box are parts of

  __device__ int begin(int axis) const { return axis == 0 ? low[0] & ~3 : low[axis]; }
  __device__ int size(int axis) const {
    const int length = high[axis] + kTaps - begin(axis);
    return axis == 0 ? (length + 3) & ~3 : length;
  }
  // Whether it is no larger than so many numbers.
  __device__ bool fits(int capacity) const {
    const int limit = min(kMaxRows, capacity / kRow);
    return size(0) <= Tiling::kPitch && size(1) <= limit && size(2) <= limit &&
           size(1) * size(2) <= limit;
  }

  // Finds the rows for the channels that lie side by side, from `channel` on; null for zeros. As in
  // what follows all threads of the block have to take part, and to wait for each other.
  __device__ void find_rows(const Source& source, int channel) {
    const auto& boundary = source.self->boundary;
    const T* const input = source.input + source.self->in_layout.channel(channel);
    const int rows = size(1), count = rows * size(2);
    for (int row = threadIdx.y * kWarp + threadIdx.x; row < count; row += Tiling::kThreads) {
      const int k = row / rows, j = row - k * rows;
      const int y = continued_index(begin(1) + j, boundary.size[1], boundary.sampling);
      const int z = continued_index(begin(2) + k, boundary.size[2], boundary.sampling);
      const int64_t offset = y * source.self->stride[1] + z * source.self->stride[2];
      from[row] = y < 0 || z < 0 ? nullptr : input + offset * kPixel;
    }
  }

  // Sends what the array has of them to shared memory, half a warp each, kCount numbers at a time,
  // which are all in the array or all beyond its end.
  template <int kCount>
  __device__ void fetch(const Source& source, T* data) const {
    constexpr int kHalf = kWarp / 2;
    const int lane = threadIdx.x % kHalf;
    const int half = threadIdx.y * 2 + threadIdx.x / kHalf;
    const int length = size(0) * kPixel, before = begin(0) * kPixel;
    const int end = source.self->boundary.size[0] * kPixel;
    const int count = size(1) * size(2);
    for (int e = lane * kCount; e < length; e += kHalf * kCount) {
      if (unsigned(before + e) >= unsigned(end)) continue;
      for (int row = half; row < count; row += 2 * kRowsPerBlock) {
        const T* const line = from[row];
        if (line == nullptr) continue;
        __pipeline_memcpy_async(data + row * kRow + e, line + before + e, kCount * sizeof(T));
      }
    }
    __pipeline_commit();
  }
  // Writes there what it does not have.
  __device__ void go_on(const Boundary<T, 3>& boundary, T* data) const {
    bool beyond = false;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      beyond = beyond || begin(axis) < 0 || begin(axis) + size(axis) > boundary.size[axis];
    }
    if (!beyond) return;
    const int length = size(0) * kPixel, count = size(1) * size(2);
    for (int e = threadIdx.x; e < length; e += kWarp) {
      const int index = begin(0) + e / kPixel;
      const int x = continued_index(index, boundary.size[0], boundary.sampling);
      for (int row = threadIdx.y; row < count; row += kRowsPerBlock) {
        const T* const line = from[row];
        if (line != nullptr && x >= 0 && x == index) continue;
        data[row * kRow + e] = line != nullptr && x >= 0 ? line[x * kPixel + e % kPixel] : T(0);
      }
    }
  }
  __device__ void load(const Source& source, T* data) const {
    // All rows begin at 16 bytes if the first does and their lengths are multiples of that.
    const bool aligned =
        source.self->stride[1] % 4 == 0 && reinterpret_cast<uintptr_t>(source.input) % 16 == 0;
    if (aligned) {
      fetch<16 / sizeof(T)>(source, data);
    } else {
      fetch<1>(source, data);
    }
    go_on(source.self->boundary, data);
    __pipeline_wait_prior(0);
  }

  // Samples the channels that have been loaded, at a position in the continued array.
  __device__ void values(const T* data, const Vec<T, 3>& position, Mode mode,
                         T (&value)[kPixel]) const {
    T weight[3][kTaps];
    int offset = 0;
    bool between = true;
    REGKERNELS_UNROLL
    for (int axis = 2; axis >= 0; --axis) {
      T fraction;
      const int tap = first_tap(position[axis], fraction) - begin(axis);
      offset = offset * (axis == 0 ? Tiling::kPitch : size(axis)) + tap;
      tap_weights(mode, fraction, weight[axis]);
      between = between & (fraction != 0);
    }
    // At the position of a voxel along some axis, some of the taps do not count.
    if (warp_agrees(between)) {
      sum_taps<false>(data + offset * kPixel, weight, value);
    } else {
      sum_taps<true>(data + offset * kPixel, weight, value);
    }
  }
  template <bool kChecked>
  __device__ void sum_taps(const T* plane, const T (&weight)[3][kTaps], T (&value)[kPixel]) const {
    T line[kPixel][kTaps];
    Source::begin_lines(line);
    const int step = size(1) * kRow;
    REGKERNELS_UNROLL
    for (int k = 0; k < kTaps; ++k) {
      REGKERNELS_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        Source::template add_row<kChecked>(
            weight[1][j] * weight[2][k],
            [&](int i, int c) { return plane[j * kRow + i * kPixel + c]; }, line);
      }
      plane += step;
    }
    REGKERNELS_UNROLL
    for (int c = 0; c < kPixel; ++c) {
      value[c] = Source::template dot<kChecked>(weight[0], line[c]);
    }
  }
};

// Samples a voxel from memory: where a block's samples lie too far apart for its shared memory.
template <class Forward>
__device__ __noinline__ void sample_alone(const Forward& body, int64_t group, int64_t item,
                                          const Voxel& voxel) {
  body.element(group, item)(voxel);
}

// Of the positions along each axis.
template <class T>
struct Limits {
  TapLimits<T> axis[3];
};

template <class Forward, class Tiling, class T = typename Forward::T>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kMinBlocks)
    cubic_tiles_kernel(const __grid_constant__ Forward body,
                       const __grid_constant__ VoxelSpace space,
                       const __grid_constant__ Limits<T> limits, int tiles_x, int capacity) {
  using R = decltype(body.resampling);
  constexpr int kPixel = R::Layout::kPixel;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ CubicBox<R, Tiling> box;
  T* const data = reinterpret_cast<T*>(shared);

  const int tile_y = blockIdx.x / tiles_x;
  const int tile_x = (blockIdx.x - tile_y * tiles_x) * kWarp;
  const bool has_row = tile_y * kRowsPerBlock + threadIdx.y < space.y;
  const bool active = tile_x + threadIdx.x < space.x;
  const int x = min(tile_x + threadIdx.x, space.x - 1);
  const int y = min(tile_y * kRowsPerBlock + threadIdx.y, space.y - 1);
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto element = body.element(group, item);
    for (int z0 = blockIdx.y * Tiling::kDepth; z0 < space.z; z0 += gridDim.y * Tiling::kDepth) {
      const auto voxel_at = [&](int i) {
        return Voxel{min(z0 + i, space.z - 1), y, x, active, tile_x, space.x};
      };
      const int there = has_row ? space.z - z0 : 0;  // planes from this one on
      __syncthreads();                               // the box before is not needed any more
      if (thread < 3) {
        box.low[thread] = INT_MAX;
        box.high[thread] = INT_MIN;
      }
      __syncthreads();
      int low[3] = {INT_MAX, INT_MAX, INT_MAX}, high[3] = {INT_MIN, INT_MIN, INT_MIN};
      Vec<T, 3> position[Tiling::kDepth];  // first the vectors, which are all on their way at once
      REGKERNELS_UNROLL
      for (int i = 0; i < Tiling::kDepth; ++i) position[i] = element.source.vector(voxel_at(i));
      REGKERNELS_UNROLL
      for (int i = 0; i < Tiling::kDepth; ++i) {
        const Vec<T, 3> p = element.source.position(voxel_at(i), position[i]);
        REGKERNELS_UNROLL
        for (int axis = 0; axis < 3; ++axis) {
          // Where p is not a number, this is one of the limits.
          position[i][axis] = fmin(fmax(p[axis], limits.axis[axis].low), limits.axis[axis].high);
          T fraction;
          const int first = first_tap(position[i][axis], fraction);
          low[axis] = min(low[axis], first);
          high[axis] = max(high[axis], first);
        }
      }
      REGKERNELS_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        warp_extremes(low[axis], high[axis]);
        if (threadIdx.x == 0) {
          atomicMin(&box.low[axis], low[axis]);
          atomicMax(&box.high[axis], high[axis]);
        }
      }
      __syncthreads();
      if (!box.fits(capacity)) {
        REGKERNELS_NO_UNROLL
        for (int i = 0; i < Tiling::kDepth; ++i) {
          if (i < there) sample_alone(body, group, item, voxel_at(i));
        }
        continue;
      }
      const int channels = R::Layout::kLast ? 1 : body.resampling.in_layout.count();
      const int64_t plane = static_cast<int64_t>(space.y) * space.x * kPixel;
      for (int channel = 0; channel < channels; ++channel) {
        if (channel > 0) __syncthreads();
        box.find_rows(element.source, channel);
        __syncthreads();
        box.load(element.source, data);
        __syncthreads();
        const Voxel first = voxel_at(0);
        T* target = element.output + first.row(body.resampling.map.out.size) * kPixel +
                    body.resampling.out_layout.channel(channel);
        REGKERNELS_UNROLL
        for (int i = 0; i < Tiling::kDepth; ++i) {
          if (i >= there) break;
          T value[kPixel];
          box.values(data, position[i], body.resampling.boundary.sampling.mode, value);
          if constexpr (R::Layout::kLast) {
            Vec<T, 3> sum;
            const Vec<T, 3> u = body.add_field ? element.source.vector(voxel_at(i)) : Vec<T, 3>{};
            REGKERNELS_UNROLL
            for (int k = 0; k < 3; ++k) sum[k] = value[k] + u[k];
            store_packed(target, first, sum);
          } else {
            if (active) target[x] = value[0];
          }
          target += plane;
        }
      }
    }
  }
}

// Bytes that a kernel's boxes may have where so many blocks are to be at work on a multiprocessor.
// It has a little more shared memory than a block may have, of which each block takes as much.
template <class Function>
int64_t box_bytes(Function* kernel, int blocks) {
  constexpr int64_t kReserved = 1024;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel));
  const int64_t each = (shared_memory_limit() + kReserved) / blocks - kReserved;
  return std::max<int64_t>(each - static_cast<int64_t>(attributes.sharedSizeBytes), 0) / 128 * 128;
}

template <class Tiling, class Forward>
void launch_cubic_tiles(const Cuda& device, const VoxelSpace& space, const Forward& body) {
  using T = typename Forward::T;
  const auto& boundary = body.resampling.boundary;
  Limits<T> limits;
  for (int axis = 0; axis < 3; ++axis) {
    limits.axis[axis] = tap_limits<T>(boundary.size[axis], boundary.sampling);
  }
  const auto kernel = cubic_tiles_kernel<Forward, Tiling>;
  const int64_t bytes = box_bytes(kernel, Tiling::kMinBlocks);
  allow_shared_memory(kernel, bytes);
  const int64_t tiles_x = (space.x + kWarp - 1) / kWarp;
  const int64_t tiles_y = (space.y + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t tiles_z = (space.z + Tiling::kDepth - 1) / Tiling::kDepth;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const dim3 block(kWarp, kRowsPerBlock);
  kernel<<<grid, block, bytes, device.stream>>>(body, space, limits, static_cast<int>(tiles_x),
                                                static_cast<int>(bytes / sizeof(T)));
  check_launch();
}

// How cubic samples are computed: by tiles where that is faster. In 2-D there is little to share,
// and where positions are reflected, or slabs do not have all planes, not every box is one.
template <class R>
void sample_voxels(const Cuda& device, const VoxelSpace& space, const CubicForward<R>& body) {
  if constexpr (R::D == 3 && !R::kSlab && std::is_same_v<typename R::S, typename R::T>) {
    const auto& boundary = body.resampling.boundary;
    bool tiles = boundary.sampling.padding != Padding::kReflection && !space.empty();
    for (int size : boundary.size) tiles = tiles && !is_constant_axis(size, boundary.sampling);
    if (tiles) {
      constexpr int kMinBlocks = (R::Layout::kLast ? 2 : 4) / (sizeof(typename R::T) / 4);
      launch_cubic_tiles<CubicTiling<64, kMinBlocks>>(device, space, body);
      return;
    }
  }
  for_each_voxel(device, space, body);
}

}  // namespace regkernels

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

// kPlanes: voxels along z of a thread. kNumbers: from row to row of a box, which has no longer
// rows; multiples of the number of banks keep neighbours that sample different rows apart. kBlocks:
// of a multiprocessor. kKeep: whether a thread keeps the positions of its voxels in registers; else
// it finds them again where it samples.
template <int kPlanes, int kNumbers, int kBlocks, bool kKeep>
struct CubicTiling {
  static constexpr int kDepth = kPlanes;
  static constexpr int kRow = kNumbers;
  static constexpr int kMinBlocks = kBlocks;
  static constexpr bool kKeepsPositions = kKeep;
  static constexpr int kThreads = kWarp * kRowsPerBlock;
};

// The following ask all threads of a warp, which have to be here: whether all say yes; which bits
// are set in the number of any of them; and what the lowest and the highest of their numbers are.
inline __device__ bool all_lanes(bool yes) { return __all_sync(0xffffffffu, yes); }

inline __device__ unsigned warp_or(unsigned bits) {
#if __CUDA_ARCH__ >= 800
  bits = __reduce_or_sync(0xffffffffu, bits);
#else
  REGKERNELS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    bits |= __shfl_xor_sync(0xffffffffu, bits, step);
  }
#endif
  return bits;
}

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

// Of the positions along each axis.
template <class T>
struct Limits {
  TapLimits<T> axis[3];

  // A position that is not a number is the lower one.
  __device__ T clamped(T position, int k) const {
    return fmin(fmax(position, axis[k].low), axis[k].high);
  }
};

// The box of an array that a block samples. Its rows begin and end at multiples of four numbers.
template <class R, class Tiling>
struct CubicBox {
  using T = typename R::T;
  using Source = typename R::Element;
  static constexpr int kPixel = R::Layout::kPixel;
  static constexpr int kRow = Tiling::kRow;
  static constexpr int kMaxRows = 448;

  int low[3], high[3];      // of the first taps, in x, y, z order
  const T* from[kMaxRows];  // where the rows of the array begin that rows of the box are parts of

  // Of axes 1 and 2, along which its rows are counted.
  __device__ int begin(int axis) const { return low[axis]; }
  __device__ int size(int axis) const { return high[axis] + kTaps - low[axis]; }
  // Of the numbers that its rows have.
  __device__ int row_begin() const { return (low[0] * kPixel) & ~3; }
  __device__ int row_length() const { return ((high[0] + kTaps) * kPixel - row_begin() + 3) & ~3; }
  __device__ bool fits(int max_rows) const {
    return row_length() <= kRow && size(1) <= max_rows && size(2) <= max_rows &&
           size(1) * size(2) <= max_rows;
  }

  // Two ways to find it: a warp adds its own to what the box has, which begins as that of nothing;
  // or one thread finds it of the extremes of all positions. Where these are not numbers, the
  // positions may be anywhere.
  __device__ void begin_empty(int axis) {
    low[axis] = INT_MAX;
    high[axis] = INT_MIN;
  }
  __device__ void add(const Vec<T, 3>& lowest, const Vec<T, 3>& highest) {
    REGKERNELS_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      T fraction;
      int first = first_tap(lowest[axis], fraction), last = first_tap(highest[axis], fraction);
      warp_extremes(first, last);
      if (threadIdx.x == 0) {
        atomicMin(&low[axis], first);
        atomicMax(&high[axis], last);
      }
    }
  }
  __device__ void cover(const Vec<T, 3>& lowest, const Vec<T, 3>& highest,
                        const Limits<T>& limits) {
    REGKERNELS_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const TapLimits<T>& limit = limits.axis[axis];
      const bool known = lowest[axis] <= highest[axis];
      T fraction;
      low[axis] = first_tap(known ? limits.clamped(lowest[axis], axis) : limit.low, fraction);
      high[axis] = first_tap(known ? limits.clamped(highest[axis], axis) : limit.high, fraction);
    }
  }

  // Finds the rows for the channels that lie side by side, from `channel` on; null for zeros. As in
  // what follows all threads of the block have to take part, and to wait for each other.
  __device__ void find_rows(const Source& source, int channel) {
    const auto& boundary = source.self->boundary;
    const T* const input = source.input + source.self->in_layout.channel(channel);
    const int rows = size(1);
    for (int k = threadIdx.y; k < size(2); k += kRowsPerBlock) {
      const int z = continued_index(begin(2) + k, boundary.size[2], boundary.sampling);
      for (int j = threadIdx.x; j < rows; j += kWarp) {
        const int y = continued_index(begin(1) + j, boundary.size[1], boundary.sampling);
        const int64_t offset = y * source.self->stride[1] + z * source.self->stride[2];
        from[k * rows + j] = y < 0 || z < 0 ? nullptr : input + offset * kPixel;
      }
    }
  }

  // Sends what the array has of them to shared memory, half a warp each, kCount numbers at a time,
  // which are all in the array or all beyond its end.
  template <int kCount>
  __device__ void fetch(const Source& source, T* data) const {
    constexpr int kHalf = kWarp / 2;
    const int lane = threadIdx.x % kHalf;
    const int half = threadIdx.y * 2 + threadIdx.x / kHalf;
    const int length = row_length(), before = row_begin();
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
    const int length = row_length(), before = row_begin();
    bool beyond = before < 0 || before + length > boundary.size[0] * kPixel;
    REGKERNELS_UNROLL
    for (int axis = 1; axis < 3; ++axis) {
      beyond = beyond || begin(axis) < 0 || begin(axis) + size(axis) > boundary.size[axis];
    }
    if (!beyond) return;
    const int count = size(1) * size(2);
    for (int e = threadIdx.x; e < length; e += kWarp) {
      constexpr int kBelow = 8;  // voxels that a box may begin before the array, and more
      const int index = (before + e + kBelow * kPixel) / kPixel - kBelow;
      const int x = continued_index(index, boundary.size[0], boundary.sampling);
      for (int row = threadIdx.y; row < count; row += kRowsPerBlock) {
        const T* const line = from[row];
        if (line != nullptr && x >= 0 && x == index) continue;
        const int channel = before + e - index * kPixel;
        data[row * kRow + e] = line != nullptr && x >= 0 ? line[x * kPixel + channel] : T(0);
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

  // From plane to plane of the loaded box, and where the array's first voxel would be in there.
  __device__ int step() const { return size(1) * kRow; }
  __device__ int origin() const { return -(begin(2) * step() + begin(1) * kRow + row_begin()); }
  // Samples the channels that have been loaded, at a position in the continued array.
  static __device__ void values(const T* data, int origin, int step, const Vec<T, 3>& position,
                                Mode mode, T (&value)[kPixel]) {
    T fraction[3], weight[3][kTaps];
    int first[3];
    bool between = true;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      first[axis] = first_tap(position[axis], fraction[axis]);
      between = between & (fraction[axis] != 0);
    }
    const auto find_weights = [&](Mode known) {
      REGKERNELS_UNROLL
      for (int axis = 0; axis < 3; ++axis) tap_weights(known, fraction[axis], weight[axis]);
    };
    if (mode == Mode::kCubic) {
      find_weights(Mode::kCubic);
    } else {
      find_weights(Mode::kBSpline);
    }
    const T* const plane = data + (origin + first[2] * step + first[1] * kRow + first[0] * kPixel);
    // At the position of a voxel along some axis, some of the taps do not count.
    if (all_lanes(between)) {
      sum_taps<false>(plane, step, weight, value);
    } else {
      sum_taps<true>(plane, step, weight, value);
    }
  }
  template <bool kChecked>
  static __device__ void sum_taps(const T* plane, int step, const T (&weight)[3][kTaps],
                                  T (&value)[kPixel]) {
    T line[kPixel][kTaps];
    Source::begin_lines(line);
    // A bit for each tap along y, and then along z, that counts for some sample of the warp: most
    // do not where samples are at voxels along an axis.
    unsigned counts = ~0u;
    if constexpr (kChecked) {
      counts = 0;
      REGKERNELS_UNROLL
      for (int i = 0; i < kTaps; ++i) {
        counts |= weight[1][i] != 0 ? 1u << i : 0u;
        counts |= weight[2][i] != 0 ? 1u << (kTaps + i) : 0u;
      }
      counts = warp_or(counts);
    }
    REGKERNELS_UNROLL
    for (int k = 0; k < kTaps; ++k) {
      if (counts >> (kTaps + k) & 1) {
        REGKERNELS_UNROLL
        for (int j = 0; j < kTaps; ++j) {
          if (!(counts >> j & 1)) continue;
          Source::template add_row<kChecked>(
              weight[1][j] * weight[2][k],
              [&](int i, int c) { return plane[j * kRow + i * kPixel + c]; }, line);
        }
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

// A block finds the box of its samples, fetches it, and samples it. There are several blocks on a
// multiprocessor, of which some sample while others fetch.
template <class Forward, class Tiling, class T = typename Forward::T>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kMinBlocks)
    cubic_tiles_kernel(const __grid_constant__ Forward body,
                       const __grid_constant__ VoxelSpace space,
                       const __grid_constant__ Limits<T> limits, int tiles_x, int max_rows) {
  using R = decltype(body.resampling);
  constexpr int kPixel = R::Layout::kPixel;
  constexpr int kDepth = Tiling::kDepth;
  constexpr bool kKeep = Tiling::kKeepsPositions;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ CubicBox<R, Tiling> box;
  T* const data = reinterpret_cast<T*>(shared);

  const int tile_y = blockIdx.x / tiles_x * kRowsPerBlock;
  const int tile_x = blockIdx.x % tiles_x * kWarp;
  const bool has_row = tile_y + threadIdx.y < space.y;
  const bool active = tile_x + threadIdx.x < space.x;
  const int x = min(tile_x + threadIdx.x, space.x - 1);
  const int y = min(tile_y + threadIdx.y, space.y - 1);
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const int tiles_z = (space.z + kDepth - 1) / kDepth;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto element = body.element(group, item);
    for (int tile_z = blockIdx.y; tile_z < tiles_z; tile_z += gridDim.y) {
      const int end = min((tile_z + 1) * kDepth, space.z);
      int most = kDepth;  // planes for which a box is looked for
      for (int z = tile_z * kDepth, planes; z < end; z += planes) {
        planes = min(most, end - z);
        const auto voxel_at = [&](int i) {
          return Voxel{z + min(i, planes - 1), y, x, active, tile_x, space.x};
        };
        const auto position_at = [&](int i, const Vec<T, 3>& u) {
          Vec<T, 3> p = element.source.template position<true>(voxel_at(i), u);
          REGKERNELS_UNROLL
          for (int axis = 0; axis < 3; ++axis) p[axis] = limits.clamped(p[axis], axis);
          return p;
        };
        [[maybe_unused]] Vec<T, 3> kept[kKeep ? kDepth : 1];
        __syncthreads();  // the box before is not needed any more
        if constexpr (R::kField) {
          if (thread < 3) box.begin_empty(thread);
          __syncthreads();
          Vec<T, 3> u[kDepth];  // all on their way at once
          REGKERNELS_UNROLL
          for (int i = 0; i < kDepth; ++i) u[i] = element.source.vector(voxel_at(i));
          Vec<T, 3> lowest, highest;
          REGKERNELS_UNROLL
          for (int i = 0; i < kDepth; ++i) {
            const Vec<T, 3> p = position_at(i, u[i]);
            if constexpr (kKeep) kept[i] = p;
            REGKERNELS_UNROLL
            for (int axis = 0; axis < 3; ++axis) {
              lowest[axis] = i == 0 ? p[axis] : fmin(lowest[axis], p[axis]);
              highest[axis] = i == 0 ? p[axis] : fmax(highest[axis], p[axis]);
            }
          }
          box.add(lowest, highest);
        } else if (thread == 0) {
          Vec<T, 3> lowest, highest;
          const Vec<int, 3> first{tile_x, tile_y, z};
          const Vec<int, 3> last{min(tile_x + kWarp, space.x) - 1,
                                 min(tile_y + kRowsPerBlock, space.y) - 1, z + planes - 1};
          body.resampling.map.extremes(element.source.item, first, last, lowest, highest);
          box.cover(lowest, highest, limits);
        }
        __syncthreads();
        if (!box.fits(max_rows)) {
          if (most == kDepth && planes > 1) {
            most = (kDepth + 1) / 2;
            planes = 0;  // those of half as many may fit
            continue;
          }
          REGKERNELS_NO_UNROLL
          for (int i = 0; i < planes; ++i) {
            if (has_row) sample_alone(body, group, item, voxel_at(i));
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
          if (!has_row) continue;
          const int step = box.step(), origin = box.origin();
          const Voxel first = voxel_at(0);
          T* target = element.output + first.row(body.resampling.map.out.size) * kPixel +
                      body.resampling.out_layout.channel(channel);
          const auto sample = [&](const Vec<T, 3>& p, const Vec<T, 3>& u) {
            T value[kPixel];
            box.values(data, origin, step, p, body.resampling.boundary.sampling.mode, value);
            if constexpr (R::Layout::kLast) {
              Vec<T, 3> sum;
              REGKERNELS_UNROLL
              for (int k = 0; k < 3; ++k) sum[k] = value[k] + (body.add_field ? u[k] : T(0));
              store_packed(target, first, sum);
            } else {
              if (active) target[x] = value[0];
            }
            target += plane;
          };
          if constexpr (kKeep) {
            static_assert(!R::Layout::kLast, "the vectors are not kept");
            REGKERNELS_UNROLL
            for (int i = 0; i < kDepth; ++i) {
              if (i < planes) sample(kept[i], {});
            }
          } else {
            Vec<T, 3> next = element.source.vector(first);
            REGKERNELS_NO_UNROLL
            for (int i = 0; i < planes; ++i) {
              const Vec<T, 3> u = next;
              if (R::kField && i + 1 < planes) next = element.source.vector(voxel_at(i + 1));
              sample(position_at(i, u), u);
            }
          }
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
  const int64_t rows = bytes / static_cast<int64_t>(Tiling::kRow * sizeof(T));
  using Box = CubicBox<decltype(body.resampling), Tiling>;
  allow_shared_memory(kernel, bytes);
  const int64_t tiles_x = (space.x + kWarp - 1) / kWarp;
  const int64_t tiles_y = (space.y + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t tiles_z = (space.z + Tiling::kDepth - 1) / Tiling::kDepth;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const dim3 block(kWarp, kRowsPerBlock);
  kernel<<<grid, block, bytes, device.stream>>>(
      body, space, limits, static_cast<int>(tiles_x),
      static_cast<int>(std::min<int64_t>(rows, Box::kMaxRows)));
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
      constexpr int kWidth = sizeof(typename R::T) / 4;
      if constexpr (R::Layout::kLast) {
        launch_cubic_tiles<CubicTiling<6, 128, 2 / kWidth, false>>(device, space, body);
      } else if constexpr (R::kField) {
        launch_cubic_tiles<CubicTiling<6, 64, 4 / kWidth, true>>(device, space, body);
      } else {
        launch_cubic_tiles<CubicTiling<8, 64, 4 / kWidth, false>>(device, space, body);
      }
      return;
    }
  }
  for_each_voxel(device, space, body);
}

}  // namespace regkernels

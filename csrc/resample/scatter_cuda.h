// The gradient of the array that is sampled, on CUDA.
//
// A block of voxels adds, by way of a warp that does not vary much, to a block of targets of about
// the same size. It accumulates them in shared memory, in a tile placed about where its central
// voxel goes, and then adds each touched target to global memory once, in whole rows. What falls
// outside the tile goes to global memory directly: a wild warp is slower, not wrong.
//
// Shared memory adds integers by itself and numbers in floating point not at all: that takes a loop
// of compare and swap. So the tile of a float32 gradient has integers, multiples of a quantum that
// is a power of two, at most 2^-21 of the block's largest cotangent: what is lost is at most half
// of that, as much as float32 itself rounds a few such numbers. So small a quantum leaves room for
// 2^9 contributions of the largest cotangent to one target. How many there can be is counted, per
// column of cells rather than per target, while they are added up; where they could be more, the
// block starts anew with twice the quantum. Where that is not enough, a block's cotangents differ
// so much in size that the small ones would lose digits, or not all of them are finite, they go to
// memory directly.
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

// The voxels of a block and the targets that its tile holds.
template <class R>
struct ScatterTile {
  using T = typename R::T;
  static constexpr int D = R::D;
  using Shape = ScatterShape<T, D>;
  static constexpr int kChannels = R::Layout::kLast ? D : 1;  // accumulated at a time
  static constexpr int kBlockVoxels = Shape::kBlockX * Shape::kBlockY * Shape::kBlockZ;
  static constexpr int kRow = Shape::kTileX * kChannels;
  static constexpr int kRows = Shape::kTileY * Shape::kTileZ;
  static constexpr int kElements = kRow * kRows;
  static_assert(kElements % 4 == 0);

  // Of the tile, in targets.
  static __device__ __forceinline__ constexpr int size(int axis) {
    return axis == 0 ? Shape::kTileX : axis == 1 ? Shape::kTileY : Shape::kTileZ;
  }
  static __device__ __forceinline__ constexpr int stride(int axis) {
    return axis == 0 ? 1 : axis == 1 ? Shape::kTileX : Shape::kTileX * Shape::kTileY;
  }

  Vec<int, 3> first;   // voxel of the block
  Vec<int, D> origin;  // the first target of the tile

  // Where the tile of a block begins. One thread finds it for all.
  static __device__ Vec<int, D> find_origin(const typename R::Element& source,
                                            const VoxelSpace& space, const Vec<int, 3>& first) {
    const int x = min(first[0] + Shape::kBlockX / 2, space.x - 1);
    const Voxel centre{min(first[2] + Shape::kBlockZ / 2, space.z - 1),
                       min(first[1] + Shape::kBlockY / 2, space.y - 1),
                       x,
                       true,
                       x,
                       space.x};
    T unused[1 << D];
    Vec<int, D> result =
        source.corner_weights(source.position(centre, source.vector(centre)), unused);
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) result[k] -= size(k) / 2 - 1;
    return result;
  }

  // Calls body(voxel) for the voxels of the block that are this thread's.
  template <class Body>
  __device__ __forceinline__ void for_each(const VoxelSpace& space, const Body& body) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < kBlockVoxels; i += kScatterThreads) {
      const int x = first[0] + i % Shape::kBlockX;
      const int y = first[1] + i / Shape::kBlockX % Shape::kBlockY;
      const int z = first[2] + i / (Shape::kBlockX * Shape::kBlockY);
      if (x < space.x && y < space.y && z < space.z) body(Voxel{z, y, x, true, x, space.x});
    }
  }

  // Whether the tile holds the corners of a cell, and the cell's place in it.
  __device__ __forceinline__ bool find(const Vec<int, D>& cell, Vec<int, D>& place) const {
    bool fits = true;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      place[k] = cell[k] - origin[k];
      fits = fits & (place[k] >= 0) & (place[k] < size(k) - 1);
    }
    return fits;
  }
  static __device__ __forceinline__ int element(const Vec<int, D>& place) {
    int result = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) result += place[k] * stride(k);
    return result * kChannels;
  }
  // The element of a corner of a cell, from that of the cell.
  static __device__ __forceinline__ constexpr int corner_element(int corner) {
    int step = 0;
    for (int k = 0; k < D; ++k) step += corner >> k & 1 ? stride(k) : 0;
    return step * kChannels;
  }

  // Calls body(place in the array, element of the tile), each warp for one row after another.
  template <class Body>
  __device__ __forceinline__ void for_each_element(const R& resampling, int channel,
                                                   const Body& body) const {
    for (int row = threadIdx.x / kWarp; row < kRows; row += kScatterThreads / kWarp) {
      Vec<int, D> begin = origin;
      begin[1] += row % Shape::kTileY;
      if constexpr (D == 3) begin[2] += row / Shape::kTileY;
      const int64_t start = resampling.in_layout.at(resampling.voxel_offset(begin), channel);
      REGKERNELS_UNROLL
      for (int e = 0; e < kRow; e += kWarp) {
        const int i = e + threadIdx.x % kWarp;
        if (i < kRow) body(start + i, row * kRow + i);
      }
    }
  }

  template <class Value>
  static __device__ __forceinline__ void clear(Value* elements, int count) {
    for (int i = 4 * threadIdx.x; i < count; i += 4 * kScatterThreads) {
      REGKERNELS_UNROLL
      for (int j = 0; j < 4; ++j) elements[i + j] = 0;
    }
  }
};

// Where a block's contributions go in the end, as numbers in floating point.
template <class T>
struct FloatTarget {
  using Value = T;
  T* target;

  __device__ __forceinline__ void add(int64_t place, T value) const {
    atomicAdd(target + place, value);
  }
  __device__ __forceinline__ void add_quanta(int64_t place, int quanta, T quantum) const {
    atomicAdd(target + place, static_cast<T>(quanta) * quantum);
  }
};

// The same with the same bits every time: see fixed_point.h.
template <class T>
struct FixedTarget {
  Fixed* sums;
  T* not_finite;
  double quanta;

  __device__ __forceinline__ void add(int64_t place, T value) const {
    if (isfinite(value)) {
      add_rounded(place, static_cast<double>(value));
    } else {
      atomicAdd(not_finite + place, value);
    }
  }
  __device__ __forceinline__ void add_quanta(int64_t place, int quanta, T quantum) const {
    add_rounded(place, quanta * static_cast<double>(quantum));
  }
  __device__ __forceinline__ void add_rounded(int64_t place, double value) const {
    atomicAdd(sums + place, static_cast<Fixed>(__double2ll_rn(value * quanta)));
  }
};

// Adds what one voxel contributes to memory directly.
template <class R, class Target>
__device__ __forceinline__ void add_directly(const R& resampling, const Target& target,
                                             const Vec<int, R::D>& cell, int channel,
                                             const typename R::T (&weight)[1 << R::D],
                                             const typename R::T (&g)[ScatterTile<R>::kChannels]) {
  const int64_t corner0 = resampling.voxel_offset(cell);
  REGKERNELS_UNROLL
  for (int corner = 0; corner < (1 << R::D); ++corner) {
    if (weight[corner] == 0) continue;
    const int64_t place =
        resampling.in_layout.at(corner0 + resampling.corner_offset(corner), channel);
    REGKERNELS_UNROLL
    for (int c = 0; c < ScatterTile<R>::kChannels; ++c)
      target.add(place + c, weight[corner] * g[c]);
  }
}

// What a block's cotangents are like.
struct BlockOfCotangents {
  float largest;  // magnitude; infinite or NaN if any of them is
  float sum;      // of the magnitudes
};

// `shared` holds two numbers for each warp.
inline __device__ BlockOfCotangents over_block(BlockOfCotangents mine, float* shared) {
  constexpr int kWarps = kScatterThreads / kWarp;
  // The bits of magnitudes are in their order, with infinity and NaN above them all.
  unsigned largest = __float_as_uint(mine.largest);
  REGKERNELS_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  const float sum = warp_sum(mine.sum);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = __uint_as_float(largest);
    shared[kWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  BlockOfCotangents result{0, 0};
  largest = 0;
  REGKERNELS_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) {
    largest = max(largest, __float_as_uint(shared[warp]));
    result.sum += shared[kWarps + warp];
  }
  result.largest = __uint_as_float(largest);
  return result;
}

// The tile of integers, and the numbers of voxels in columns of cells: 2 by 2 in x and y and 1 in
// z, of which two share a word. The corners of no more than 8 columns meet in a target.
template <class R>
struct QuantisedTile {
  using Tile = ScatterTile<R>;
  using Shape = typename Tile::Shape;
  static constexpr int kColumnsX = (Shape::kTileX + 1) / 2, kColumnsY = (Shape::kTileY + 1) / 2;
  static constexpr int kCounts = (kColumnsX * kColumnsY * ((Shape::kTileZ + 1) / 2) + 3) / 4 * 4;
  // A column has less than 2^6 voxels, as a rule.
  static constexpr int kLeastBits = 6, kMostBits = 7;

  alignas(16) int quanta[Tile::kElements];
  alignas(16) unsigned counts[kCounts];
  float cotangents[2 * kScatterThreads / kWarp];
  Vec<int, R::D> origin;
};

// The cotangents may be so many times as large as they are on average.
inline constexpr float kScatterRange = 64;

template <class R, bool kFixed>
__global__ void __launch_bounds__(kScatterThreads, ScatterTile<R>::kChannels == 1 ? 5 : 4)
    quantised_scatter_kernel(const __grid_constant__ R resampling,
                             const __grid_constant__ Operand<const typename R::S> grad_output,
                             const __grid_constant__ Operand<typename R::T> grad_input,
                             const __grid_constant__ FixedSums fixed,
                             const __grid_constant__ VoxelSpace space, int tiles_x) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Tile = ScatterTile<R>;
  using Shape = typename Tile::Shape;
  using Quantised = QuantisedTile<R>;
  constexpr int kChannels = Tile::kChannels;
  __shared__ Quantised shared;

  Tile tile;
  const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
  tile.first[0] = tile_x * Shape::kBlockX;
  tile.first[1] = tile_y * Shape::kBlockY;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto source = resampling.element(group, item);
    const typename R::S* grad = grad_output.at(group, item);
    const auto target = [&] {
      T* const sums = source.plane_zero(grad_input.at(group, item));
      if constexpr (kFixed) {
        return FixedTarget<T>{source.plane_zero(fixed.sums.at(group, item)), sums,
                              fixed.quanta(group, item)};
      } else {
        return FloatTarget<T>{sums};
      }
    }();
    for (tile.first[2] = blockIdx.y * Shape::kBlockZ; tile.first[2] < space.z;
         tile.first[2] += gridDim.y * Shape::kBlockZ) {
      if (threadIdx.x == 0) shared.origin = Tile::find_origin(source, space, tile.first);
#pragma unroll 1
      for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
        auto load = [&](const Voxel& voxel, T(&g)[kChannels]) {
          const int64_t here = source.voxel_offset(voxel);
          REGKERNELS_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            g[c] = to_arithmetic(grad[resampling.out_layout.at(here, channel + c)]);
          }
        };
        BlockOfCotangents cotangents{0, 0};
        tile.for_each(space, [&](const Voxel& voxel) {
          T g[kChannels];
          load(voxel, g);
          REGKERNELS_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            const float magnitude = fabsf(g[c]);
            // NaN has to come through this.
            cotangents.largest =
                cotangents.largest < magnitude || isnan(magnitude) ? magnitude : cotangents.largest;
            cotangents.sum += magnitude;
          }
        });
        cotangents = over_block(cotangents, shared.cotangents);
        tile.origin = shared.origin;
        if (cotangents.largest == 0) {
          __syncthreads();
          continue;
        }
        const float mean = cotangents.sum / (Tile::kBlockVoxels * kChannels);
        bool fits = cotangents.largest <= kScatterRange * mean && cotangents.largest > 1e-30f &&
                    cotangents.largest < 1e30f;
        // The largest cotangent has less than 2^exponent, a target at most 8 times 2^bits of them.
        const int exponent = (__float_as_int(cotangents.largest) >> 23) - 126;
        T quantum = 0;
        bool is_first = true;
#pragma unroll 1
        for (int bits = Quantised::kLeastBits; fits; ++bits) {
          Tile::clear(shared.quanta, Tile::kElements);
          Tile::clear(shared.counts, Quantised::kCounts);
          __syncthreads();
          const int scale_bits = 31 - 3 - bits - exponent;
          const T scale = __int_as_float((scale_bits + 127) << 23);
          quantum = __int_as_float((127 - scale_bits) << 23);
          tile.for_each(space, [&](const Voxel& voxel) {
            T g[kChannels], weight[1 << D];
            load(voxel, g);
            const Vec<int, D> cell =
                source.corner_weights(source.position(voxel, source.vector(voxel)), weight);
            Vec<int, D> place;
            if (tile.find(cell, place)) {
              int* const corner0 = shared.quanta + Tile::element(place);
              REGKERNELS_UNROLL
              for (int c = 0; c < kChannels; ++c) g[c] *= scale;
              REGKERNELS_UNROLL
              for (int corner = 0; corner < (1 << D); ++corner) {
                REGKERNELS_UNROLL
                for (int c = 0; c < kChannels; ++c) {
                  atomicAdd(corner0 + Tile::corner_element(corner) + c,
                            __float2int_rn(weight[corner] * g[c]));
                }
              }
              const int z = D == 3 ? place[D - 1] : 0;
              const int column = place[0] / 2 + Quantised::kColumnsX *
                                                    (place[1] / 2 + Quantised::kColumnsY * (z / 2));
              atomicAdd(shared.counts + column, 1u << 16 * (z & 1));
            } else if (is_first) {
              add_directly(resampling, target, cell, channel, weight, g);
            }
          });
          is_first = false;
          __syncthreads();
          unsigned most = 0;
          for (int i = threadIdx.x; i < Quantised::kCounts; i += kScatterThreads) {
            const unsigned two = shared.counts[i];
            most = max(most, max(two >> 16, two & 0xffff));
          }
          if (!__syncthreads_or(most >> bits)) break;
          fits = bits < Quantised::kMostBits;
        }
        if (!fits) {
          // What lies outside of the tile may be there already.
          tile.for_each(space, [&](const Voxel& voxel) {
            T g[kChannels], weight[1 << D];
            load(voxel, g);
            const Vec<int, D> cell =
                source.corner_weights(source.position(voxel, source.vector(voxel)), weight);
            Vec<int, D> place;
            if (is_first || tile.find(cell, place)) {
              add_directly(resampling, target, cell, channel, weight, g);
            }
          });
          __syncthreads();
          continue;
        }
        tile.for_each_element(resampling, channel, [&](int64_t place, int element) {
          // What nobody touched may lie outside of the array.
          const int quanta = shared.quanta[element];
          if (quanta != 0) target.add_quanta(place, quanta, quantum);
        });
        __syncthreads();
      }
    }
  }
}

// Float64 has no such tile: what one of integers loses, float64 would not.
template <class R>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ R resampling,
                   const __grid_constant__ Operand<const typename R::S> grad_output,
                   const __grid_constant__ Operand<typename R::T> grad_input,
                   const __grid_constant__ VoxelSpace space, int tiles_x) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Tile = ScatterTile<R>;
  using Shape = typename Tile::Shape;
  constexpr int kChannels = Tile::kChannels;
  __shared__ alignas(16) T sums[Tile::kElements];
  __shared__ Vec<int, D> shared_origin;

  Tile tile;
  const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
  tile.first[0] = tile_x * Shape::kBlockX;
  tile.first[1] = tile_y * Shape::kBlockY;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    const auto source = resampling.element(group, item);
    const typename R::S* grad = grad_output.at(group, item);
    const FloatTarget<T> target{source.plane_zero(grad_input.at(group, item))};
    for (tile.first[2] = blockIdx.y * Shape::kBlockZ; tile.first[2] < space.z;
         tile.first[2] += gridDim.y * Shape::kBlockZ) {
      if (threadIdx.x == 0) shared_origin = Tile::find_origin(source, space, tile.first);
#pragma unroll 1
      for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
        Tile::clear(sums, Tile::kElements);
        __syncthreads();
        tile.origin = shared_origin;
        tile.for_each(space, [&](const Voxel& voxel) {
          const int64_t here = source.voxel_offset(voxel);
          T g[kChannels], weight[1 << D];
          REGKERNELS_UNROLL
          for (int c = 0; c < kChannels; ++c) {
            g[c] = to_arithmetic(grad[resampling.out_layout.at(here, channel + c)]);
          }
          const Vec<int, D> cell =
              source.corner_weights(source.position(voxel, source.vector(voxel)), weight);
          Vec<int, D> place;
          if (!tile.find(cell, place)) {
            return add_directly(resampling, target, cell, channel, weight, g);
          }
          T* const corner0 = sums + Tile::element(place);
          REGKERNELS_UNROLL
          for (int corner = 0; corner < (1 << D); ++corner) {
            if (weight[corner] == 0) continue;
            REGKERNELS_UNROLL
            for (int c = 0; c < kChannels; ++c) {
              atomicAdd(corner0 + Tile::corner_element(corner) + c, weight[corner] * g[c]);
            }
          }
        });
        __syncthreads();
        tile.for_each_element(resampling, channel, [&](int64_t place, int element) {
          // What nobody touched may lie outside of the array.
          if (sums[element] != 0) target.add(place, sums[element]);
        });
        __syncthreads();
      }
    }
  }
}

template <class R>
void scatter(const Cuda& device, const VoxelSpace& space, const R& resampling,
             const Tensor& grad_output, const Tensor& grad_input,
             const ScatterWorkspace& workspace) {
  using S = typename R::S;
  using T = typename R::T;
  using Shape = ScatterShape<T, R::D>;
  clear(device, grad_input);
  if (space.empty()) return;
  const int64_t tiles_x = (space.x + Shape::kBlockX - 1) / Shape::kBlockX;
  const int64_t tiles_y = (space.y + Shape::kBlockY - 1) / Shape::kBlockY;
  const int64_t tiles_z = (space.z + Shape::kBlockZ - 1) / Shape::kBlockZ;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const Operand<const S> cotangents(grad_output);
  const Operand<T> sums(grad_input);
  const auto launch = [&](auto is_fixed, const FixedSums& fixed) {
    if constexpr (sizeof(T) == 4) {
      quantised_scatter_kernel<R, decltype(is_fixed)::value>
          <<<grid, kScatterThreads, 0, device.stream>>>(resampling, cotangents, sums, fixed, space,
                                                        static_cast<int>(tiles_x));
      check_launch();
    } else if constexpr (decltype(is_fixed)::value) {
      for_each_voxel(device, space, FixedPointScatter<R>{resampling, cotangents, fixed, sums});
    } else {
      scatter_kernel<<<grid, kScatterThreads, 0, device.stream>>>(resampling, cotangents, sums,
                                                                  space, static_cast<int>(tiles_x));
      check_launch();
    }
  };
  if (workspace.fixed_sums->present) {
    in_fixed_point<S, T>(device, space, grad_output, grad_input, *workspace.fixed_sums,
                         *workspace.largest,
                         [&](const FixedSums& fixed) { launch(std::true_type{}, fixed); });
  } else {
    launch(std::false_type{}, FixedSums{});
  }
}

}  // namespace regkernels

#endif

// The gradient of the array that is sampled, on CUDA.
//
// A block of voxels adds, by way of a warp that does not vary much, to a block of targets of about
// the same size. It accumulates them in shared memory, in a tile placed about where its central
// voxel goes, and then adds each touched target to global memory once, in whole rows, four at a
// time where the GPU does that. What falls outside the tile goes to global memory directly: a wild
// warp is slower, not wrong.
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

template <class T, int D, int kChannels>
struct ScatterShape;
template <class T, int kChannels>
struct ScatterShape<T, 3, kChannels> {
  static constexpr int kBlockX = 16, kBlockY = 8, kBlockZ = sizeof(T) == 4 ? 8 : 2;
  // With three channels of float32 twelve planes would be more memory than a block may have.
  static constexpr int kTileX = sizeof(T) == 4 ? 24 : 22, kTileY = 14;
  static constexpr int kTileZ = sizeof(T) != 4 ? 6 : kChannels == 1 ? 12 : 11;
};
template <class T, int kChannels>
struct ScatterShape<T, 2, kChannels> {
  static constexpr int kBlockX = 32, kBlockY = 32, kBlockZ = 1;
  static constexpr int kTileX = 44, kTileY = 44, kTileZ = 1;
};
inline constexpr int kScatterThreads = 256;

// The voxels of a block and the targets that its tile holds.
template <class R>
struct ScatterTile {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kChannels = R::Layout::kLast ? D : 1;  // accumulated at a time
  using Shape = ScatterShape<T, D, kChannels>;
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
  static __device__ __forceinline__ constexpr int block(int axis) {
    return axis == 0 ? Shape::kBlockX : axis == 1 ? Shape::kBlockY : Shape::kBlockZ;
  }

  Vec<int, 3> first;   // voxel of the block
  Vec<int, D> origin;  // the first target of the tile

  // Where the tile of a block begins: where rows are of fours, at a multiple of four targets.
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
    // As much room on one side as on the other. A block of samples has a cell more than samples.
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) result[k] -= block(k) / 2 + (size(k) - block(k) - 1) / 2;
    if constexpr (kRow % 4 == 0) result[0] &= ~3;
    return result;
  }

  // A thread's voxels lie above each other: so many, and so many planes or rows apart.
  static constexpr int kVoxels = kBlockVoxels / kScatterThreads;
  static constexpr int kStep = kScatterThreads / Shape::kBlockX / (D == 3 ? Shape::kBlockY : 1);
  static_assert(kVoxels * kStep == (D == 3 ? Shape::kBlockZ : Shape::kBlockY));

  // Calls body(number, voxel, its offset) for the voxels of the block that are this thread's.
  template <bool kUnrolled = false, class Body>
  __device__ __forceinline__ void for_each(const typename R::Element& source,
                                           const VoxelSpace& space, const Body& body) const {
    const int i = threadIdx.x;
    Voxel voxel{first[2], first[1] + i / Shape::kBlockX, first[0] + i % Shape::kBlockX,
                true,     first[0] + i % Shape::kBlockX, space.x};
    if constexpr (D == 3) {
      voxel.y = first[1] + i / Shape::kBlockX % Shape::kBlockY;
      voxel.z = first[2] + i / (Shape::kBlockX * Shape::kBlockY);
    }
    if (voxel.x >= space.x || (D == 3 && voxel.y >= space.y)) return;
    const int64_t step = static_cast<int64_t>(D == 3 ? space.y : 1) * space.x * kStep;
    int64_t offset = source.voxel_offset(voxel);
    const auto visit = [&](int number) {
      int& along = D == 3 ? voxel.z : voxel.y;
      if (along < (D == 3 ? space.z : space.y)) body(number, voxel, offset);
      along += kStep;
      offset += step;
    };
    if constexpr (kUnrolled) {
      REGKERNELS_UNROLL
      for (int number = 0; number < kVoxels; ++number) visit(number);
    } else {
      REGKERNELS_NO_UNROLL
      for (int number = 0; number < kVoxels; ++number) visit(number);
    }
  }

  // Whether the tile holds the corners of a cell, and the cell's place in it.
  __device__ __forceinline__ bool find(const Vec<int, D>& cell, Vec<int, D>& place) const {
    bool fits = true;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      place[k] = cell[k] - origin[k];
      fits = fits & (static_cast<unsigned>(place[k]) < size(k) - 1u);
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

  // Calls body(place in the array, element of the tile) for every kCount-th element.
  template <int kCount, class Body>
  __device__ __forceinline__ void for_each_element(const R& resampling, int channel,
                                                   const Body& body) const {
    const int64_t start = resampling.in_layout.at(resampling.voxel_offset(origin), channel);
    const int row_size = resampling.map.in.size[0], rows = resampling.map.in.size[1];
#pragma unroll 1
    for (int i = kCount * threadIdx.x; i < kElements; i += kCount * kScatterThreads) {
      const int row = i / kRow;
      const int z = row / Shape::kTileY, y = row - z * Shape::kTileY;
      const int64_t row_start = static_cast<int64_t>(z * rows + y) * row_size * kChannels;
      body(start + row_start + (i - row * kRow), i);
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
  // Whether four numbers can be added at a time, from a multiple of four on, where rows have so
  // many.
  __device__ __forceinline__ bool adds_four(int64_t row_size, int64_t channel_size) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return sizeof(T) == 4 && row_size % 4 == 0 && channel_size % 4 == 0 &&
           reinterpret_cast<uintptr_t>(target) % 16 == 0;
#else
    return false;
#endif
  }
  __device__ __forceinline__ void add_four_quanta(int64_t place, const int4& quanta,
                                                  T quantum) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const float4 value{
        static_cast<float>(quanta.x) * quantum, static_cast<float>(quanta.y) * quantum,
        static_cast<float>(quanta.z) * quantum, static_cast<float>(quanta.w) * quantum};
    atomicAdd(reinterpret_cast<float4*>(target + place), value);
#endif
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
  static __device__ __forceinline__ bool adds_four(int64_t, int64_t) { return false; }
  static __device__ __forceinline__ void add_four_quanta(int64_t, const int4&, T) {}
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
  unsigned largest;  // bits of a magnitude, in whose order infinity and NaN are above all others
  float sum;         // of the magnitudes

  __device__ __forceinline__ void add(float cotangent) {
    const float magnitude = fabsf(cotangent);
    largest = max(largest, __float_as_uint(magnitude));
    sum += magnitude;
  }
  // Over all threads; `shared` holds two numbers for each warp.
  __device__ __forceinline__ BlockOfCotangents over_block(float* shared) const {
    constexpr int kWarps = kScatterThreads / kWarp;
    const unsigned of_warp = __reduce_max_sync(0xffffffffu, largest);
    const float sum_of_warp = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) {
      shared[threadIdx.x / kWarp] = __uint_as_float(of_warp);
      shared[kWarps + threadIdx.x / kWarp] = sum_of_warp;
    }
    __syncthreads();
    BlockOfCotangents result{0, 0};
    REGKERNELS_UNROLL
    for (int warp = 0; warp < kWarps; ++warp) {
      result.largest = max(result.largest, __float_as_uint(shared[warp]));
      result.sum += shared[kWarps + warp];
    }
    return result;
  }
};

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

// What a block of threads works on: one tile of the samples of one batch element. `first_z` and
// `first_batch` are those of the launch, as a grid has fewer blocks along y and z than there may be
// tiles and elements.
struct ScatterLaunch {
  int tiles_x;
  int first_z;
  int64_t first_batch;

  template <class R>
  __device__ __forceinline__ ScatterTile<R> tile() const {
    using Shape = typename ScatterTile<R>::Shape;
    const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
    ScatterTile<R> result;
    result.first = {tile_x * Shape::kBlockX, tile_y * Shape::kBlockY,
                    first_z + static_cast<int>(blockIdx.y) * Shape::kBlockZ};
    return result;
  }
  __device__ __forceinline__ int64_t batch() const { return first_batch + blockIdx.z; }
};

template <class R, bool kFixed>
__global__ void __launch_bounds__(kScatterThreads, ScatterTile<R>::kChannels == 1 ? 5 : 4)
    quantised_scatter_kernel(const __grid_constant__ R resampling,
                             const __grid_constant__ Operand<const typename R::S> grad_output,
                             const __grid_constant__ Operand<typename R::T> grad_input,
                             const __grid_constant__ FixedSums fixed,
                             const __grid_constant__ VoxelSpace space,
                             const __grid_constant__ ScatterLaunch launch) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Tile = ScatterTile<R>;
  using Quantised = QuantisedTile<R>;
  constexpr int kChannels = Tile::kChannels;
  __shared__ Quantised shared;

  Tile tile = launch.tile<R>();
  const int64_t b = launch.batch();
  const int64_t group = space.items == 1 ? b : b / space.items;
  const int64_t item = space.items == 1 ? 0 : b - group * space.items;
  const auto source = resampling.element(group, item);
  const typename R::S* const grad = grad_output.at(group, item);
  const auto target = [&] {
    T* const sums = source.plane_zero(grad_input.at(group, item));
    if constexpr (kFixed) {
      return FixedTarget<T>{source.plane_zero(fixed.sums.at(group, item)), sums,
                            fixed.quanta(group, item)};
    } else {
      return FloatTarget<T>{sums};
    }
  }();
#pragma unroll 1
  for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
    const auto load = [&](int64_t offset, T(&g)[kChannels]) {
      const typename R::S* const here = grad + resampling.out_layout.at(offset, channel);
      REGKERNELS_UNROLL
      for (int c = 0; c < kChannels; ++c) g[c] = to_arithmetic(here[c]);
    };
    BlockOfCotangents mine{0, 0};
    // All loads are under way together; what places samples of a field is on its way as well.
    T g[Tile::kVoxels][kChannels] = {};
    tile.template for_each<true>(source, space, [&](int number, const Voxel&, int64_t offset) {
      load(offset, g[number]);
      if constexpr (kChannels > 1) source.prefetch_vector(offset);
    });
    if (channel == 0 && threadIdx.x == 0) {
      shared.origin = Tile::find_origin(source, space, tile.first);
    }
    REGKERNELS_UNROLL
    for (int number = 0; number < Tile::kVoxels; ++number) {
      REGKERNELS_UNROLL
      for (int c = 0; c < kChannels; ++c) mine.add(g[number][c]);
    }
    const BlockOfCotangents cotangents = mine.over_block(shared.cotangents);
    tile.origin = shared.origin;
    if (cotangents.largest == 0) {
      __syncthreads();
      continue;
    }
    const float mean = cotangents.sum / (Tile::kBlockVoxels * kChannels);
    const float largest = __uint_as_float(cotangents.largest);
    bool fits = largest <= kScatterRange * mean && largest > 1e-30f && largest < 1e30f;
    // The largest cotangent has less than 2^exponent, a target at most 8 times 2^bits of them.
    const int exponent = static_cast<int>(cotangents.largest >> 23) - 126;
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
      tile.for_each(source, space, [&](int, const Voxel& voxel, int64_t offset) {
        T g[kChannels], weight[1 << D];
        load(offset, g);
        const Vec<int, D> cell =
            source.corner_weights(source.position(voxel, source.vector(offset)), weight);
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
          const int column =
              place[0] / 2 + Quantised::kColumnsX * (place[1] / 2 + Quantised::kColumnsY * (z / 2));
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
      tile.for_each(source, space, [&](int, const Voxel& voxel, int64_t offset) {
        T g[kChannels], weight[1 << D];
        load(offset, g);
        const Vec<int, D> cell =
            source.corner_weights(source.position(voxel, source.vector(offset)), weight);
        Vec<int, D> place;
        if (is_first || tile.find(cell, place)) {
          add_directly(resampling, target, cell, channel, weight, g);
        }
      });
      __syncthreads();
      continue;
    }
    // What nobody touched may lie outside of the array.
    const int64_t row_size = resampling.map.in.size[0] * int64_t{kChannels};
    if (target.adds_four(row_size, resampling.in_layout.channel(channel))) {
      tile.template for_each_element<4>(resampling, channel, [&](int64_t place, int element) {
        const int4 quanta = *reinterpret_cast<const int4*>(shared.quanta + element);
        if ((quanta.x | quanta.y | quanta.z | quanta.w) != 0) {
          target.add_four_quanta(place, quanta, quantum);
        }
      });
    } else {
      tile.template for_each_element<1>(resampling, channel, [&](int64_t place, int element) {
        const int quanta = shared.quanta[element];
        if (quanta != 0) target.add_quanta(place, quanta, quantum);
      });
    }
    __syncthreads();
  }
}

// Float64 has no such tile: what one of integers loses, float64 would not.
template <class R>
__global__ void __launch_bounds__(kScatterThreads, 4)
    scatter_kernel(const __grid_constant__ R resampling,
                   const __grid_constant__ Operand<const typename R::S> grad_output,
                   const __grid_constant__ Operand<typename R::T> grad_input,
                   const __grid_constant__ VoxelSpace space,
                   const __grid_constant__ ScatterLaunch launch) {
  using T = typename R::T;
  constexpr int D = R::D;
  using Tile = ScatterTile<R>;
  constexpr int kChannels = Tile::kChannels;
  __shared__ alignas(16) T sums[Tile::kElements];
  __shared__ Vec<int, D> shared_origin;

  Tile tile = launch.tile<R>();
  const int64_t b = launch.batch();
  const int64_t group = space.items == 1 ? b : b / space.items;
  const int64_t item = space.items == 1 ? 0 : b - group * space.items;
  const auto source = resampling.element(group, item);
  const typename R::S* const grad = grad_output.at(group, item);
  const FloatTarget<T> target{source.plane_zero(grad_input.at(group, item))};
  if (threadIdx.x == 0) shared_origin = Tile::find_origin(source, space, tile.first);
#pragma unroll 1
  for (int channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
    Tile::clear(sums, Tile::kElements);
    __syncthreads();
    tile.origin = shared_origin;
    tile.for_each(source, space, [&](int, const Voxel& voxel, int64_t offset) {
      T g[kChannels], weight[1 << D];
      REGKERNELS_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        g[c] = to_arithmetic(grad[resampling.out_layout.at(offset, channel + c)]);
      }
      const Vec<int, D> cell =
          source.corner_weights(source.position(voxel, source.vector(offset)), weight);
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
    tile.template for_each_element<1>(resampling, channel, [&](int64_t place, int element) {
      // What nobody touched may lie outside of the array.
      if (sums[element] != 0) target.add(place, sums[element]);
    });
    __syncthreads();
  }
}

// Calls launch(grid, ScatterLaunch) until there has been a block for each tile of each batch
// element.
template <class Shape, class Launch>
void for_each_scatter_launch(const VoxelSpace& space, const Launch& launch) {
  constexpr int64_t kMost = 65535;  // blocks of a grid along y and z
  const auto tiles = [](int64_t size, int block) { return (size + block - 1) / block; };
  const int64_t tiles_x = tiles(space.x, Shape::kBlockX), tiles_y = tiles(space.y, Shape::kBlockY),
                tiles_z = tiles(space.z, Shape::kBlockZ);
  for (int64_t b = 0; b < space.batch(); b += kMost) {
    for (int64_t z = 0; z < tiles_z; z += kMost) {
      const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                      static_cast<unsigned>(std::min(tiles_z - z, kMost)),
                      static_cast<unsigned>(std::min(space.batch() - b, kMost)));
      launch(grid,
             ScatterLaunch{static_cast<int>(tiles_x), static_cast<int>(z * Shape::kBlockZ), b});
      check_launch();
    }
  }
}

template <class R>
void scatter(const Cuda& device, const VoxelSpace& space, const R& resampling,
             const Tensor& grad_output, const Tensor& grad_input,
             const ScatterWorkspace& workspace) {
  using S = typename R::S;
  using T = typename R::T;
  using Shape = typename ScatterTile<R>::Shape;
  clear(device, grad_input);
  if (space.empty()) return;
  const Operand<const S> cotangents(grad_output);
  const Operand<T> sums(grad_input);
  const auto launch = [&](auto is_fixed, const FixedSums& fixed) {
    if constexpr (sizeof(T) == 8 && decltype(is_fixed)::value) {
      for_each_voxel(device, space, FixedPointScatter<R>{resampling, cotangents, fixed, sums});
    } else {
      for_each_scatter_launch<Shape>(space, [&](const dim3& grid, const ScatterLaunch& blocks) {
        if constexpr (sizeof(T) == 4) {
          quantised_scatter_kernel<R, decltype(is_fixed)::value>
              <<<grid, kScatterThreads, 0, device.stream>>>(resampling, cotangents, sums, fixed,
                                                            space, blocks);
        } else {
          scatter_kernel<<<grid, kScatterThreads, 0, device.stream>>>(resampling, cotangents, sums,
                                                                      space, blocks);
        }
      });
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

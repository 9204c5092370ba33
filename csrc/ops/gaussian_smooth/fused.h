// One kernel smooths along all axes, as far as its shared memory and registers reach: a block owns
// a tile in x and y and walks along z. It smooths each plane along x and y on the way through
// shared memory, and adds the result, with its weights, to the planes that are still to leave,
// which wait in registers. The volume is read once (its tiles' halos from the cache), and nothing
// but the result is written.
//
// What is smoothed comes from a Source, which may compute it: `source.column(volume, z, y, x)` is
// an object that has `fetch(to, row, inside)` send the element so many rows further down, or a
// zero, to shared memory. What becomes of the result is up to a Sink, which may compute with it in
// the place of writing it: see ArraySink.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "maths/product_plus.h"
#include "ops/gaussian_smooth/call.h"

namespace regkernels {

// A block's tile, and its arrays in shared memory. Counts are of elements: a row is packed, so that
// each of a voxel's channels is a column, and a voxel's neighbours are as many columns away as
// there are channels.
struct SmoothingTile {
  int columns, rows;
  int halo_x, halo_y;  // on either side, of what is read

  REGKERNELS_HD constexpr int in_columns() const { return columns + 2 * halo_x; }
  REGKERNELS_HD constexpr int in_rows() const { return rows + 2 * halo_y; }
  // Strides are odd: threads that take neighbouring rows then read from different banks of shared
  // memory.
  REGKERNELS_HD constexpr int in_stride() const { return in_columns() | 1; }
  REGKERNELS_HD constexpr int stride() const { return columns | 1; }
  REGKERNELS_HD constexpr int in_size() const { return in_rows() * in_stride(); }
  REGKERNELS_HD constexpr int by_row_size() const { return in_rows() * stride(); }
  REGKERNELS_HD constexpr int size(int planes) const {
    return planes * in_size() + 2 * by_row_size();
  }
};

// How an instance of the kernel cuts its work.
//   kColumns, kRows: the size of the largest tile
//   kAlong, kDown: how many neighbours along x and along y one thread sums at a time
//   kPlanes: how many planes are in shared memory, of which all but one are on their way
//   kBlocks: how many blocks a multiprocessor has room for
template <int kColumns_, int kRows_, int kAlong_, int kDown_, int kPlanes_, int kBlocks_>
struct SmoothingShape {
  static constexpr int kColumns = kColumns_, kRows = kRows_, kAlong = kAlong_, kDown = kDown_;
  static constexpr int kPlanes = kPlanes_, kBlocks = kBlocks_;
  static constexpr int kThreads = kColumns * (kRows / kDown);
  static_assert(kColumns % kWarp == 0 && kRows % kDown == 0 && kPlanes >= 2);
  static_assert(kColumns % (kAlong * 2) == 0 && kColumns % (kAlong * 3) == 0,
                "strips of no channel may reach beyond a tile");
};

// The shape where the compiler knows the radius and the number of channels.
using ExactShape = SmoothingShape<96, 32, 8, 8, 3, 1>;
// The shape for any radius and number of channels. Tiles of fewer rows have room on any GPU.
template <class T>
using GeneralShape =
    std::conditional_t<std::is_same_v<T, double>, SmoothingShape<96, 8, 4, 2, 2, 1>,
                       SmoothingShape<96, 16, 4, 4, 2, 1>>;
template <class T>
inline constexpr int kLargestRadius = std::is_same_v<T, double> ? kFusedRadiusDouble : kFusedRadius;

template <class T>
struct Smoothing {
  int columns, rows, depth;  // the size of a volume
  int channels;
  int radius[3];  // along x, y, z
  T weight[3][kLargestRadius<T> + 1];
  int tiles_x, tiles;
  int64_t planes;  // in all tiles of all volumes
};

// What a thread owns of each plane of a tile: so many rows of a column, none if that is outside.
struct OwnedColumn {
  int64_t volume;
  int first;  // element of a plane
  int rows;
  int apart;  // elements from one row to the next
  int64_t plane_size;
  int column_of_tile, row_of_tile;
};

// An array in memory as a sink. All sinks have what this one has.
template <class S>
struct ArraySink {
  S* out;
  int64_t volume_size;

  // How many numbers the threads of a block share, for a tile of so many columns and rows.
  static constexpr REGKERNELS_HD int shared_size(int, int) { return 0; }

  // What a thread does with the planes of a tile of kColumns columns, of which it owns at most
  // kDown rows.
  template <int kColumns, int kDown>
  struct Writer {
    using T = Arithmetic<S>;
    const ArraySink& sink;
    __device__ __forceinline__ Writer(const ArraySink& all, int64_t, T*) : sink(all) {}
    // Some time before a plane leaves.
    __device__ __forceinline__ void expect(const OwnedColumn&, int) {}
    __device__ __forceinline__ void leave(const OwnedColumn& own, int z, const T (&sum)[kDown]) {
      S* to = sink.out + (own.volume * sink.volume_size + z * own.plane_size + own.first);
      REGKERNELS_UNROLL
      for (int k = 0; k < kDown; ++k) {
        if (k < own.rows) *to = to_storage<S>(sum[k]);
        to += own.apart;
      }
    }
    // When all threads of the block have left a plane, and none has left the next but one.
    __device__ __forceinline__ void left(int) {}
    // After the last plane of the tile.
    __device__ __forceinline__ void end() {}
  };
};

// A column of an array in memory.
template <class S>
struct PackedColumn {
  using T = Arithmetic<S>;
  const S* from;
  int columns;  // elements from one row to the next
  // Where nothing has to be converted it does not pass through registers, and arrives by the end of
  // a wait for the pipeline.
  __device__ __forceinline__ void fetch(T* to, int row, bool inside) const {
    const S* const element = from + row * columns;
    if constexpr (std::is_same_v<S, T>) {
      __pipeline_memcpy_async(to, element, sizeof(T), inside ? 0 : sizeof(T));
    } else {
      *to = inside ? to_arithmetic(*element) : T(0);
    }
  }
};

// The stage of a source that has none.
struct NoStage {
  static constexpr bool kPresent = false;
  static constexpr REGKERNELS_HD int size(const SmoothingTile&) { return 0; }
};

// An array as a source.
template <class S>
struct PackedSource {
  using Stage = NoStage;
  const S* in;
  int columns;
  int64_t plane_size, volume_size;

  __device__ __forceinline__ PackedColumn<S> column(int64_t volume, int z, int y, int x) const {
    return {in + (volume * volume_size + z * plane_size) + (y * columns + x), columns};
  }
};

// What part of a plane a tile has to fetch: so many rows and columns from the first ones on, of
// which those that are not in the plane are zero.
struct TilePart {
  int columns, rows, stride;
  int first_column, first_row;
  int plane_columns, plane_rows;
};

// Fetches it. Each thread takes every so many rows of a column, of which column(y, x) is told the
// first element.
template <int kThreads, class T, class MakeColumn>
__device__ __forceinline__ void fetch_part(const TilePart& part, int threads, T* plane,
                                           const MakeColumn& column) {
  const int width = min(threads, (part.columns + kWarp - 1) / kWarp * kWarp);
  const int thread = thread_number<kThreads>(), apart = threads / width;
  const int first_row = thread / width;
  if (first_row >= apart) return;
  for (int k = thread - first_row * width; k < part.columns; k += width) {
    const int x = part.first_column + k, y = part.first_row + first_row;
    // As an unsigned number, a negative y is a large one.
    const unsigned rows = x >= 0 && x < part.plane_columns ? part.plane_rows : 0;
    const auto from = column(y, x);
    T* const to = plane + (first_row * part.stride + k);
    REGKERNELS_UNROLL
    for (int row = 0; row < part.rows; row += apart) {
      if (first_row + row >= part.rows) break;
      from.fetch(to + row * part.stride, row, static_cast<unsigned>(y + row) < rows);
    }
  }
}

// Computes kCount neighbouring sums, each from the middle outwards. value(k) is the value in the
// middle of the k-th; the neighbours before the first have negative numbers.
template <int kUnroll, int kCount, class T, class Value>
__device__ __forceinline__ void weigh(const T* weight, int radius, const Value& value,
                                      T (&sum)[kCount]) {
  T below[kCount], above[kCount];
  REGKERNELS_UNROLL
  for (int k = 0; k < kCount; ++k) {
    below[k] = above[k] = value(k);
    sum[k] = weight[0] * below[k];
  }
#pragma unroll(kUnroll)
  for (int d = 1; d <= radius; ++d) {
    REGKERNELS_UNROLL
    for (int k = 1; k < kCount; ++k) {
      below[kCount - k] = below[kCount - k - 1];
      above[k - 1] = above[k];
    }
    below[0] = value(-d);
    above[kCount - 1] = value(kCount - 1 + d);
    REGKERNELS_UNROLL
    for (int k = 0; k < kCount; ++k) {
      // They are added one by one, as the sum of two large values may be beyond the range of T.
      sum[k] = product_plus(weight[d], below[k], sum[k]);
      sum[k] = product_plus(weight[d], above[k], sum[k]);
    }
  }
}

// Either kChannels and kRadius, which is the same along all axes, tell the compiler what to expect;
// or kChannels is 0, and kRadius is the largest radius there may be.
template <class T, class Source, class Sink, int kRadius, int kChannels, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    smooth_kernel(const __grid_constant__ Smoothing<T> smoothing,
                  const __grid_constant__ Source source, const __grid_constant__ Sink sink) {
  extern __shared__ __align__(16) unsigned char memory[];
  constexpr bool kExact = kChannels > 0;
  constexpr int kColumns = Shape::kColumns, kAlong = Shape::kAlong, kDown = Shape::kDown;
  constexpr int kUnroll = kExact ? kRadius : 4;
  const int channels = kExact ? kChannels : smoothing.channels;
  const int radius_x = kExact ? kRadius : smoothing.radius[0];
  const int radius_y = kExact ? kRadius : smoothing.radius[1];
  const int radius_z = kExact ? kRadius : smoothing.radius[2];
  const int threads = kExact ? Shape::kThreads : static_cast<int>(blockDim.x);
  const SmoothingTile tile{kColumns, threads / kColumns * kDown, radius_x * channels, radius_y};
  using Stage = typename Source::Stage;
  // A plane that has to be completed is there for one turn more.
  constexpr int kLead = Stage::kPresent ? 1 : 0, kSlots = Shape::kPlanes + kLead;
  T* const planes = reinterpret_cast<T*>(memory);
  T* const by_row = planes + kSlots * tile.in_size();
  [[maybe_unused]] T* const staged = by_row + 2 * tile.by_row_size();
  [[maybe_unused]] T* const of_sink = staged + Stage::size(tile);

  // The thread owns this column and kDown rows of the tile, through all planes.
  const auto own_column = [] { return thread_number<Shape::kThreads>() % kColumns; };
  const auto own_row = [] { return thread_number<Shape::kThreads>() / kColumns * kDown; };

  const int64_t plane_size = static_cast<int64_t>(smoothing.rows) * smoothing.columns;
  // The planes of all tiles, one tile after the other, are cut into parts of equal length, one for
  // each block.
  int64_t next = blockIdx.x * smoothing.planes / gridDim.x;
  const int64_t last = (blockIdx.x + 1) * smoothing.planes / gridDim.x;
#pragma unroll 1
  while (next < last) {
    const int64_t tile_number = next / smoothing.depth;
    const int z_begin = static_cast<int>(next - tile_number * smoothing.depth);
    const int z_end = static_cast<int>(min(int64_t{smoothing.depth}, z_begin + last - next));
    next += z_end - z_begin;
    const int64_t volume = tile_number / smoothing.tiles;
    const int in_volume = static_cast<int>(tile_number - volume * smoothing.tiles);
    const int tile_y = in_volume / smoothing.tiles_x;
    const int x0 = (in_volume - tile_y * smoothing.tiles_x) * kColumns, y0 = tile_y * tile.rows;

    const auto fetch_plane = [&](int z, T* plane) {
      const TilePart part{tile.in_columns(), tile.in_rows(),    tile.in_stride(), x0 - tile.halo_x,
                          y0 - tile.halo_y,  smoothing.columns, smoothing.rows};
      fetch_part<Shape::kThreads>(part, threads, plane,
                                  [&](int y, int x) { return source.column(volume, z, y, x); });
    };

    const auto smooth_rows = [&](const T* plane, T* smoothed) {
      for (int i = thread_number<Shape::kThreads>(); i < tile.in_rows() * (kColumns / kAlong);
           i += threads) {
        const int strip = i / tile.in_rows(), row = i - strip * tile.in_rows();
        const int along = strip / channels, channel = strip - along * channels;
        const int first = along * (kAlong * channels) + channel;
        const T* from = plane + row * tile.in_stride() + tile.halo_x + first;
        T sum[kAlong];
        weigh<kUnroll>(
            smoothing.weight[0], radius_x, [&](int k) { return from[k * channels]; }, sum);
        T* to = smoothed + row * tile.stride() + first;
        REGKERNELS_UNROLL
        for (int k = 0; k < kAlong; ++k) to[k * channels] = sum[k];
      }
    };

    // What the planes so far contribute to those that leave next.
    T pending[2 * kRadius][kDown] = {};
    // Made anew where it is asked for, so that nobody has to keep it.
    const auto owned = [&]() -> OwnedColumn {
      const int x = x0 + own_column(), y = y0 + own_row();
      return {volume,
              y * smoothing.columns + x,
              x < smoothing.columns ? min(kDown, smoothing.rows - y) : 0,
              smoothing.columns,
              plane_size,
              own_column(),
              own_row()};
    };
    typename Sink::template Writer<kColumns, kDown> writer(sink, volume, of_sink);
    const auto add_plane = [&](int z, const T(&value)[kDown]) {
      REGKERNELS_UNROLL
      for (int step = 0; step <= 2 * kRadius; ++step) {
        const int distance = step < kRadius ? kRadius - step : step - kRadius;
        T sum[kDown];
        REGKERNELS_UNROLL
        for (int k = 0; k < kDown; ++k) {
          sum[k] = step < 2 * kRadius ? pending[step % (2 * kRadius)][k] : T(0);
          // A plane out of reach is left out: a weight of 0 would spread infinities.
          if (distance <= radius_z) {
            sum[k] = product_plus(smoothing.weight[2][distance], value[k], sum[k]);
          }
          if (step > 0) pending[step - 1][k] = sum[k];
        }
        if (step == 0 && z - kRadius >= z_begin) writer.leave(owned(), z - kRadius, sum);
      }
    };

    // The planes that count are numbered from the first. Those beyond are zero.
    const int z_first = max(0, z_begin - radius_z), z_last = min(smoothing.depth, z_end + radius_z);
    const auto place_of = [&](int plane) {
      return planes + static_cast<unsigned>(plane) % kSlots * tile.in_size();
    };
    const auto by_row_of = [&](int plane) { return by_row + (plane & 1) * tile.by_row_size(); };
    const int count = z_last - z_first;
    [[maybe_unused]] const auto stage = [&] {
      if constexpr (Stage::kPresent) {
        return Stage(source, tile, staged, volume, x0, y0, z_first);
      }
    };
    const auto fetch_ahead = [&](int plane) {
      if (plane < count) {
        if constexpr (Stage::kPresent) {
          stage().fetch(plane);
          if (source.adds()) fetch_plane(z_first + plane, place_of(plane));
        } else {
          fetch_plane(z_first + plane, place_of(plane));
        }
      }
      __pipeline_commit();
    };
    if constexpr (Stage::kPresent) stage().begin();
    for (int plane = 0; plane < Shape::kPlanes - 1; ++plane) fetch_ahead(plane);
    __pipeline_wait_prior(Shape::kPlanes - 2);
    __syncthreads();
    // Between barriers a plane is completed, if it has to be, the one before is smoothed along its
    // rows, and the one before that along its columns.
#pragma unroll 1
    for (int plane = -1 - kLead; plane < z_end - z_first + kRadius; ++plane) {
      fetch_ahead(plane + kSlots);
      if constexpr (Stage::kPresent) {
        if (plane + 2 < count) stage().complete(plane + 2, place_of(plane + 2));
        if (plane + 1 < 0) {
          __pipeline_wait_prior(Shape::kPlanes - 2);
          __syncthreads();
          continue;
        }
      }
      const int leaving = z_first + plane - kRadius;
      if (leaving > z_begin) writer.left(leaving - 1);
      if (leaving >= z_begin) writer.expect(owned(), leaving);
      if (plane + 1 < count) smooth_rows(place_of(plane + 1), by_row_of(plane + 1));
      if (plane >= 0) {
        T sum[kDown] = {};
        if (plane < count) {
          const T* from =
              by_row_of(plane) + (own_row() + tile.halo_y) * tile.stride() + own_column();
          weigh<kUnroll>(
              smoothing.weight[1], radius_y, [&](int k) { return from[k * tile.stride()]; }, sum);
        }
        add_plane(z_first + plane, sum);
      }
      __pipeline_wait_prior(Shape::kPlanes - 2);
      __syncthreads();
    }
    writer.left(z_end - 1);
    writer.end();
  }
}

template <int kRadius, int kChannels, class Shape, class Source, class Sink, class T>
void launch_smooth(const Cuda& device, const Source& source, const Sink& sink,
                   Smoothing<T>& smoothing, const SmoothingTile& tile, int64_t volumes,
                   int64_t bytes) {
  smoothing.tiles_x = (smoothing.columns + tile.columns - 1) / tile.columns;
  smoothing.tiles = smoothing.tiles_x * ((smoothing.rows + tile.rows - 1) / tile.rows);
  smoothing.planes = volumes * smoothing.tiles * smoothing.depth;
  const auto kernel = &smooth_kernel<T, Source, Sink, kRadius, kChannels, Shape>;
  allow_shared_memory(kernel, bytes);
  // The result does not depend on how many blocks there are, so the device may be asked.
  const int64_t blocks = std::min<int64_t>(smoothing.planes, multiprocessors() * Shape::kBlocks);
  const int threads = tile.columns * (tile.rows / Shape::kDown);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, device.stream>>>(smoothing, source, sink);
  check_launch();
}

// Launches the kernel for this radius and number of channels if they are those of the call, along
// all axes, and the tile fits. Returns whether it did.
template <int kRadius, int kChannels, class Shape, class Source, class Sink, class T>
bool launch_exact(const Cuda& device, const Source& source, const Sink& sink,
                  Smoothing<T>& smoothing, int64_t volumes, int64_t limit) {
  const int* radius = smoothing.radius;
  using Stage = typename Source::Stage;
  constexpr SmoothingTile kTile{Shape::kColumns, Shape::kRows, kRadius * kChannels, kRadius};
  constexpr int64_t kBytes =
      (kTile.size(Shape::kPlanes + (Stage::kPresent ? 1 : 0)) + Stage::size(kTile) +
       Sink::shared_size(Shape::kColumns, Shape::kRows)) *
      sizeof(T);
  if (smoothing.channels != kChannels || radius[0] != kRadius || radius[1] != kRadius ||
      radius[2] != kRadius || kBytes > limit) {
    return false;
  }
  launch_smooth<kRadius, kChannels, Shape>(device, source, sink, smoothing, kTile, volumes, kBytes);
  return true;
}

template <class Source, class Sink, class T>
void launch_general(const Cuda& device, const Source& source, const Sink& sink,
                    Smoothing<T>& smoothing, int64_t volumes, int64_t limit) {
  using Shape = GeneralShape<T>;
  constexpr int kRadius = kLargestRadius<T>;
  constexpr SmoothingTile kWorst{Shape::kColumns, Shape::kDown, kRadius * kFusedChannels, kRadius};
  static_assert(
      (kWorst.size(Shape::kPlanes) + Sink::shared_size(kWorst.columns, kWorst.rows)) * sizeof(T) <=
          99 * 1024,
      "no GPU since 2020 gives a block less");
  SmoothingTile tile{Shape::kColumns, Shape::kRows, smoothing.radius[0] * smoothing.channels,
                     smoothing.radius[1]};
  const auto bytes = [&] {
    return (tile.size(Shape::kPlanes) + Sink::shared_size(tile.columns, tile.rows)) *
           static_cast<int64_t>(sizeof(T));
  };
  while (tile.rows > Shape::kDown && bytes() > limit) tile.rows -= Shape::kDown;
  launch_smooth<kRadius, 0, Shape>(device, source, sink, smoothing, tile, volumes, bytes());
}

// What all instances of the kernel are told.
template <class T>
Smoothing<T> make_smoothing(const GaussianSmoothCall& call) {
  Smoothing<T> smoothing{};
  smoothing.columns = static_cast<int>(call.sizes.x * call.channels);
  smoothing.rows = static_cast<int>(call.sizes.y);
  smoothing.depth = static_cast<int>(call.sizes.z);
  smoothing.channels = static_cast<int>(call.channels);
  for (T(&weight)[kLargestRadius<T> + 1] : smoothing.weight) weight[0] = 1;
  for (const SmoothingPass& pass : call.passes) {
    smoothing.radius[pass.axis] = static_cast<int>(pass.radius);
    for (int d = 0; d <= pass.radius; ++d) {
      smoothing.weight[pass.axis][d] = gaussian_weight<T>(pass, d);
    }
  }
  return smoothing;
}

}  // namespace regkernels

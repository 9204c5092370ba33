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
// of a multiprocessor. kLanes: voxels of a warp. Fewer than it has lanes are seldom further apart
// than there are banks, where a displacement stretches them.
template <int kPlanes, int kNumbers, int kBlocks, int kLanes = kWarp>
struct CubicTiling {
  static constexpr int kDepth = kPlanes;
  static constexpr int kRow = kNumbers;
  static constexpr int kMinBlocks = kBlocks;
  static constexpr int kWidth = kLanes;
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

// As first_tap, of a position nearer to 0 than kFarthest, without units that convert four numbers a
// cycle: between 2^23 and 2^24 there are whole numbers alone, and the bits of one count them.
inline constexpr int kFarthest = 1 << 22;
inline __device__ int near_first_tap(float position, float& fraction) {
  constexpr float kWhole = 3 * kFarthest;
  constexpr int kBits = 0x4b400000;  // of kWhole
  const float below = __fadd_rd(position, kWhole);
  fraction = position - (below - kWhole);
  return __float_as_int(below) - (kBits + 1);
}
inline __device__ int near_first_tap(double position, double& fraction) {
  return first_tap(position, fraction);
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
  __device__ void add(const Vec<T, 3>& lowest, const Vec<T, 3>& highest, bool known,
                      const Limits<T>& limits) {
    REGKERNELS_UNROLL
    for (int axis = 0; axis < 3; ++axis) {
      const TapLimits<T>& limit = limits.axis[axis];
      T fraction;
      int first = near_first_tap(known ? limits.clamped(lowest[axis], axis) : limit.low, fraction);
      int last = near_first_tap(known ? limits.clamped(highest[axis], axis) : limit.high, fraction);
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
      low[axis] = near_first_tap(known ? limits.clamped(lowest[axis], axis) : limit.low, fraction);
      high[axis] =
          near_first_tap(known ? limits.clamped(highest[axis], axis) : limit.high, fraction);
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
    const int count = size(1) * size(2);
    const auto write = [&](int row, int e) {
      constexpr int kBelow = 8;  // voxels that a box may begin before the array, and more
      const int index = (before + e + kBelow * kPixel) / kPixel - kBelow;
      const int x = continued_index(index, boundary.size[0], boundary.sampling);
      const T* const line = from[row];
      if (line != nullptr && x >= 0 && x == index) return;
      const int channel = before + e - index * kPixel;
      data[row * kRow + e] = line != nullptr && x >= 0 ? line[x * kPixel + channel] : T(0);
    };
    if (within(boundary, 1) && within(boundary, 2)) {
      // Few numbers of each row: a warp takes eight of four rows.
      constexpr int kColumns = 8, kRows = kWarp / kColumns;
      const int below = max(-before, 0);
      const int above = min(max(boundary.size[0] * kPixel - before, below), length);
      for (int k = threadIdx.x % kColumns; k < below + length - above; k += kColumns) {
        const int first = threadIdx.y * kRows + threadIdx.x / kColumns;
        for (int row = first; row < count; row += kRowsPerBlock * kRows) {
          write(row, k < below ? k : above + k - below);
        }
      }
    } else {
      for (int e = threadIdx.x; e < length; e += kWarp) {
        for (int row = threadIdx.y; row < count; row += kRowsPerBlock) write(row, e);
      }
    }
  }
  // Whether nothing has to be continued, along axis 1 or 2 and at all.
  __device__ bool within(const Boundary<T, 3>& boundary, int axis) const {
    return begin(axis) >= 0 && begin(axis) + size(axis) <= boundary.size[axis];
  }
  __device__ bool within(const Boundary<T, 3>& boundary) const {
    return row_begin() >= 0 && row_begin() + row_length() <= boundary.size[0] * kPixel &&
           within(boundary, 1) && within(boundary, 2);
  }
  // Sends all of it, if that is so: half a warp takes the rows with the same place along y.
  template <int kCount>
  __device__ void fetch_within(const Source& source, int channel, T* data) const {
    constexpr int kHalf = kWarp / 2;
    const int lane = threadIdx.x % kHalf * kCount;
    const int half = threadIdx.y * 2 + threadIdx.x / kHalf;
    const int64_t* const stride = source.self->stride;
    const int length = row_length(), step = this->step();
    for (int j = half; j < size(1); j += 2 * kRowsPerBlock) {
      const int64_t offset = (begin(1) + j) * stride[1] + begin(2) * stride[2];
      const T* from = source.input + source.self->in_layout.channel(channel) + offset * kPixel +
                      (row_begin() + lane);
      T* to = data + j * kRow + lane;
      for (int k = size(2); k > 0; --k) {
        REGKERNELS_UNROLL
        for (int e = 0; e < kRow; e += kHalf * kCount) {
          if (lane + e < length) __pipeline_memcpy_async(to + e, from + e, kCount * sizeof(T));
        }
        from += stride[2] * kPixel;
        to += step;
      }
    }
    __pipeline_commit();
  }
  // Calls body with how many numbers may be sent at a time.
  template <class Body>
  static __device__ void with_count(const Source& source, const Body& body) {
    // All rows begin at 16 bytes if the first does and their lengths are multiples of that.
    const bool aligned =
        source.self->stride[1] % 4 == 0 && reinterpret_cast<uintptr_t>(source.input) % 16 == 0;
    if (aligned) {
      body(IntTag<16 / sizeof(T)>{});
    } else {
      body(IntTag<1>{});
    }
  }
  // Loads the channels that lie side by side, from `channel` on. As in find_rows, all threads of
  // the block have to take part, and to wait for each other afterwards.
  __device__ void load(const Source& source, int channel, T* data) {
    const auto& boundary = source.self->boundary;
    if (within(boundary)) {
      with_count(source,
                 [&](auto count) { fetch_within<decltype(count)::value>(source, channel, data); });
    } else {
      find_rows(source, channel);
      __syncthreads();
      with_count(source, [&](auto count) { fetch<decltype(count)::value>(source, data); });
      go_on(boundary, data);
    }
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
      first[axis] = near_first_tap(position[axis], fraction[axis]);
      // What near_first_tap subtracts is not to become a part of each of so many addresses.
      if (kPixel > 1) asm("" : "+r"(first[axis]));
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

// The positions of voxels that lie one behind the other, along z.
template <class R>
struct Column {
  using T = typename R::T;
  static constexpr bool kByAxis = R::kField && !R::kAffine;

  const typename R::Element& source;
  int x, y;
  T flat[2];  // by axis: where x and y are

  __device__ Column(const typename R::Element& element, int place_x, int place_y)
      : source(element), x(place_x), y(place_y) {
    if constexpr (kByAxis) {
      flat[0] = source.self->map.undisplaced(0, x);
      flat[1] = source.self->map.undisplaced(1, y);
    }
  }
  __device__ Vec<T, 3> position(int z, const Vec<T, 3>& u) const {
    const auto& map = source.self->map;
    if constexpr (kByAxis) {
      return {map.displaced(0, flat[0], u[0]), map.displaced(1, flat[1], u[1]),
              map.displaced(2, map.undisplaced(2, z), u[2])};
    } else {
      return map.template position<R::kField, true>(source.item, {x, y, z}, u);
    }
  }
};

// Their vectors, of a field that is there.
template <class R, bool kPacked>
struct ColumnVectors {
  using T = typename R::T;

  const R& resampling;
  const T* next = nullptr;
  int64_t step = 0;  // numbers from one to the next
  int left;          // of them

  __device__ ColumnVectors(const R& self, const T* field, const Voxel& first, int count,
                           int64_t plane)
      : resampling(self), step(plane), left(count) {
    if (!R::kField) return;
    next = field + (first.row(self.map.out.size) + first.x) * numbers(self);
  }
  // Of a voxel.
  static REGKERNELS_HD int64_t numbers(const R& resampling) {
    return kPacked ? 3 : resampling.field_layout.voxel;
  }
  __device__ Vec<T, 3> load(const T* at) const {
    if constexpr (kPacked) return load_vec<T, 3>(at);
    return resampling.field_layout.load(at, 0);
  }
  // The last one again if there are no more.
  __device__ Vec<T, 3> load() {
    if (!R::kField) return {};
    const T* const at = next;
    if (--left > 0) next += step;
    return load(at);
  }
  // Loads so many, all of which are on their way at once.
  template <int kCount>
  __device__ void load(Vec<T, 3> (&vector)[kCount]) const {
    const T* at = next;
    REGKERNELS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      vector[i] = load(at);
      if (i + 1 < left) at += step;
    }
  }
};

// Samples a voxel from memory: where a block's samples lie too far apart for its shared memory.
template <class Forward>
__device__ __noinline__ void sample_alone(const Forward& body, int64_t group, int64_t item,
                                          const Voxel& voxel) {
  body.element(group, item)(voxel);
}

// From plane to plane of what a launch reads and writes, in numbers.
struct PlaneSteps {
  int64_t vectors, output;
};

// The tiles along z. The last ones are half as deep, so that multiprocessors end at about the same
// time.
struct DepthTiles {
  int whole, halves;

  // For so many voxels along z. How many tiles along z run at a time decides about the ends of a
  // single volume; of several, others go on meanwhile.
  DepthTiles(int voxels, int depth, double at_a_time, bool single) {
    const double share = single ? 0.25 : 0;  // of what runs at a time
    whole = std::max(0, static_cast<int>(1.0 * voxels / depth - share * at_a_time));
    halves = (voxels - whole * depth + half(depth) - 1) / half(depth);
  }
  static REGKERNELS_HD int half(int depth) { return (depth + 1) / 2; }
  REGKERNELS_HD int count() const { return whole + halves; }
  REGKERNELS_HD int depth(int tile, int most) const { return tile < whole ? most : half(most); }
  REGKERNELS_HD int begin(int tile, int most) const {
    return tile < whole ? tile * most : whole * most + (tile - whole) * half(most);
  }
};

// A block finds the box of its samples, fetches it, and samples it. There are several blocks on a
// multiprocessor, of which some sample while others fetch.
template <class Forward, class Tiling, bool kPacked, class T = typename Forward::T>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kMinBlocks)
    cubic_tiles_kernel(const __grid_constant__ Forward body,
                       const __grid_constant__ VoxelSpace space,
                       const __grid_constant__ Limits<T> limits,
                       const __grid_constant__ PlaneSteps steps,
                       const __grid_constant__ DepthTiles tiles, int max_rows) {
  using R = decltype(body.resampling);
  constexpr int kPixel = R::Layout::kPixel;
  constexpr int kDepth = Tiling::kDepth;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ CubicBox<R, Tiling> box;
  T* const data = reinterpret_cast<T*>(shared);

  const int tile_x = blockIdx.x * Tiling::kWidth, tile_y = blockIdx.y * kRowsPerBlock;
  const int end_x = min(tile_x + Tiling::kWidth, space.x);
  const int x = min(tile_x + threadIdx.x, end_x - 1);
  const int y = min(tile_y + threadIdx.y, space.y - 1);
  unsigned tile_z = blockIdx.z, group = 0, item = 0;
  if (gridDim.z > tiles.count()) {
    group = tile_z / tiles.count();
    tile_z -= group * tiles.count();
    const unsigned items = static_cast<unsigned>(space.items);
    item = group % items;
    group /= items;
  }
  const int begin = tiles.begin(tile_z, kDepth);
  const int end = min(begin + tiles.depth(tile_z, kDepth), space.z);
  const bool has_row = tile_y + threadIdx.y < space.y;
  const auto voxel_at = [&](int z) {
    return Voxel{z, y, x, tile_x + threadIdx.x < end_x, tile_x, end_x};
  };
  unsigned alone = 0;  // a bit for each plane whose samples lie too far apart
  int most = kDepth;   // planes for which a box is looked for
  for (int z = begin, planes; z < end; z += planes) {
    planes = min(most, end - z);
    const auto element = body.element(group, item);
    const auto vectors = [&] {
      return ColumnVectors<R, kPacked>(body.resampling, element.source.field, voxel_at(z), planes,
                                       steps.vectors);
    };
    const Column<R> column(element.source, x, y);
    __syncthreads();  // the box before is not needed any more
    if constexpr (R::kField) {
      if (threadIdx.y == 0 && threadIdx.x < 3) box.begin_empty(threadIdx.x);
      __syncthreads();
      Vec<T, 3> u[kDepth];
      vectors().load(u);
      Vec<T, 3> lowest, highest;
      bool known = true;
      REGKERNELS_UNROLL
      for (int i = 0; i < kDepth; ++i) {
        const Vec<T, 3> p = column.position(z + min(i, planes - 1), u[i]);
        REGKERNELS_UNROLL
        for (int axis = 0; axis < 3; ++axis) {
          known = known & (p[axis] == p[axis]);
          lowest[axis] = i == 0 ? p[axis] : fmin(lowest[axis], p[axis]);
          highest[axis] = i == 0 ? p[axis] : fmax(highest[axis], p[axis]);
        }
      }
      box.add(lowest, highest, known, limits);
    } else if (threadIdx.y == 0 && threadIdx.x == 0) {
      Vec<T, 3> lowest, highest;
      const Vec<int, 3> first{tile_x, tile_y, z};
      const Vec<int, 3> last{end_x - 1, min(tile_y + kRowsPerBlock, space.y) - 1, z + planes - 1};
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
      alone |= ((1u << planes) - 1) << (z - begin);
      continue;
    }
    const int channels = R::Layout::kLast ? 1 : body.resampling.in_layout.count();
    for (int channel = 0; channel < channels; ++channel) {
      if (channel > 0) __syncthreads();
      box.load(element.source, channel, data);
      __syncthreads();
      if (!has_row) continue;
      const int step = box.step(), origin = box.origin();
      const Voxel first = voxel_at(z);
      T* target = element.output + first.row(body.resampling.map.out.size) * kPixel +
                  body.resampling.out_layout.channel(channel);
      ColumnVectors<R, kPacked> ahead = vectors();
      Vec<T, 3> next = ahead.load();
      REGKERNELS_NO_UNROLL
      for (int i = 0; i < planes; ++i) {
        const Vec<T, 3> u = next;
        next = ahead.load();
        Vec<T, 3> p = column.position(z + i, u);
        REGKERNELS_UNROLL
        for (int axis = 0; axis < 3; ++axis) p[axis] = limits.clamped(p[axis], axis);
        T value[kPixel];
        box.values(data, origin, step, p, body.resampling.boundary.sampling.mode, value);
        if constexpr (R::Layout::kLast) {
          Vec<T, 3> sum;
          REGKERNELS_UNROLL
          for (int k = 0; k < 3; ++k) sum[k] = value[k] + (body.add_field ? u[k] : T(0));
          store_packed(target, first, sum);
        } else {
          if (first.active) target[x] = value[0];
        }
        target += steps.output;
      }
    }
  }
  if (alone == 0) return;
  // This comes last, as a call in between would cost the other samples registers.
  REGKERNELS_NO_UNROLL
  for (int i = 0; i < end - begin; ++i) {
    if (has_row && (alone >> i & 1)) sample_alone(body, group, item, voxel_at(begin + i));
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

// Along y and along z a grid has no more blocks than that.
inline constexpr int64_t kMostBlocks = 65535;

template <class Tiling, bool kPacked, class Forward>
void launch_cubic_tiles(const Cuda& device, const VoxelSpace& space, const Forward& body) {
  using T = typename Forward::T;
  using R = decltype(body.resampling);
  const auto& boundary = body.resampling.boundary;
  Limits<T> limits;
  for (int axis = 0; axis < 3; ++axis) {
    limits.axis[axis] = tap_limits<T>(boundary.size[axis], boundary.sampling);
  }
  const int64_t plane = static_cast<int64_t>(space.y) * space.x;
  const PlaneSteps steps{plane * ColumnVectors<R, kPacked>::numbers(body.resampling),
                         plane * R::Layout::kPixel};
  const auto kernel = cubic_tiles_kernel<Forward, Tiling, kPacked>;
  const int64_t bytes = box_bytes(kernel, Tiling::kMinBlocks);
  const int64_t rows = bytes / static_cast<int64_t>(Tiling::kRow * sizeof(T));
  allow_shared_memory(kernel, bytes);
  const auto tiles = [](int voxels, int each) { return (voxels + each - 1) / each; };
  const int tiles_x = tiles(space.x, Tiling::kWidth), tiles_y = tiles(space.y, kRowsPerBlock);
  const double at_a_time = 1.0 * multiprocessors() * Tiling::kMinBlocks / tiles_x / tiles_y;
  const DepthTiles tiles_z(space.z, Tiling::kDepth, at_a_time, space.batch() == 1);
  const dim3 grid(tiles_x, tiles_y, static_cast<unsigned>(tiles_z.count() * space.batch()));
  const dim3 block(kWarp, kRowsPerBlock);
  constexpr int64_t kMaxRows = CubicBox<R, Tiling>::kMaxRows;
  kernel<<<grid, block, bytes, device.stream>>>(body, space, limits, steps, tiles_z,
                                                static_cast<int>(std::min(rows, kMaxRows)));
  check_launch();
}
template <class Tiling, class Forward>
void launch_cubic_tiles(const Cuda& device, const VoxelSpace& space, const Forward& body) {
  using R = decltype(body.resampling);
  if constexpr (R::kField && !R::Layout::kLast) {
    if (!body.resampling.field_is_packed()) {
      return launch_cubic_tiles<Tiling, false>(device, space, body);
    }
  }
  launch_cubic_tiles<Tiling, true>(device, space, body);
}

// How cubic samples are computed: by tiles where that is faster. In 2-D there is little to share,
// and where positions are reflected, or slabs do not have all planes, not every box is one.
template <class R>
void sample_voxels(const Cuda& device, const VoxelSpace& space, const CubicForward<R>& body) {
  if constexpr (R::D == 3 && !R::kSlab && std::is_same_v<typename R::S, typename R::T>) {
    const auto& boundary = body.resampling.boundary;
    bool tiles = boundary.sampling.padding != Padding::kReflection && !space.empty();
    tiles = tiles && space.y / kRowsPerBlock < kMostBlocks && space.z * space.batch() < kMostBlocks;
    if (R::kField) tiles = tiles && body.resampling.field.data != nullptr;
    for (int size : boundary.size) {
      tiles = tiles && !is_constant_axis(size, boundary.sampling) && size < kFarthest - kTaps;
    }
    if (tiles) {
      constexpr int kWidth = sizeof(typename R::T) / 4;
      if constexpr (R::Layout::kLast) {
        launch_cubic_tiles<CubicTiling<8, 128, 2 / kWidth, 28>>(device, space, body);
      } else if constexpr (R::kField) {
        launch_cubic_tiles<CubicTiling<8, 64, kWidth == 1 ? 3 : 2>>(device, space, body);
      } else {
        launch_cubic_tiles<CubicTiling<8, 64, 4 / kWidth>>(device, space, body);
      }
      return;
    }
  }
  for_each_voxel(device, space, body);
}

}  // namespace regkernels

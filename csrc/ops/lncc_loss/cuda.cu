// One kernel does it all for windows up to 9: a block owns a tile in x and y and walks along z. For
// each plane it computes the window sums of the images, from them the correlations and the adjoint
// fields, and the adjoint fields' sums within the plane; the last few planes of those wait in
// shared memory until the window is complete and the gradient of a plane can leave. Each image is
// read from memory once (and then from cache), and nothing but the gradients is written.
//
// Larger windows have no room for that. They, and float64, go by way of sums in memory:
// passes_cuda.h.
#include <algorithm>
#include <limits>

#include "core/for_each.h"
#include "core/reduce.h"
#include "maths/vec.h"
#include "ops/lncc_loss/call.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/lncc_loss/passes_cuda.h"
#include "ops/lncc_loss/tiles.h"
#include "ops/losses/finish.h"

namespace regkernels {

namespace {

constexpr int kThreads = 512;
// The axes that a window has weights for.
constexpr int kRow = 0, kColumn = 1, kDepthAxis = 2;
constexpr int kStrip = kLnccStrip, kColumnStrip = kLnccColumnStrip;

// An opaque_pointer to global memory. Without this the compiler would forget which kind of memory
// it points to.
template <class T>
__device__ __forceinline__ T* opaque_global_pointer(T* pointer) {
  pointer = opaque_pointer(pointer);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// The arguments of the kernels.
template <class T>
struct LnccArguments {
  Window<T> window;
  LnccTile tile;
  Channels<const T> image_i, image_j, mask, cotangent;
  Channels<T> grad_i, grad_j, map;
  bool sum_i, sum_j;
  int groups, items, channels;
  bool items_together;  // a block takes all items of its group, one after the other
  int nx, ny, nz;
  int tiles_x, tiles;
  int64_t planes;     // in all columns of a group
  T scale;            // multiplies the gradient
  const T* mask_sum;  // (G) divides the scale; or null
  T* partial_sums;    // (G, kLnccMaxParts) sums of the correlations; or null
};

template <class T>
__device__ __forceinline__ void load_strip(const T* from, T* to) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  } else {
    REGKERNELS_UNROLL
    for (int i = 0; i < kStrip; ++i) to[i] = from[i];
  }
}

// Computes kCount neighbouring window sums from the values that they span. The windows of boxes all
// hold the value numbered kWindow - 1: each sum is one that ends there plus one that begins behind
// it, both shared with its neighbours.
template <int kAxis, int kWindow, bool kBox, int kCount, class T>
__device__ __forceinline__ void sum_windows(const Window<T>& window,
                                            const T (&value)[kCount + kWindow - 1],
                                            T (&sum)[kCount]) {
  if constexpr (kBox) {
    static_assert(kCount <= kWindow + 1, "windows that have no value in common");
    T before = value[kWindow - 1];
    REGKERNELS_UNROLL
    for (int s = kWindow - 1; s >= 0; --s) {
      if (s < kWindow - 1) before += value[s];
      if (s < kCount) sum[s] = before;
    }
    T behind = value[kWindow];
    REGKERNELS_UNROLL
    for (int s = 1; s < kCount; ++s) {
      if (s > 1) behind += value[kWindow - 1 + s];
      sum[s] = s < kWindow ? sum[s] + behind : behind;
    }
  } else {
    constexpr int kRadius = kWindow / 2;
    REGKERNELS_UNROLL
    for (int s = 0; s < kCount; ++s) {
      sum[s] = window.weight[kAxis][0] * value[s + kRadius];
      REGKERNELS_UNROLL
      for (int d = 1; d <= kRadius; ++d) {
        sum[s] += window.weight[kAxis][d] * (value[s + kRadius - d] + value[s + kRadius + d]);
      }
    }
  }
}

// Computes window sums along the rows of `planes` arrays of `rows` rows each, from `in` to `out`.
template <int kWindow, bool kBox, class T>
__device__ __forceinline__ void sum_rows(const Window<T>& window, int planes, int rows, const T* in,
                                         int in_stride, T* out, int out_stride, int width) {
  constexpr int kValues = kStrip + kWindow - 1;
  const int strips = (width + kStrip - 1) / kStrip;
  for (int i = thread_number<kThreads>(); i < rows * strips; i += kThreads) {
    const int strip = i / rows, row = i - strip * rows, first = strip * kStrip;
    for (int plane = 0; plane < planes; ++plane) {
      const T* from = in + (plane * rows + row) * in_stride + first;
      alignas(16) T loaded[(kValues + kStrip - 1) / kStrip * kStrip];
      REGKERNELS_UNROLL
      for (int k = 0; k < kValues; k += kStrip) load_strip(from + k, loaded + k);
      T value[kValues];
      REGKERNELS_UNROLL
      for (int k = 0; k < kValues; ++k) value[k] = loaded[k];
      alignas(16) T sum[kStrip];
      sum_windows<kRow, kWindow, kBox>(window, value, sum);
      load_strip(sum, out + (plane * rows + row) * out_stride + first);
    }
  }
}

// Computes window sums along a column for kCount consecutive rows from `in` on.
template <int kWindow, bool kBox, int kCount, class T>
__device__ __forceinline__ void sum_column(const Window<T>& window, const T* in, int stride,
                                           T (&sum)[kCount]) {
  T value[kCount + kWindow - 1];
  REGKERNELS_UNROLL
  for (int k = 0; k < kCount + kWindow - 1; ++k) value[k] = in[k * stride];
  sum_windows<kColumn, kWindow, kBox>(window, value, sum);
}

// A value that is typical of an image about a tile in the planes from z_first on and before z_stop,
// of which some may be outside, the same for all threads.
template <class T>
__device__ T typical(const LnccArguments<T>& arguments, const T* image, int x0, int y0, int z_first,
                     int z_stop, const LnccTile& tile, T* shared) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x, around = tile.halo() + tile.radius;
    // The values are evenly spread over what the block reads of the image.
    const int x_low = max(x0 - around, 0), y_low = max(y0 - around, 0), z_low = max(z_first, 0);
    const int columns = min(x0 + tile.columns + around, arguments.nx) - x_low,
              rows = min(y0 + tile.rows + around, arguments.ny) - y_low,
              planes = min(z_stop, arguments.nz) - z_low;
    const int x = x_low + (2 * (lane % 8) + 1) * columns / 16;
    const int y = y_low + (2 * (lane / 8) + 1) * rows / 8;
    constexpr int kSamples = 4;  // of a lane, each a quarter of the planes after the one before
    T sum = 0, zeros = 0;
    REGKERNELS_NO_UNROLL
    for (int k = 0; k < kSamples; ++k) {
      const int place = (lane * 5 + k * (kWarp / kSamples)) % kWarp;
      const int64_t z = z_low + (2 * place + 1) * static_cast<int64_t>(planes) / (2 * kWarp);
      const T value = image[(z * arguments.ny + y) * arguments.nx + x];
      sum += isfinite(value) ? value / (kSamples * kWarp) : T(0);
      zeros += value == 0 ? T(1) : T(0);
    }
    sum = warp_sum(sum);
    if (fades_to_zero(warp_sum(zeros), T(kSamples * kWarp))) sum = 0;
    if (lane == 0) *shared = sum;
  }
  __syncthreads();
  const T result = *shared;
  __syncthreads();
  return pivot_near(result, arguments.window);
}

// The values of one column, relative to the pivots, in the planes that the small windows of kAhead
// neighbouring planes span.
template <class T, int kDepth, int kAhead>
struct DepthRing {
  static constexpr int kPlanes = kDepth + kAhead - 1;
  T i[kPlanes], j[kPlanes];

  __device__ __forceinline__ void push(const T (&fresh_i)[kAhead], const T (&fresh_j)[kAhead]) {
    REGKERNELS_UNROLL
    for (int d = 0; d < kPlanes; ++d) {
      i[d] = d + kAhead < kPlanes ? i[d + kAhead] : fresh_i[d + kAhead - kPlanes];
      j[d] = d + kAhead < kPlanes ? j[d + kAhead] : fresh_j[d + kAhead - kPlanes];
    }
  }
};

// One block's part of the work. Its phases, between barriers, for one plane after the other:
//   sums along z of values and products                 (images -> by_depth)
//   sums along rows                                     (by_depth -> by_row)
//   sums along columns, correlations, adjoint fields    (by_row -> adjoint)
//   sums of those along rows                            (adjoint -> adjoint_by_row)
//   sums along columns, and along z; gradients          (adjoint_by_row -> ring -> memory)
// The first two run ahead by a plane and share their barriers with the last two.
//
// kWindow is the size of the window; kDepth is its size along z, which is 1 in 2-D.
template <class T, int kWindow, int kDepth, bool kBox, int kRows, int kFields>
__global__ void __launch_bounds__(kThreads, 1)
    lncc_kernel(const __grid_constant__ LnccArguments<T> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ T scratch[kThreads / kWarp];
  constexpr bool kFused = kFields > 0;
  constexpr int kTile = kRows * kLnccTileX;
  constexpr int kHalf = kDepth / 2;
  using Place = unsigned;  // an offset in a plane, of less than 2^31 voxels
  const Window<T>& window = arguments.window;
  constexpr int radius = kWindow / 2, radius_z = kHalf;
  constexpr LnccTile layout{kLnccTileX, kRows, radius, radius_z, kFields, true, kFused};
  const int halo = layout.halo(), reach = kFused ? radius_z : 0;
  const int width = layout.width(), height = layout.height(), stride = layout.stride();
  const int in_width = layout.in_width(), in_height = layout.in_height();
  const int in_stride = layout.in_stride();
  const int in_area = in_width * in_height;
  T* const by_depth = reinterpret_cast<T*>(memory);
  T* const by_row = by_depth + layout.by_row();
  T* const adjoint = by_depth + layout.adjoint();
  T* const adjoint_by_row = by_depth + layout.adjoint_by_row();
  T* const ring = by_depth + layout.ring();

  // Each thread keeps so many columns along z.
  constexpr int kReach = (kFused ? 2 : 1) * (kWindow - 1);
  constexpr int kInArea = (kLnccTileX + kReach) * (kRows + kReach);
  constexpr int kColumns = (kInArea + kThreads - 1) / kThreads;
  constexpr int kAhead = kDepth > 1 ? 2 : 1;  // as in the tile
  DepthRing<T, kDepth, kAhead> depth[kColumns];

  const int64_t group = blockIdx.x;
  const int64_t plane_size = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const int items_here = arguments.items_together ? arguments.items : 1;
  T scale = arguments.scale;
  if (arguments.mask_sum != nullptr) {
    const T sum = arguments.mask_sum[group];
    scale = sum > 0 ? scale / sum : T(0);
  }
  T total = 0;
  int64_t next = blockIdx.y * arguments.planes / gridDim.y;
  const int64_t last = (blockIdx.y + 1) * arguments.planes / gridDim.y;
#pragma unroll 1
  while (next < last) {
    int64_t column_number = next / arguments.nz;
    const int z_begin = static_cast<int>(next - column_number * arguments.nz);
    const int z_end =
        static_cast<int>(min(static_cast<int64_t>(arguments.nz), z_begin + last - next));
    next += z_end - z_begin;
    const int tile = static_cast<int>(column_number % arguments.tiles);
    column_number /= arguments.tiles;
    const int channel = static_cast<int>(column_number % arguments.channels);
    const int64_t first_item = column_number / arguments.channels;  // 0 where they go together
    const int tile_y = tile / arguments.tiles_x;
    const int x0 = (tile - tile_y * arguments.tiles_x) * layout.columns, y0 = tile_y * layout.rows;

    // The offset of one of the thread's columns in a plane; -1 if it is outside.
    auto place_of = [&](int index) {
      const int row = index / in_width, column = index - row * in_width;
      const int x = x0 + column - halo - radius, y = y0 + row - halo - radius;
      const bool inside =
          index < in_area && x >= 0 && x < arguments.nx && y >= 0 && y < arguments.ny;
      return inside ? y * static_cast<int64_t>(arguments.nx) + x : int64_t(-1);
    };
    int places[kColumns];
    REGKERNELS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      places[c] = static_cast<int>(place_of(threadIdx.x + c * kThreads));
    }

#pragma unroll 1
    for (int64_t item = first_item; item < first_item + items_here; ++item) {
      const T* const image_i = arguments.image_i.at(group, item, channel);
      const T* const image_j = arguments.image_j.at(group, item, channel);
      const int z_first = z_begin - reach, z_stop = z_end + reach;
      const T pivot_i = typical(arguments, image_i, x0, y0, z_first, z_stop, layout, scratch);
      const T pivot_j = typical(arguments, image_j, x0, y0, z_first, z_stop, layout, scratch);
      const T* const mask =
          arguments.mask.present() ? arguments.mask.at(group, item, channel) : nullptr;
      const T* const cotangent =
          arguments.cotangent.present() ? arguments.cotangent.at(group, item, channel) : nullptr;
      T* const grad_i = kFields > 0 ? arguments.grad_i.at(group, item, channel) : nullptr;
      T* const grad_j = kFields == 5 ? arguments.grad_j.at(group, item, channel) : nullptr;
      T* const map = arguments.map.present() ? arguments.map.at(group, item, channel) : nullptr;
      const bool is_special = mask != nullptr || cotangent != nullptr || map != nullptr;

      auto exists = [&](int z) { return z >= 0 && z < arguments.nz; };
      // Where there are no voxels, images are 0.
      auto load_columns = [&](int z, T(&fresh_i)[kColumns][kAhead], T(&fresh_j)[kColumns][kAhead]) {
        REGKERNELS_UNROLL
        for (int p = 0; p < kAhead; ++p) {
          const T* const plane_i = opaque_global_pointer(image_i + (z + p) * plane_size);
          const T* const plane_j = opaque_global_pointer(image_j + (z + p) * plane_size);
          const bool there = exists(z + p);
          REGKERNELS_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            const bool inside = there && places[c] >= 0;
            const Place place = static_cast<Place>(places[c]);
            fresh_i[c][p] = (inside ? plane_i[place] : T(0)) - pivot_i;
            fresh_j[c][p] = (inside ? plane_j[place] : T(0)) - pivot_j;
          }
        }
      };
      auto push_columns = [&](const T(&fresh_i)[kColumns][kAhead],
                              const T(&fresh_j)[kColumns][kAhead]) {
        REGKERNELS_UNROLL
        for (int c = 0; c < kColumns; ++c) depth[c].push(fresh_i[c], fresh_j[c]);
      };
      auto store_sums = [&](int plane, int index, const T(&sums)[kWindowSums]) {
        const int row = index / in_width, column = index - row * in_width;
        T* const to = by_depth + plane * layout.by_depth_size() + row * in_stride + column;
        REGKERNELS_UNROLL
        for (int s = 0; s < kWindowSums; ++s) to[s * in_height * in_stride] = sums[s];
      };
      // Sums along z, for kAhead planes from z on.
      auto sum_depth = [&](int z) {
        const int thread = thread_number<kThreads>();
        REGKERNELS_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          const int index = thread + c * kThreads;
          T common[kWindowSums] = {};
          if constexpr (kBox) {
            REGKERNELS_UNROLL
            for (int d = kAhead - 1; d < kDepth; ++d) {
              add_products(depth[c].i[d], depth[c].j[d], common);
            }
          }
          REGKERNELS_UNROLL
          for (int p = 0; p < kAhead; ++p) {
            T sums[kWindowSums];
            REGKERNELS_UNROLL
            for (int s = 0; s < kWindowSums; ++s) sums[s] = common[s];
            REGKERNELS_UNROLL
            for (int d = p; d < p + kDepth; ++d) {
              if constexpr (kBox) {
                if (d >= kAhead - 1 && d < kDepth) continue;
                add_products(depth[c].i[d], depth[c].j[d], sums);
              } else {
                const int distance = d - p < kHalf ? kHalf - d + p : d - p - kHalf;
                add_products(window.weight[kDepthAxis][distance], depth[c].i[d], depth[c].j[d],
                             sums);
              }
            }
            const bool covered = (c + 1) * kThreads <= kInArea || index < in_area;
            if (covered) store_sums(p, index, sums);
          }
        }
      };
      auto sum_image_rows = [&](int z) {
        if (!exists(z)) return;
        const T* const from = by_depth + (z - z_first) % kAhead * layout.by_depth_size();
        sum_rows<kWindow, kBox>(window, kWindowSums, in_height, from, in_stride, by_row, stride,
                                width);
      };

      auto correlate_plane = [&](int z) {
        const bool own = z >= z_begin && z < z_end;
        const int strips = (height + kColumnStrip - 1) / kColumnStrip;
        for (int i = thread_number<kThreads>(); i < strips * width; i += kThreads) {
          // The tile's own columns come first, those of a warp beside each other; then the halo's.
          int strip = i / layout.columns, column = i - strip * layout.columns;
          if (kFused && strip >= strips) {
            const int rest = i - strips * layout.columns;
            strip = rest / (2 * halo);
            column = layout.columns + rest - strip * (2 * halo);
          }
          const int x = x0 + column - halo;
          const bool column_inside = x >= 0 && x < arguments.nx;
          const Place first =
              static_cast<Place>(y0 + strip * kColumnStrip - halo) * arguments.nx + x;
          // The mask arrives while the sums are computed.
          T weight[kColumnStrip];
          REGKERNELS_UNROLL
          for (int k = 0; k < kColumnStrip; ++k) {
            const int row = strip * kColumnStrip + k, y = y0 + row - halo;
            const bool there =
                mask != nullptr && column_inside && row < height && y >= 0 && y < arguments.ny;
            weight[k] =
                there ? mask[z * plane_size + static_cast<Place>(first + k * arguments.nx)] : T(1);
          }
          T sums[kWindowSums][kColumnStrip];
          REGKERNELS_UNROLL
          for (int s = 0; s < kWindowSums; ++s) {
            const T* const from = by_row + (s * in_height + strip * kColumnStrip) * stride + column;
            sum_column<kWindow, kBox>(window, from, stride, sums[s]);
          }
          const bool column_own = own && column >= halo && column < halo + layout.columns;
          // All rows of the strip are computed together, since they do not depend on each other.
          Correlation<T> at[kColumnStrip];
          T fields[kColumnStrip][kFields == 0 ? 1 : kFields];
          bool inside[kColumnStrip], counts[kColumnStrip];
          REGKERNELS_UNROLL
          for (int k = 0; k < kColumnStrip; ++k) {
            const int row = strip * kColumnStrip + k, y = y0 + row - halo;
            inside[k] = column_inside && row < height && y >= 0 && y < arguments.ny;
            counts[k] = inside[k] && column_own && row >= halo && row < halo + layout.rows;
            T window_sums[kWindowSums];
            REGKERNELS_UNROLL
            for (int s = 0; s < kWindowSums; ++s) window_sums[s] = sums[s][k];
            at[k] = correlate(window_sums, window);
            if constexpr (kFields > 0) {
              adjoint_fields(at[k], at[k].mean_i, at[k].mean_j, fields[k]);
            }
          }
          if (is_special) {
            REGKERNELS_UNROLL
            for (int k = 0; k < kColumnStrip; ++k) {
              if (!inside[k]) continue;
              const int64_t place = z * plane_size + static_cast<Place>(first + k * arguments.nx);
              at[k].ncc *= weight[k];
              if (map != nullptr && counts[k]) map[place] = -at[k].ncc;
              if constexpr (kFields > 0) {
                const T factor = cotangent != nullptr ? weight[k] * cotangent[place] : weight[k];
                REGKERNELS_UNROLL
                for (int f = 0; f < kFields; ++f) fields[k][f] *= factor;
              }
            }
          }
          REGKERNELS_UNROLL
          for (int k = 0; k < kColumnStrip; ++k) {
            if (counts[k]) total += at[k].ncc;
            if (!inside[k]) continue;
            const int row = strip * kColumnStrip + k;
            if constexpr (kFused) {
              REGKERNELS_UNROLL
              for (int f = 0; f < kFields; ++f) {
                adjoint[(f * height + row) * stride + column] = fields[k][f];
              }
            }
          }
        }
      };

      // Completes the plane whose windows end at the plane z, and takes that into the ring.
      auto assemble_plane = [&](int z) {
        if constexpr (kFused) {
          constexpr int kCount = 2;  // rows that a thread takes
          constexpr int kSlots = kDepth - 1;
          // Here are the sums of the window's other planes, the oldest first, which makes room for
          // the newest. For a box their order does not matter.
          const int oldest = kSlots == 0 ? 0 : (z - z_first) % kSlots;
          int slots[kDepth];
          REGKERNELS_UNROLL
          for (int d = 0; d < kSlots; ++d) {
            const int at = kBox ? d : oldest + d;
            slots[d] = (at < kSlots ? at : at - kSlots) * kTile;
          }
          const int target = z - radius_z;
          const T* const plane_i = opaque_global_pointer(image_i + target * plane_size);
          const T* const plane_j = opaque_global_pointer(image_j + target * plane_size);
          T* const to_i = opaque_global_pointer(grad_i + target * plane_size);
          T* const to_j =
              opaque_global_pointer(kFields == 5 ? grad_j + target * plane_size : nullptr);
          for (int i = thread_number<kThreads>(); i < kTile / kCount; i += kThreads) {
            const int column = i % kLnccTileX, first_row = i / kLnccTileX * kCount;
            const int x = x0 + column, y = y0 + first_row;
            const Place place = static_cast<Place>(y) * arguments.nx + x;
            bool stored[kCount];
            T value_i[kCount], value_j[kCount];
            REGKERNELS_UNROLL
            for (int k = 0; k < kCount; ++k) {
              stored[k] = target >= z_begin && x < arguments.nx && y + k < arguments.ny;
              value_i[k] = (stored[k] ? plane_i[place + k * arguments.nx] : T(0)) - pivot_i;
              value_j[k] = (stored[k] ? plane_j[place + k * arguments.nx] : T(0)) - pivot_j;
            }
            T newest[kFields][kCount] = {};
            if (exists(z)) {
              REGKERNELS_UNROLL
              for (int f = 0; f < kFields; ++f) {
                const int from = (f * height + first_row) * layout.out_stride() + column;
                sum_column<kWindow, kBox>(window, adjoint_by_row + from, layout.out_stride(),
                                          newest[f]);
              }
            }
            T complete[kCount][kFields];
            REGKERNELS_UNROLL
            for (int f = 0; f < kFields; ++f) {
              T* const mine = ring + f * kSlots * kTile + i * kCount;
              T sum[kCount];
              REGKERNELS_UNROLL
              for (int k = 0; k < kCount; ++k) {
                sum[k] = kBox ? newest[f][k] : window.weight[kDepthAxis][kHalf] * newest[f][k];
              }
              REGKERNELS_UNROLL
              for (int d = 0; d < kSlots; ++d) {
                const T weight = window.weight[kDepthAxis][d < kHalf ? kHalf - d : d - kHalf];
                REGKERNELS_UNROLL
                for (int k = 0; k < kCount; ++k) {
                  const T other = mine[slots[d] + k];
                  sum[k] += kBox ? other : weight * other;
                }
              }
              REGKERNELS_UNROLL
              for (int k = 0; k < kCount; ++k) {
                complete[k][f] = sum[k];
                if (kSlots > 0) mine[oldest * kTile + k] = newest[f][k];
              }
            }
            REGKERNELS_UNROLL
            for (int k = 0; k < kCount; ++k) {
              if (!stored[k]) continue;
              const Place here = place + k * arguments.nx;
              store_gradients(scale, value_i[k], value_j[k], complete[k],
                              arguments.sum_i && item > 0, to_i + here, arguments.sum_j && item > 0,
                              kFields == 5 ? to_j + here : nullptr);
            }
          }
        }
      };

      if constexpr (kFused) {
        // Outside of the volume adjoint fields are 0, and stay so.
        for (int i = threadIdx.x; i < layout.adjoint_size(); i += kThreads) adjoint[i] = 0;
      }
      T fresh_i[kColumns][kAhead], fresh_j[kColumns][kAhead];
      REGKERNELS_UNROLL
      for (int d = -kHalf; d < kHalf; d += kAhead) {
        load_columns(z_first + d, fresh_i, fresh_j);
        push_columns(fresh_i, fresh_j);
      }
      load_columns(z_first + kHalf, fresh_i, fresh_j);
      push_columns(fresh_i, fresh_j);
      sum_depth(z_first);
#pragma unroll 1
      for (int step = z_first - 1; step < z_stop; step += kAhead) {
#pragma unroll 1
        for (int z = step; z < min(step + kAhead, z_stop); ++z) {
          const bool more = z + 1 < z_stop;
          __syncthreads();
          if constexpr (kFused) {
            if (z >= z_first && exists(z)) {
              sum_rows<kWindow, kBox>(window, kFields, height, adjoint, stride, adjoint_by_row,
                                      layout.out_stride(), kLnccTileX);
            }
          }
          if (more) sum_image_rows(z + 1);
          __syncthreads();
          // Every other group of four warps takes these two phases the other way round, so that one
          // half of the block computes while the other reads.
#pragma unroll 1
          for (int phase = 0; phase < 2; ++phase) {
            if ((thread_number<kThreads>() / (4 * kWarp) + phase) % 2 == 0) {
              if constexpr (kFused) {
                if (z >= z_first) assemble_plane(z);
              }
            } else if (more && exists(z + 1)) {
              correlate_plane(z + 1);
            }
          }
        }
        if (step + kAhead + 1 < z_stop) {
          load_columns(step + kAhead + 1 + kHalf, fresh_i, fresh_j);
          push_columns(fresh_i, fresh_j);
          sum_depth(step + kAhead + 1);
        }
      }
    }
  }
  if (arguments.partial_sums != nullptr) {
    const T sum = block_sum<kThreads>(total, scratch);
    if (threadIdx.x == 0) arguments.partial_sums[group * kLnccMaxParts + blockIdx.y] = sum;
  }
}

// Each block computes the pivots of one item and channel: the means of some of their voxels.
template <class T>
__global__ void pivot_kernel(const __grid_constant__ LnccArguments<T> arguments, T* pivots) {
  __shared__ T shared[2 * kThreads / kWarp];
  const int64_t elements =
      static_cast<int64_t>(arguments.groups) * arguments.items * arguments.channels;
  const int64_t count = static_cast<int64_t>(arguments.nx) * arguments.ny * arguments.nz;
  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const int channel = static_cast<int>(element % arguments.channels);
    const int64_t outer = element / arguments.channels;
    const int64_t group = outer / arguments.items, item = outer - group * arguments.items;
    // The voxels are evenly spread over the volume.
    const int64_t place = (2 * threadIdx.x + 1) * count / (2 * kThreads);
    const T i = arguments.image_i.at(group, item, channel)[place];
    const T j = arguments.image_j.at(group, item, channel)[place];
    const T sum_i = block_sum<kThreads>(isfinite(i) ? i / kThreads : T(0), shared);
    const T sum_j = block_sum<kThreads>(isfinite(j) ? j / kThreads : T(0), shared);
    const bool fades_i = fades_to_zero(__syncthreads_count(i == 0), kThreads);
    const bool fades_j = fades_to_zero(__syncthreads_count(j == 0), kThreads);
    if (threadIdx.x == 0) {
      pivots[2 * element] = fades_i ? T(0) : pivot_near(sum_i, arguments.window);
      pivots[2 * element + 1] = fades_j ? T(0) : pivot_near(sum_j, arguments.window);
    }
  }
}

// Computes partial sums of the mask, which is broadcast to the correlations.
template <class T>
__global__ void mask_kernel(const __grid_constant__ LnccArguments<T> arguments) {
  __shared__ T shared[kThreads / kWarp];
  const int64_t group = blockIdx.x;
  const int64_t count = static_cast<int64_t>(arguments.nx) * arguments.ny * arguments.nz;
  T sum = 0;
  for (int64_t item = 0; item < arguments.items; ++item) {
    for (int channel = 0; channel < arguments.channels; ++channel) {
      const T* const mask = arguments.mask.at(group, item, channel);
      // Loads that wait for each other would take longer than the whole loss.
#pragma unroll 8
      for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < count; i += gridDim.y * kThreads) {
        sum += mask[i];
      }
    }
  }
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) arguments.partial_sums[group * kLnccMaxParts + blockIdx.y] = sum;
}

constexpr LnccTile small_tile(int radius, int radius_z, int fields, int limit) {
  return lncc_tile(radius, radius_z, fields, true, fields > 0,
                   (kLnccSharedBytes[limit] - kLnccFixedBytes) / 4);
}

LnccTile tile_of(const Window<float>& window, int fields) {
  const int64_t bytes = shared_memory_limit();
  int limit = 0;
  while (limit + 1 < kLnccSharedLimits && kLnccSharedBytes[limit] > bytes) ++limit;
  return small_tile(window.radius, window.radius_z, fields, limit);
}

template <class Function, class T>
void launch(const Cuda& device, Function* function, const dim3& grid, const LnccTile& tile,
            const LnccArguments<T>& arguments) {
  const int64_t bytes = tile.size() * static_cast<int64_t>(sizeof(T));
  allow_shared_memory(function, bytes);
  function<<<grid, kThreads, bytes, device.stream>>>(arguments);
  check_launch();
}

// Launches the kernel for small windows. Boxes have one of their own for the largest tiles alone:
// the other one, with weights of 1, computes the same.
template <int kWindow, int kDepth, int kFields>
void launch_small(const Cuda& device, const LnccArguments<float>& arguments, const dim3& grid) {
  const bool box = arguments.window.rectangular;
  auto launch_limit = [&](auto limit) {
    constexpr int kLimit = decltype(limit)::value;
    constexpr LnccTile kTile = small_tile(kWindow / 2, kDepth / 2, kFields, kLimit);
    if (arguments.tile.rows != kTile.rows) return false;
    if constexpr (kLimit == 0) {
      if (box) {
        launch(device, &lncc_kernel<float, kWindow, kDepth, true, kTile.rows, kFields>, grid, kTile,
               arguments);
        return true;
      }
    }
    launch(device, &lncc_kernel<float, kWindow, kDepth, false, kTile.rows, kFields>, grid, kTile,
           arguments);
    return true;
  };
  launch_limit(IntTag<0>{}) || launch_limit(IntTag<1>{}) || launch_limit(IntTag<2>{});
}

// Both of these return the number of parts that the sum over a group has.
template <int kFields>
int64_t launch_fused(const Cuda& device, LnccArguments<float> arguments, const LnccCall& checked) {
  arguments.tile = tile_of(arguments.window, kFields);
  const LnccTiling tiling = lncc_tiling(checked, arguments.tile, arguments.items_together);
  arguments.tiles_x = tiling.tiles_x;
  arguments.tiles = tiling.tiles_x * tiling.tiles_y;
  arguments.planes = tiling.columns * checked.sizes.z;
  const dim3 grid(static_cast<unsigned>(arguments.groups), static_cast<unsigned>(tiling.parts));
  dispatch_bool(checked.dimensions == 3, [&](auto is_volume) {
    const auto launch_window = [&](auto window) {
      constexpr int kWindow = decltype(window)::value;
      constexpr int kDepth = decltype(is_volume)::value ? kWindow : 1;
      if (checked.kernel_size == kWindow) {
        launch_small<kWindow, kDepth, kFields>(device, arguments, grid);
      }
    };
    launch_window(IntTag<3>{});
    launch_window(IntTag<5>{});
    launch_window(IntTag<7>{});
    launch_window(IntTag<9>{});
  });
  return tiling.parts;
}

template <int kFields, class T>
int64_t launch_passes(const Cuda& device, const LnccArguments<T>& lncc, const LnccCall& checked,
                      const Call& call) {
  T* const pivots = call.output("pivots").as<T>();
  const int64_t elements = checked.batch.groups * checked.batch.items * checked.channels;
  pivot_kernel<<<static_cast<unsigned>(std::min<int64_t>(elements, 65535)), kThreads, 0,
                 device.stream>>>(lncc, pivots);
  check_launch();
  LnccPassArguments<T> arguments{};
  arguments.window = lncc.window;
  double mass = 1;
  for (int axis = 0; axis < 3; ++axis) {
    arguments.radius[axis] = axis < checked.dimensions ? checked.kernel[axis] / 2 : 0;
    double sum = 0;
    for (int d = 0; d <= arguments.radius[axis]; ++d) {
      arguments.weight[axis][d] = lncc.window.weight[axis][d];
      sum += (d == 0 ? 1 : 2) * arguments.weight[axis][d];
    }
    arguments.depth_mass = sum;
    mass *= sum;
  }
  arguments.inverse_mass = 1 / mass;
  arguments.rounding = 1.5 * checked.kernel_size * std::numeric_limits<double>::epsilon();
  arguments.image_i = lncc.image_i;
  arguments.image_j = lncc.image_j;
  arguments.mask = lncc.mask;
  arguments.cotangent = lncc.cotangent;
  arguments.grad_i = lncc.grad_i;
  arguments.grad_j = lncc.grad_j;
  arguments.map = lncc.map;
  arguments.add_i = lncc.sum_i;
  arguments.add_j = lncc.sum_j;
  arguments.groups = lncc.groups;
  arguments.items = lncc.items;
  arguments.channels = lncc.channels;
  arguments.nx = lncc.nx;
  arguments.ny = lncc.ny;
  arguments.nz = lncc.nz;
  arguments.passes = lncc_passes(checked);
  arguments.scale = lncc.scale;
  arguments.mask_sum = lncc.mask_sum;
  arguments.partial_sums = lncc.partial_sums;
  arguments.pivots = pivots;
  arguments.sums = call.output("window_sums").as<double>();
  if (kFields > 0) {
    arguments.adjoint = call.output("adjoint").as<T>();
    arguments.adjoint_stride = checked.map.count();
  }
  run_passes<kFields>(device, arguments, checked, lncc.items_together);
  return arguments.passes.parts;
}

template <class T>
void run_lncc(const Cuda& device, const LnccOperands<T>& lncc, const Call& call) {
  const LnccCall& checked = lncc.checked;
  const bool is_map = checked.reduction == Reduction::kNone;
  const Sizes& sizes = checked.sizes;
  const int fields = lncc.gradients == 0 ? 0 : 2 * lncc.gradients + 1;
  LnccArguments<T> arguments{};
  arguments.window = lncc.window;
  arguments.image_i = lncc.image_i;
  arguments.image_j = lncc.image_j;
  arguments.mask = lncc.mask;
  arguments.cotangent = lncc.cotangent;
  arguments.grad_i = lncc.grad_i;
  arguments.grad_j = lncc.grad_j;
  arguments.map = lncc.map;
  arguments.sum_i = lncc.sum_i;
  arguments.sum_j = lncc.sum_j;
  arguments.groups = static_cast<int>(checked.batch.groups);
  arguments.items = static_cast<int>(checked.batch.items);
  arguments.channels = static_cast<int>(checked.channels);
  arguments.items_together = lncc.items_together();
  arguments.nx = static_cast<int>(sizes.x);
  arguments.ny = static_cast<int>(sizes.y);
  arguments.nz = static_cast<int>(sizes.z);
  const bool is_mean = checked.reduction == Reduction::kMean;
  const bool divide_by_mask = is_mean && (lncc.mask.present() || lncc.given_sum != nullptr);
  const double scale = is_mean && !divide_by_mask && lncc.count() > 0
                           ? -1.0 / static_cast<double>(lncc.count())
                           : -1;
  arguments.scale = static_cast<T>(scale);

  if (checked.map.count() == 0) {
    clear_gradients(device, call);
    if (!is_map) clear(device, call.output("output"));
    if (divide_by_mask && lncc.given_sum == nullptr) clear(device, call.output("mask_sum"));
    return;
  }
  const unsigned groups = static_cast<unsigned>(arguments.groups);
  if (!is_map) arguments.partial_sums = call.output("partial_sums").as<T>();
  if (lncc.given_sum != nullptr) {
    arguments.mask_sum = lncc.given_sum;
  } else if (divide_by_mask) {
    mask_kernel<<<dim3(groups, kLnccMaxParts), kThreads, 0, device.stream>>>(arguments);
    check_launch();
    T* mask_sum = call.output("mask_sum").as<T>();
    sum_groups<T, T>(device, groups, arguments.partial_sums, kLnccMaxParts, kLnccMaxParts, 1.0,
                     nullptr, mask_sum);
    arguments.mask_sum = mask_sum;
  }

  int64_t parts = 0, stride = 0;
  const auto launch_fields = [&](auto tag) {
    constexpr int kFields = decltype(tag)::value;
    if (fields != kFields) return;
    if constexpr (sizeof(T) == 4) {
      if (checked.fused) {
        parts = launch_fused<kFields>(device, arguments, checked);
        stride = kLnccMaxParts;
        return;
      }
    }
    parts = launch_passes<kFields>(device, arguments, checked, call);
    stride = kLnccPassParts;
  };
  launch_fields(IntTag<0>{});
  launch_fields(IntTag<3>{});
  launch_fields(IntTag<5>{});
  if (is_map) return;
  sum_groups(device, groups, arguments.partial_sums, parts, stride, scale, arguments.mask_sum,
             call.output("output").as<T>());
}

}  // namespace

void lncc_loss_share_cuda(const Context& context, const Call& call) {
  with_lncc_loss_share(call, [&](const auto& lncc) { run_lncc(Cuda(context), lncc, call); });
}
void lncc_loss_cuda(const Context& context, const Call& call) {
  with_lncc_loss(call, [&](const auto& lncc) { run_lncc(Cuda(context), lncc, call); });
}
void lncc_loss_grad_cuda(const Context& context, const Call& call) {
  with_lncc_loss_grad(call, [&](const auto& lncc) { run_lncc(Cuda(context), lncc, call); });
}

}  // namespace regkernels

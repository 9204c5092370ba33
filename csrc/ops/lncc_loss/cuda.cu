// One kernel does it all for windows up to 9: a block owns a tile in x and y and walks along z. For
// each plane it computes the window sums of the images, from them the correlations and the adjoint
// fields, and the adjoint fields' sums within the plane; the last few planes of those wait in
// shared memory until the window is complete and the gradient of a plane can leave. Each image is
// read from memory once (and then from cache), and nothing but the gradients is written.
//
// Larger windows have no room for that. There, and in float64, the same kernel writes the adjoint
// fields to memory, and a second one sums them up.
#include <algorithm>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/lncc_loss/kernels.h"

namespace reg {

namespace {

constexpr int kThreads = 512;
constexpr int kStrip = 4;        // sums along a row that one thread takes at a time
constexpr int kColumnStrip = 3;  // and along a column

// The thread's number, read anew: what follows from it is cheaper to compute in each phase than to
// keep in registers through all of them, as the compiler would.
__device__ __forceinline__ int thread_number() {
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
}

// What the kernels need to know, beside the window.
template <class T>
struct Kernel {
  Window<T> window;
  Channels<const T> image_i, image_j, mask, cotangent;
  Channels<T> grad_i, grad_j, map;
  bool sum_i, sum_j;
  int groups, items, channels;
  bool items_together;  // a block takes all items of its group, one after the other
  int nx, ny, nz;
  int tiles_x, tiles;
  int64_t planes;     // of all columns of a group
  T scale;            // of the gradient
  const T* mask_sum;  // divides the scale, by group; or null
  T* partial_sums;    // of the correlations; or null
  const T* pivots;  // of each image, which the adjoint fields are relative to; null: the tile's own
  T* adjoint;       // fields, one after the other; null: they stay in the block
  int64_t adjoint_stride;
};

// The widths of what a block works on. Everything is known to the compiler for the common windows.
template <int kWindow, int kTileY, bool kFused>
struct Layout {
  int radius;
  REG_HD explicit Layout(int run_time_radius) : radius(kWindow ? kWindow / 2 : run_time_radius) {}
  REG_HD int halo() const { return kFused ? radius : 0; }  // of the correlations about the tile
  REG_HD int width() const { return kLnccTileX + 2 * halo(); }
  REG_HD int height() const { return kTileY + 2 * halo(); }
  REG_HD int in_width() const { return width() + 2 * radius; }
  REG_HD int in_height() const { return height() + 2 * radius; }
  // Rows begin at multiples of 16 bytes, and whole strips can be read and written.
  REG_HD int stride() const { return (width() + kStrip - 1) / kStrip * kStrip; }
  REG_HD int in_stride() const { return (stride() + 2 * radius + kStrip - 1) / kStrip * kStrip; }
};

template <int kWindow, int kTileY, int kFields, bool kFused, class T>
int64_t shared_bytes(const Window<T>& window) {
  const Layout<kWindow, kTileY, kFused> layout(window.radius);
  int64_t count = static_cast<int64_t>(kWindowSums) * layout.in_height() *
                  (layout.in_stride() + layout.stride());
  count += kColumnStrip * layout.stride();  // which the last strip of rows may reach into
  if (kFused) {
    count += static_cast<int64_t>(kFields) * layout.height() * (layout.stride() + kLnccTileX);
    count += static_cast<int64_t>(kFields) * kTileY * kLnccTileX * (2 * window.radius_z + 1);
  }
  return count * static_cast<int64_t>(sizeof(T));
}

template <class T>
__device__ __forceinline__ void load_strip(const T* from, T* to) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
  } else {
    REG_UNROLL
    for (int i = 0; i < kStrip; ++i) to[i] = from[i];
  }
}

// Window sums along rows, of `planes` arrays of `rows` rows: from `in` to `out`.
template <int kWindow, class T>
__device__ __forceinline__ void sum_rows(const Window<T>& window, int planes, int rows, const T* in,
                                         int in_stride, T* out, int out_stride, int width) {
  if constexpr (kWindow > 0) {
    constexpr int kRadius = kWindow / 2;
    constexpr int kLoad = (kStrip + 2 * kRadius + kStrip - 1) / kStrip * kStrip;
    const int strips = (width + kStrip - 1) / kStrip;
    for (int i = thread_number(); i < rows * strips; i += kThreads) {
      const int row = i / strips, first = (i - row * strips) * kStrip;
      for (int plane = 0; plane < planes; ++plane) {
        const T* from = in + (plane * rows + row) * in_stride + first;
        alignas(16) T value[kLoad];
        alignas(16) T sum[kStrip];
        REG_UNROLL
        for (int k = 0; k < kLoad; k += kStrip) load_strip(from + k, value + k);
        REG_UNROLL
        for (int s = 0; s < kStrip; ++s) {
          sum[s] = window.weight[0] * value[s + kRadius];
          REG_UNROLL
          for (int d = 1; d <= kRadius; ++d) {
            sum[s] += window.weight[d] * (value[s + kRadius - d] + value[s + kRadius + d]);
          }
        }
        load_strip(sum, out + (plane * rows + row) * out_stride + first);
      }
    }
  } else {
    for (int i = thread_number(); i < rows * width; i += kThreads) {
      const int row = i / width, x = i - row * width;
      for (int plane = 0; plane < planes; ++plane) {
        const T* centre = in + (plane * rows + row) * in_stride + x + window.radius;
        T sum = window.weight[0] * centre[0];
        for (int d = 1; d <= window.radius; ++d) sum += window.weight[d] * (centre[-d] + centre[d]);
        out[(plane * rows + row) * out_stride + x] = sum;
      }
    }
  }
}

// Window sums along a column, of kCount consecutive rows from `in` on.
template <int kWindow, int kCount, class T>
__device__ __forceinline__ void sum_column(const Window<T>& window, const T* in, int stride,
                                           T (&sum)[kCount]) {
  if constexpr (kWindow > 0) {
    constexpr int kRadius = kWindow / 2;
    T value[kCount + 2 * kRadius];
    REG_UNROLL
    for (int k = 0; k < kCount + 2 * kRadius; ++k) value[k] = in[k * stride];
    REG_UNROLL
    for (int s = 0; s < kCount; ++s) {
      sum[s] = window.weight[0] * value[s + kRadius];
      REG_UNROLL
      for (int d = 1; d <= kRadius; ++d) {
        sum[s] += window.weight[d] * (value[s + kRadius - d] + value[s + kRadius + d]);
      }
    }
  } else {
    REG_UNROLL
    for (int s = 0; s < kCount; ++s) {
      const T* centre = in + (s + window.radius) * stride;
      sum[s] = window.weight[0] * centre[0];
      for (int d = 1; d <= window.radius; ++d) {
        sum[s] += window.weight[d] * (centre[-d * stride] + centre[d * stride]);
      }
    }
  }
}

// A value that is typical of an image about a tile, the same for all threads.
template <class T>
__device__ T typical(const Kernel<T>& kernel, const T* image, int x0, int y0, int z, int rows,
                     T* shared) {
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x;
    const int x = min(x0 + lane % 8 * 4 + 2, kernel.nx - 1);
    const int y = min(y0 + (2 * (lane / 8) + 1) * rows / 8, kernel.ny - 1);
    const T value = image[(static_cast<int64_t>(z) * kernel.ny + y) * kernel.nx + x];
    const T sum = warp_sum(isfinite(value) ? value / kWarp : T(0));
    if (lane == 0) *shared = sum;
  }
  __syncthreads();
  const T result = *shared;
  __syncthreads();
  return isfinite(result) ? kernel.window.coverage * result : T(0);
}

template <class T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += shared[warp];
  }
  __syncthreads();
  return sum;
}

// A column's values along z, about the pivots: those of the planes that a small window spans.
template <class T, int kDepth>
struct DepthRing {
  T i[kDepth], j[kDepth];

  __device__ __forceinline__ void push(T value_i, T value_j) {
    REG_UNROLL
    for (int d = 0; d + 1 < kDepth; ++d) {
      i[d] = i[d + 1];
      j[d] = j[d + 1];
    }
    i[kDepth - 1] = value_i;
    j[kDepth - 1] = value_j;
  }
};

template <class T>
__device__ __forceinline__ void add_products(T weight, T value_i, T value_j,
                                             T (&sums)[kWindowSums]) {
  const T weighted_i = weight * value_i, weighted_j = weight * value_j;
  sums[0] += weighted_i;
  sums[1] += weighted_j;
  sums[2] += weighted_i * value_i;
  sums[3] += weighted_j * value_j;
  sums[4] += weighted_i * value_j;
}

// One block's part of the work. Its phases, between barriers, for one plane after the other:
//   sums along z of values and products                 (images -> by_depth)
//   sums along rows                                     (by_depth -> by_row)
//   sums along columns, correlations, adjoint fields    (by_row -> adjoint)
//   sums of those along rows                            (adjoint -> adjoint_by_row)
//   sums along columns, and along z; gradients          (adjoint_by_row -> ring -> memory)
// The first two run ahead by a plane and share their barriers with the last two.
//
// kWindow is the size of the window, or 0 where it is known at run time only; kDepth is its size
// along z, which is 1 in 2-D.
template <class T, int kWindow, int kDepth, int kTileY, int kFields, bool kFused>
__global__ void __launch_bounds__(kThreads, 1)
    lncc_kernel(const __grid_constant__ Kernel<T> kernel) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ T scratch[kThreads / kWarp];
  constexpr int kTile = kTileY * kLnccTileX;
  constexpr int kHalf = kDepth / 2;
  const Window<T>& window = kernel.window;
  const Layout<kWindow, kTileY, kFused> layout(window.radius);
  const int radius = layout.radius, halo = layout.halo();
  const int radius_z = kWindow == 0 ? window.radius_z : kHalf;
  const int reach = kFused ? radius_z : 0;
  const int width = layout.width(), height = layout.height(), stride = layout.stride();
  const int in_width = layout.in_width(), in_height = layout.in_height();
  const int in_stride = layout.in_stride();
  const int in_area = in_width * in_height;
  T* const by_depth = reinterpret_cast<T*>(memory);
  T* const by_row = by_depth + kWindowSums * in_height * in_stride;
  T* const adjoint = by_row + (kWindowSums * in_height + kColumnStrip) * stride;
  T* const adjoint_by_row = adjoint + kFields * height * stride;
  T* const ring = adjoint_by_row + kFields * height * kLnccTileX;

  // Columns along z for each thread, of windows known to the compiler.
  constexpr int kReach = (kFused ? 2 : 1) * (kWindow - 1);
  constexpr int kInArea = kWindow == 0 ? 0 : (kLnccTileX + kReach) * (kTileY + kReach);
  constexpr int kColumns = kWindow == 0 ? 1 : (kInArea + kThreads - 1) / kThreads;
  DepthRing<T, kWindow == 0 ? 1 : kDepth> depth[kColumns];

  const int64_t group = blockIdx.x;
  const int64_t plane_size = static_cast<int64_t>(kernel.nx) * kernel.ny;
  const int items_here = kernel.items_together ? kernel.items : 1;
  T scale = kernel.scale;
  if (kernel.mask_sum != nullptr) {
    const T sum = kernel.mask_sum[group];
    scale = sum > 0 ? scale / sum : T(0);
  }
  T total = 0;
  int64_t next = blockIdx.y * kernel.planes / gridDim.y;
  const int64_t last = (blockIdx.y + 1) * kernel.planes / gridDim.y;
#pragma unroll 1
  while (next < last) {
    int64_t column_number = next / kernel.nz;
    const int z_begin = static_cast<int>(next - column_number * kernel.nz);
    const int z_end = static_cast<int>(min(static_cast<int64_t>(kernel.nz), z_begin + last - next));
    next += z_end - z_begin;
    const int tile = static_cast<int>(column_number % kernel.tiles);
    column_number /= kernel.tiles;
    const int channel = static_cast<int>(column_number % kernel.channels);
    const int64_t first_item = column_number / kernel.channels;  // 0 where they go together
    const int tile_y = tile / kernel.tiles_x;
    const int x0 = (tile - tile_y * kernel.tiles_x) * kLnccTileX, y0 = tile_y * kTileY;

    // Where in a plane the thread's columns are; -1: outside.
    auto place_of = [&](int index) {
      const int row = index / in_width, column = index - row * in_width;
      const int x = x0 + column - halo - radius, y = y0 + row - halo - radius;
      const bool inside = index < in_area && x >= 0 && x < kernel.nx && y >= 0 && y < kernel.ny;
      return inside ? y * static_cast<int64_t>(kernel.nx) + x : int64_t(-1);
    };
    int places[kColumns];  // small windows are for planes of less than 2^31 voxels
    REG_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      places[c] = static_cast<int>(place_of(threadIdx.x + c * kThreads));
    }

#pragma unroll 1
    for (int64_t item = first_item; item < first_item + items_here; ++item) {
      const int64_t element = (group * kernel.items + item) * kernel.channels + channel;
      const T* const image_i = kernel.image_i.at(group, item, channel);
      const T* const image_j = kernel.image_j.at(group, item, channel);
      const int middle = (z_begin + z_end) / 2;
      const T pivot_i = typical(kernel, image_i, x0, y0, middle, kTileY, scratch);
      const T pivot_j = typical(kernel, image_j, x0, y0, middle, kTileY, scratch);
      T offset_i = 0, offset_j = 0;
      if (kernel.pivots != nullptr) {
        offset_i = pivot_i - kernel.pivots[2 * element];
        offset_j = pivot_j - kernel.pivots[2 * element + 1];
      }
      const T* const mask = kernel.mask.present() ? kernel.mask.at(group, item, channel) : nullptr;
      const T* const cotangent =
          kernel.cotangent.present() ? kernel.cotangent.at(group, item, channel) : nullptr;
      T* const map = kernel.map.present() ? kernel.map.at(group, item, channel) : nullptr;
      const bool is_special = mask != nullptr || cotangent != nullptr || map != nullptr;

      // Elsewhere images are 0.
      auto load = [&](int z, int64_t place, T& value_i, T& value_j) {
        const bool inside = place >= 0 && z >= 0 && z < kernel.nz;
        const T* const plane_i = image_i + z * plane_size;
        const T* const plane_j = image_j + z * plane_size;
        value_i = (inside ? plane_i[place] : T(0)) - pivot_i;
        value_j = (inside ? plane_j[place] : T(0)) - pivot_j;
      };
      auto exists = [&](int z) { return z >= 0 && z < kernel.nz; };
      auto load_columns = [&](int z, T(&fresh_i)[kColumns], T(&fresh_j)[kColumns]) {
        REG_UNROLL
        for (int c = 0; c < kColumns; ++c) load(z, places[c], fresh_i[c], fresh_j[c]);
      };
      auto store_sums = [&](int index, const T(&sums)[kWindowSums]) {
        const int row = index / in_width, column = index - row * in_width;
        REG_UNROLL
        for (int s = 0; s < kWindowSums; ++s) {
          by_depth[(s * in_height + row) * in_stride + column] = sums[s];
        }
      };
      auto sum_depth = [&](int z, const T(&fresh_i)[kColumns], const T(&fresh_j)[kColumns]) {
        if constexpr (kWindow > 0) {
          REG_UNROLL
          for (int c = 0; c < kColumns; ++c) depth[c].push(fresh_i[c], fresh_j[c]);
          if (!exists(z)) return;
          const int thread = thread_number();
          REG_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            const int index = thread + c * kThreads;
            T sums[kWindowSums] = {};
            REG_UNROLL
            for (int d = 0; d < kDepth; ++d) {
              const int distance = d < kHalf ? kHalf - d : d - kHalf;
              add_products(window.weight[distance], depth[c].i[d], depth[c].j[d], sums);
            }
            if (index < in_area) store_sums(index, sums);
          }
        } else if (exists(z)) {
          for (int index = thread_number(); index < in_area; index += kThreads) {
            const int64_t place = place_of(index);
            T sums[kWindowSums] = {};
            for (int d = -radius_z; d <= radius_z; ++d) {
              T value_i, value_j;
              load(z + d, place, value_i, value_j);
              add_products(window.weight[d < 0 ? -d : d], value_i, value_j, sums);
            }
            store_sums(index, sums);
          }
        }
      };
      auto sum_image_rows = [&](int z) {
        if (!exists(z)) return;
        sum_rows<kWindow>(window, kWindowSums, in_height, by_depth, in_stride, by_row, stride,
                          width);
      };

      auto correlate_plane = [&](int z) {
        const bool own = z >= z_begin && z < z_end;
        const int strips = (height + kColumnStrip - 1) / kColumnStrip;
        for (int i = thread_number(); i < strips * width; i += kThreads) {
          const int strip = i / width, column = i - strip * width;
          T sums[kWindowSums][kColumnStrip];
          REG_UNROLL
          for (int s = 0; s < kWindowSums; ++s) {
            const T* const from = by_row + (s * in_height + strip * kColumnStrip) * stride + column;
            sum_column<kWindow>(window, from, stride, sums[s]);
          }
          const int x = x0 + column - halo;
          const bool column_inside = x >= 0 && x < kernel.nx;
          const bool column_own = own && column >= halo && column < halo + kLnccTileX;
          REG_UNROLL
          for (int k = 0; k < kColumnStrip; ++k) {
            const int row = strip * kColumnStrip + k;
            if (row >= height) break;
            const int y = y0 + row - halo;
            const bool inside = column_inside && y >= 0 && y < kernel.ny;
            T window_sums[kWindowSums];
            REG_UNROLL
            for (int s = 0; s < kWindowSums; ++s) window_sums[s] = sums[s][k];
            Correlation<T> at = correlate(window_sums, window);
            T fields[kFields == 0 ? 1 : kFields];
            if constexpr (kFields > 0) {
              adjoint_fields(at, at.mean_i + offset_i, at.mean_j + offset_j, fields);
            }
            const bool counts = column_own && inside && row >= halo && row < halo + kTileY;
            if (is_special && inside) {
              const int64_t place = z * plane_size + static_cast<int64_t>(y) * kernel.nx + x;
              const T weight = mask != nullptr ? mask[place] : T(1);
              at.ncc *= weight;
              if (map != nullptr && counts) map[place] = -at.ncc;
              if constexpr (kFields > 0) {
                const T factor = cotangent != nullptr ? weight * cotangent[place] : weight;
                REG_UNROLL
                for (int f = 0; f < kFields; ++f) fields[f] *= factor;
              }
            }
            if (counts) total += at.ncc;
            if constexpr (kFields > 0 && kFused) {
              REG_UNROLL
              for (int f = 0; f < kFields; ++f) {
                adjoint[(f * height + row) * stride + column] = inside ? fields[f] : T(0);
              }
            } else if constexpr (kFields > 0) {
              if (!inside) continue;
              T* const to = kernel.adjoint + (element * kernel.nz + z) * plane_size +
                            static_cast<int64_t>(y) * kernel.nx + x;
              REG_UNROLL
              for (int f = 0; f < kFields; ++f) to[f * kernel.adjoint_stride] = fields[f];
            }
          }
        }
      };

      // Takes the plane z into the ring, and completes the plane whose windows end there.
      auto assemble_plane = [&](int z) {
        if constexpr (kFused) {
          constexpr int kRows = 2;  // of a column, for each thread
          const int slot = (z - z_begin + reach) % kDepth;
          const int target = z - radius_z;
          // Where the window's planes lie in the ring; the oldest is one slot on.
          int slots[kDepth];
          REG_UNROLL
          for (int d = 0; d < kDepth; ++d) {
            const int at = slot + 1 + d;
            slots[d] = (at < kDepth ? at : at - kDepth) * kTile;
          }
          const T* const plane_i = image_i + target * plane_size;
          const T* const plane_j = image_j + target * plane_size;
          T* const to_i = kernel.grad_i.at(group, item, channel) + target * plane_size;
          T* const to_j =
              kFields == 5 ? kernel.grad_j.at(group, item, channel) + target * plane_size : nullptr;
          for (int i = thread_number(); i < kTile / kRows; i += kThreads) {
            const int column = i % kLnccTileX, first_row = i / kLnccTileX * kRows;
            const int place_in_tile = first_row * kLnccTileX + column;
            T complete[kFields][kRows] = {};
            REG_UNROLL
            for (int f = 0; f < kFields; ++f) {
              T sums[kRows] = {};
              if (exists(z)) {
                sum_column<kWindow>(window,
                                    adjoint_by_row + f * height * kLnccTileX + place_in_tile,
                                    kLnccTileX, sums);
              }
              T* const mine = ring + f * kDepth * kTile + place_in_tile;
              REG_UNROLL
              for (int k = 0; k < kRows; ++k) mine[slot * kTile + k * kLnccTileX] = sums[k];
            }
            if (target < z_begin) continue;
            REG_UNROLL
            for (int f = 0; f < kFields; ++f) {
              const T* const mine = ring + f * kDepth * kTile + place_in_tile;
              REG_UNROLL
              for (int d = 0; d < kDepth; ++d) {
                const int distance = d < kHalf ? kHalf - d : d - kHalf;
                REG_UNROLL
                for (int k = 0; k < kRows; ++k) {
                  complete[f][k] += window.weight[distance] * mine[slots[d] + k * kLnccTileX];
                }
              }
            }
            const int x = x0 + column, y = y0 + first_row;
            const int64_t place = static_cast<int64_t>(y) * kernel.nx + x;
            REG_UNROLL
            for (int k = 0; k < kRows; ++k) {
              if (x >= kernel.nx || y + k >= kernel.ny) break;
              const int64_t here = place + k * kernel.nx;
              const T value_i = plane_i[here] - pivot_i, value_j = plane_j[here] - pivot_j;
              const T gradient = scale * assemble(value_i, value_j, complete[0][k], complete[1][k],
                                                  complete[2][k]);
              to_i[here] = kernel.sum_i && item > 0 ? to_i[here] + gradient : gradient;
              if constexpr (kFields == 5) {
                const T other = scale * assemble(value_j, value_i, complete[0][k], complete[3][k],
                                                 complete[4][k]);
                to_j[here] = kernel.sum_j && item > 0 ? to_j[here] + other : other;
              }
            }
          }
        }
      };

      const int z_first = z_begin - reach, z_stop = z_end + reach;
      T fresh_i[kColumns], fresh_j[kColumns];
      if constexpr (kWindow > 0) {
        REG_UNROLL
        for (int d = -kHalf; d < kHalf; ++d) {
          load_columns(z_first + d, fresh_i, fresh_j);
          REG_UNROLL
          for (int c = 0; c < kColumns; ++c) depth[c].push(fresh_i[c], fresh_j[c]);
        }
        load_columns(z_first + kHalf, fresh_i, fresh_j);
      }
      sum_depth(z_first, fresh_i, fresh_j);
      __syncthreads();
      sum_image_rows(z_first);
      __syncthreads();
#pragma unroll 1
      for (int z = z_first; z < z_stop; ++z) {
        const bool more = z + 1 < z_stop;
        if (exists(z)) correlate_plane(z);
        if constexpr (kFused) {
          __syncthreads();
          if (exists(z)) {
            sum_rows<kWindow>(window, kFields, height, adjoint, stride, adjoint_by_row, kLnccTileX,
                              kLnccTileX);
          }
        }
        if (more) {
          if constexpr (kWindow > 0) load_columns(z + 1 + kHalf, fresh_i, fresh_j);
          sum_depth(z + 1, fresh_i, fresh_j);
        }
        __syncthreads();
        if constexpr (kFused) assemble_plane(z);
        if (more) sum_image_rows(z + 1);
        __syncthreads();
      }
    }
  }
  if (kernel.partial_sums != nullptr) {
    const T sum = block_sum(total, scratch);
    if (threadIdx.x == 0) kernel.partial_sums[group * kLnccMaxParts + blockIdx.y] = sum;
  }
}

// The gradients, from adjoint fields in memory.
template <class T, int kTileY, int kFields>
__global__ void __launch_bounds__(kThreads, 1)
    assemble_kernel(const __grid_constant__ Kernel<T> kernel) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Window<T>& window = kernel.window;
  const Layout<0, kTileY, false> layout(window.radius);
  const int radius = layout.radius;
  const int in_width = layout.in_width(), in_height = layout.in_height();
  const int in_stride = layout.in_stride(), stride = layout.stride();
  T* const by_depth = reinterpret_cast<T*>(memory);
  T* const by_row = by_depth + kWindowSums * in_height * in_stride;

  const int tile_y = blockIdx.x / kernel.tiles_x;
  const int x0 = (blockIdx.x - tile_y * kernel.tiles_x) * kLnccTileX, y0 = tile_y * kTileY;
  const int64_t plane_size = static_cast<int64_t>(kernel.nx) * kernel.ny;
  const int items_here = kernel.items_together ? kernel.items : 1;
  const int64_t blocks =
      static_cast<int64_t>(kernel.groups) * (kernel.items / items_here) * kernel.channels;

  for (int64_t index = blockIdx.z; index < blocks; index += gridDim.z) {
    const int channel = static_cast<int>(index % kernel.channels);
    const int64_t outer = index / kernel.channels;
    const int64_t group = kernel.items_together ? outer : outer / kernel.items;
    const int64_t first_item = kernel.items_together ? 0 : outer - group * kernel.items;
    T scale = kernel.scale;
    if (kernel.mask_sum != nullptr) {
      const T sum = kernel.mask_sum[group];
      scale = sum > 0 ? scale / sum : T(0);
    }
    for (int z = blockIdx.y; z < kernel.nz; z += gridDim.y) {
      for (int64_t item = first_item; item < first_item + items_here; ++item) {
        const int64_t element = (group * kernel.items + item) * kernel.channels + channel;
        const T* const fields = kernel.adjoint + element * plane_size * kernel.nz;
        for (int i = threadIdx.x; i < in_width * in_height; i += kThreads) {
          const int row = i / in_width, column = i - row * in_width;
          const int x = x0 + column - radius, y = y0 + row - radius;
          const bool inside = x >= 0 && x < kernel.nx && y >= 0 && y < kernel.ny;
          T sums[kFields] = {};
          const int low = max(-window.radius_z, -z);
          const int high = inside ? min(window.radius_z, kernel.nz - 1 - z) : low - 1;
          for (int d = low; d <= high; ++d) {
            const T* const from =
                fields + (z + d) * plane_size + static_cast<int64_t>(y) * kernel.nx + x;
            REG_UNROLL
            for (int f = 0; f < kFields; ++f) {
              sums[f] += window.weight[d < 0 ? -d : d] * from[f * kernel.adjoint_stride];
            }
          }
          REG_UNROLL
          for (int f = 0; f < kFields; ++f) {
            by_depth[(f * in_height + row) * in_stride + column] = sums[f];
          }
        }
        __syncthreads();
        sum_rows<0>(window, kFields, in_height, by_depth, in_stride, by_row, stride, kLnccTileX);
        __syncthreads();
        for (int i = threadIdx.x; i < kTileY * kLnccTileX; i += kThreads) {
          const int row = i / kLnccTileX, column = i % kLnccTileX;
          const int x = x0 + column, y = y0 + row;
          if (x >= kernel.nx || y >= kernel.ny) continue;
          T complete[kFields][1];
          REG_UNROLL
          for (int f = 0; f < kFields; ++f) {
            sum_column<0>(window, by_row + (f * in_height + row) * stride + column, stride,
                          complete[f]);
          }
          const int64_t place = z * plane_size + static_cast<int64_t>(y) * kernel.nx + x;
          const T value_i =
              kernel.image_i.at(group, item, channel)[place] - kernel.pivots[2 * element];
          const T value_j =
              kernel.image_j.at(group, item, channel)[place] - kernel.pivots[2 * element + 1];
          T* const to_i = kernel.grad_i.at(group, item, channel) + place;
          const T gradient =
              scale * assemble(value_i, value_j, complete[0][0], complete[1][0], complete[2][0]);
          *to_i = kernel.sum_i && item > 0 ? *to_i + gradient : gradient;
          if constexpr (kFields == 5) {
            T* const to_j = kernel.grad_j.at(group, item, channel) + place;
            const T other =
                scale * assemble(value_j, value_i, complete[0][0], complete[3][0], complete[4][0]);
            *to_j = kernel.sum_j && item > 0 ? *to_j + other : other;
          }
        }
        __syncthreads();
      }
    }
  }
}

// One block per image and channel: the mean of some of its voxels.
template <class T>
__global__ void pivot_kernel(const __grid_constant__ Kernel<T> kernel, T* pivots) {
  __shared__ T shared[2 * kThreads / kWarp];
  const int64_t elements = static_cast<int64_t>(kernel.groups) * kernel.items * kernel.channels;
  const int64_t count = static_cast<int64_t>(kernel.nx) * kernel.ny * kernel.nz;
  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    const int channel = static_cast<int>(element % kernel.channels);
    const int64_t outer = element / kernel.channels;
    const int64_t group = outer / kernel.items, item = outer - group * kernel.items;
    // Evenly spread over the volume.
    const int64_t place = (2 * threadIdx.x + 1) * count / (2 * kThreads);
    const T i = kernel.image_i.at(group, item, channel)[place];
    const T j = kernel.image_j.at(group, item, channel)[place];
    const T sum_i = block_sum(isfinite(i) ? i / kThreads : T(0), shared);
    const T sum_j = block_sum(isfinite(j) ? j / kThreads : T(0), shared);
    if (threadIdx.x == 0) {
      pivots[2 * element] = isfinite(sum_i) ? kernel.window.coverage * sum_i : T(0);
      pivots[2 * element + 1] = isfinite(sum_j) ? kernel.window.coverage * sum_j : T(0);
    }
  }
}

// Partial sums of the mask, broadcast to the correlations.
template <class T>
__global__ void mask_kernel(const __grid_constant__ Kernel<T> kernel) {
  __shared__ T shared[kThreads / kWarp];
  const int64_t group = blockIdx.x;
  const int64_t count = static_cast<int64_t>(kernel.nx) * kernel.ny * kernel.nz;
  T sum = 0;
  for (int64_t item = 0; item < kernel.items; ++item) {
    for (int channel = 0; channel < kernel.channels; ++channel) {
      const T* const mask = kernel.mask.at(group, item, channel);
      for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < count; i += gridDim.y * kThreads) {
        sum += mask[i];
      }
    }
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) kernel.partial_sums[group * kLnccMaxParts + blockIdx.y] = sum;
}

// One block per group: out = scale * (sum of the partial sums), divided by mask_sum if there is
// one.
template <class T>
__global__ void total_kernel(const T* partial_sums, int parts, double scale, const T* mask_sum,
                             T* out) {
  __shared__ double shared[kThreads / kWarp];
  const int64_t group = blockIdx.x;
  double sum = threadIdx.x < parts ? partial_sums[group * kLnccMaxParts + threadIdx.x] : 0;
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    if (mask_sum != nullptr) sum = mask_sum[group] > 0 ? sum / mask_sum[group] : 0;
    out[group] = static_cast<T>(scale * sum);
  }
}

template <class Function>
void allow_shared(Function* function, int64_t bytes) {
  if (bytes > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)));
  }
}

template <int kWindow, int kDepth, int kTileY, int kFields, bool kFused, class T>
void launch_lncc(const Cuda& device, const Kernel<T>& kernel, const dim3& grid) {
  const int64_t bytes = shared_bytes<kWindow, kTileY, kFields, kFused>(kernel.window);
  auto* function = &lncc_kernel<T, kWindow, kDepth, kTileY, kFields, kFused>;
  allow_shared(function, bytes);
  function<<<grid, kThreads, bytes, device.stream>>>(kernel);
  check_launch();
}

// The first pass of windows of any size: correlations, and adjoint fields in memory if asked for.
template <int kFields, class T>
void launch_any(const Cuda& device, const Kernel<T>& kernel, const dim3& grid) {
  const int64_t outer = static_cast<int64_t>(kernel.groups) * kernel.channels *
                        (kernel.items_together ? 1 : kernel.items);
  constexpr int kTileY = lncc_tile_rows(sizeof(T) == 8, 0, 0);
  launch_lncc<0, 0, kTileY, kFields, false>(device, kernel, grid);
  if constexpr (kFields > 0) {
    const int64_t bytes = shared_bytes<0, kTileY, 0, false>(kernel.window);
    auto* function = &assemble_kernel<T, kTileY, kFields>;
    allow_shared(function, bytes);
    const dim3 planes(kernel.tiles, std::min(kernel.nz, 65535),
                      static_cast<unsigned>(std::min<int64_t>(outer, 65535)));
    function<<<planes, kThreads, bytes, device.stream>>>(kernel);
    check_launch();
  }
}

template <int kWindow, int kDepth>
void launch_window(const Cuda& device, const Kernel<float>& kernel, int gradients,
                   const dim3& grid) {
  constexpr int kValue = lncc_tile_rows(false, kWindow, 0);
  constexpr int kOne = lncc_tile_rows(false, kWindow, 1);
  constexpr int kBoth = lncc_tile_rows(false, kWindow, 2);
  if (gradients == 0) return launch_lncc<kWindow, kDepth, kValue, 0, false>(device, kernel, grid);
  if (gradients == 1) return launch_lncc<kWindow, kDepth, kOne, 3, true>(device, kernel, grid);
  launch_lncc<kWindow, kDepth, kBoth, 5, true>(device, kernel, grid);
}

template <class T>
void lncc_run(const Cuda& device, const LnccCall<T>& call, const Call& raw) {
  const LnccGeometry& geometry = call.geometry;
  const bool is_map = geometry.reduction == Reduction::kNone;
  const Sizes& sizes = geometry.sizes;
  const LnccTiling tiling = lncc_tiling(geometry, call.gradients, call.items_together());
  Kernel<T> kernel{};
  kernel.window = call.window;
  kernel.image_i = call.image_i;
  kernel.image_j = call.image_j;
  kernel.mask = call.mask;
  kernel.cotangent = call.cotangent;
  kernel.grad_i = call.grad_i;
  kernel.grad_j = call.grad_j;
  kernel.map = call.map;
  kernel.sum_i = call.sum_i;
  kernel.sum_j = call.sum_j;
  kernel.groups = static_cast<int>(geometry.batch.groups);
  kernel.items = static_cast<int>(geometry.batch.items);
  kernel.channels = static_cast<int>(geometry.channels);
  kernel.items_together = call.items_together();
  kernel.nx = static_cast<int>(sizes.x);
  kernel.ny = static_cast<int>(sizes.y);
  kernel.nz = static_cast<int>(sizes.z);
  kernel.tiles_x = tiling.tiles_x;
  kernel.tiles = tiling.tiles_x * tiling.tiles_y;
  kernel.planes = tiling.columns * sizes.z;
  const bool is_mean = geometry.reduction == Reduction::kMean;
  const bool divide_by_mask = is_mean && call.mask.present();
  const double scale = is_mean && !divide_by_mask && call.count() > 0
                           ? -1.0 / static_cast<double>(call.count())
                           : -1;
  kernel.scale = static_cast<T>(scale);

  if (geometry.map.count() == 0) {
    for (const char* name : {"output", "grad_pred", "grad_target"}) {
      if (is_map && name == std::string("output")) continue;
      if (raw.output(name).present) clear(device, raw.output(name));
    }
    return;
  }
  const int64_t elements = geometry.batch.groups * geometry.batch.items * geometry.channels;
  const unsigned groups = static_cast<unsigned>(kernel.groups);
  const dim3 grid(groups, static_cast<unsigned>(tiling.parts));
  if (!is_map) kernel.partial_sums = raw.output("partial_sums").as<T>();
  if (divide_by_mask) {
    mask_kernel<<<dim3(groups, kLnccMaxParts), kThreads, 0, device.stream>>>(kernel);
    check_launch();
    T* mask_sum = raw.output("mask_sum").as<T>();
    total_kernel<T><<<groups, kThreads, 0, device.stream>>>(kernel.partial_sums, kLnccMaxParts, 1.0,
                                                            nullptr, mask_sum);
    check_launch();
    kernel.mask_sum = mask_sum;
  }

  if (call.gradients > 0 && !geometry.fused) {
    T* pivots = raw.output("pivots").as<T>();
    pivot_kernel<<<static_cast<unsigned>(std::min<int64_t>(elements, 65535)), kThreads, 0,
                   device.stream>>>(kernel, pivots);
    check_launch();
    kernel.pivots = pivots;
    kernel.adjoint = raw.output("adjoint").as<T>();
    kernel.adjoint_stride = geometry.map.count();
  }
  if constexpr (sizeof(T) == 4) {
    const int window = geometry.fused ? geometry.kernel_size : 0;
    dispatch_bool(geometry.dimensions == 3, [&](auto is_volume) {
      auto launch = [&](auto tag) {
        constexpr int kWindow = decltype(tag)::value;
        if (window != kWindow) return;
        constexpr int kDepth = decltype(is_volume)::value ? kWindow : 1;
        launch_window<kWindow, kDepth>(device, kernel, call.gradients, grid);
      };
      launch(IntTag<3>{});
      launch(IntTag<5>{});
      launch(IntTag<7>{});
      launch(IntTag<9>{});
    });
  }
  if (!geometry.fused) {
    if (call.gradients == 0) launch_any<0>(device, kernel, grid);
    if (call.gradients == 1) launch_any<3>(device, kernel, grid);
    if (call.gradients == 2) launch_any<5>(device, kernel, grid);
  }
  if (is_map) return;
  total_kernel<<<groups, kThreads, 0, device.stream>>>(
      kernel.partial_sums, static_cast<int>(tiling.parts), scale, kernel.mask_sum,
      raw.output("output").as<T>());
  check_launch();
}

}  // namespace

void lncc_loss_cuda(const Context& context, const Call& call) {
  with_lncc_loss(call, [&](const auto& lncc) { lncc_run(Cuda(context), lncc, call); });
}
void lncc_loss_grad_cuda(const Context& context, const Call& call) {
  with_lncc_loss_grad(call, [&](const auto& lncc) { lncc_run(Cuda(context), lncc, call); });
}

}  // namespace reg

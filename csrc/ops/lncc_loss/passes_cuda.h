// Windows of any size on CUDA, by way of sums in memory.
//
// Four kernels, of which each takes the volume a number of planes at a time:
//   sums along z of values and products          (images -> sums)
//   sums along y and x, correlations             (sums -> adjoint fields, total)
//   sums along z of the adjoint fields           (adjoint fields -> sums)
//   sums along y and x, gradients                (sums -> gradients)
// A few planes at a time bound the memory that this takes. A thread computes some neighbouring
// sums, which share most of what they add up: per sum, a box takes three additions and what is left
// of the common part, whatever its size.
//
// The sums of products are in double precision, in which products of float32 are exact and their
// sums nearly so: one pivot then does for a whole image, so that all kernels can agree on it, and
// what a window's variance loses by being far from it is nothing to float32. Gradients are put
// together in T, though, so that it is 0 for images that fade into zeros.
#pragma once

#ifdef __CUDACC__

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/lncc_loss/call.h"
#include "ops/lncc_loss/tiles.h"
#include "ops/losses/finish.h"

namespace regkernels {

inline constexpr int kPassThreads = 256;
inline constexpr int kPassRows = kPassThreads / kWarp;  // a warp takes one row of the tile
inline constexpr int kDepthThreads = 128;

// What the kernels need to know.
template <class T>
struct LnccPassArguments {
  Window<T> window;
  int radius[3];  // along x, y and z
  double weight[3][kMaxRadius + 1];
  double depth_mass;              // the sum of the weights along z
  double inverse_mass, rounding;  // as the window has them, in double precision
  Channels<const T> image_i, image_j, mask, cotangent;
  Channels<T> grad_i, grad_j, map;
  bool add_i, add_j;                  // to the gradients of the items before
  int groups, items, channels, item;  // the one item to take, or -1 for all of them
  int nx, ny, nz;
  int tiles_x, tiles_y;
  LnccPasses passes;
  int64_t first, units;  // the units of planes to take now
  T scale;               // multiplies the gradient
  const T* mask_sum;     // (G) divides the scale; or null
  T* partial_sums;       // (G, kLnccPassParts) sums of the correlations; or null
  const T* pivots;       // (G, N, C, 2)
  double* sums;          // of the planes at hand: (G, units, planes, sums, Y, X)
  T* adjoint;            // (fields, G, N, C, Z, Y, X)
  int64_t adjoint_stride;
};

// Some planes of one item and channel.
struct PassUnit {
  int64_t item, channel, element;
  int z;  // the first plane
};
template <class T>
__device__ __forceinline__ PassUnit unit_at(const LnccPassArguments<T>& arguments, int64_t group,
                                            int64_t unit) {
  const int64_t rest = unit / arguments.passes.depth;
  PassUnit result;
  result.z = static_cast<int>(unit - rest * arguments.passes.depth) * arguments.passes.planes;
  result.item = arguments.item;
  result.channel = rest;
  if (arguments.item < 0) {
    result.item = rest / arguments.channels;
    result.channel = rest - result.item * arguments.channels;
  }
  result.element = (group * arguments.items + result.item) * arguments.channels + result.channel;
  return result;
}

// Sums that are computed together.
template <class S, int kCount>
struct Sums {
  S v[kCount];

  __device__ __forceinline__ void add(const Sums& other) {
    REGKERNELS_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += other.v[i];
  }
  __device__ __forceinline__ void add(S weight, const Sums& other) {
    REGKERNELS_UNROLL
    for (int i = 0; i < kCount; ++i) v[i] += weight * other.v[i];
  }
};

// Computes neighbouring window sums from the values that they span, load(0) being the first of the
// first window.
template <int kOut, class S, int kCount, class Load>
__device__ __forceinline__ void sum_spans(bool is_box, int radius, const S* weight,
                                          const Load& load, Sums<S, kCount> (&out)[kOut]) {
  if (is_box && 2 * radius >= kOut - 1) {
    // What all windows hold, and for each of them what comes before and what comes behind.
    Sums<S, kCount> sum{};
    out[kOut - 1] = sum;
    REGKERNELS_UNROLL
    for (int s = kOut - 2; s >= 0; --s) {
      sum.add(load(s));
      out[s] = sum;
    }
    sum = {};
#pragma unroll 4
    for (int i = kOut - 1; i <= 2 * radius; ++i) sum.add(load(i));
    out[0].add(sum);
    REGKERNELS_UNROLL
    for (int s = 1; s < kOut; ++s) {
      sum.add(load(2 * radius + s));
      out[s].add(sum);
    }
  } else {
    REGKERNELS_UNROLL
    for (int s = 0; s < kOut; ++s) out[s] = {};
    for (int i = 0; i < kOut + 2 * radius; ++i) {
      const Sums<S, kCount> value = load(i);
      REGKERNELS_UNROLL
      for (int s = 0; s < kOut; ++s) {
        const int distance = abs(i - s - radius);
        if (distance <= radius) out[s].add(weight[distance], value);
      }
    }
  }
}

template <class T>
struct Pivots {
  double i, j;
  __device__ __forceinline__ Pivots(const LnccPassArguments<T>& arguments, int64_t element)
      : i(arguments.pivots[2 * element]), j(arguments.pivots[2 * element + 1]) {}

  __device__ __forceinline__ Sums<double, kWindowSums> products(double value_i,
                                                                double value_j) const {
    const double a = value_i - i, b = value_j - j;
    return {{a, b, a * a, b * b, a * b}};
  }
};

// Calls body(group, unit) for the units of planes that are this block's.
template <class T, class Body>
__device__ __forceinline__ void for_each_unit(const LnccPassArguments<T>& arguments,
                                              const Body& body) {
  for (int64_t group = blockIdx.z; group < arguments.groups; group += gridDim.z) {
    for (int64_t unit = blockIdx.y; unit < arguments.units; unit += gridDim.y) body(group, unit);
  }
}

template <class T, int kPlanes>
__global__ void __launch_bounds__(kDepthThreads)
    sum_image_depth_kernel(const __grid_constant__ LnccPassArguments<T> arguments) {
  const int64_t plane = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDepthThreads + threadIdx.x;
  if (at >= plane) return;
  for_each_unit(arguments, [&](int64_t group, int64_t number) {
    const PassUnit unit = unit_at(arguments, group, arguments.first + number);
    const T* const image_i = arguments.image_i.at(group, unit.item, unit.channel) + at;
    const T* const image_j = arguments.image_j.at(group, unit.item, unit.channel) + at;
    const Pivots<T> pivots(arguments, unit.element);
    const int radius = arguments.radius[2];
    Sums<double, kWindowSums> out[kPlanes];
    // Where there are no voxels, images are 0.
    const auto load = [&](int i) {
      const int z = unit.z - radius + i;
      const bool inside = unsigned(z) < unsigned(arguments.nz);
      return pivots.products(inside ? image_i[z * plane] : T(0),
                             inside ? image_j[z * plane] : T(0));
    };
    sum_spans(arguments.window.rectangular, radius, arguments.weight[2], load, out);
    double* const to =
        arguments.sums + (group * arguments.units + number) * kPlanes * kWindowSums * plane + at;
    REGKERNELS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      if (unit.z + p >= arguments.nz) break;
      REGKERNELS_UNROLL
      for (int s = 0; s < kWindowSums; ++s) to[(p * kWindowSums + s) * plane] = out[p].v[s];
    }
  });
}

template <class T, int kPlanes, int kFields>
__global__ void __launch_bounds__(kDepthThreads)
    sum_adjoint_depth_kernel(const __grid_constant__ LnccPassArguments<T> arguments) {
  const int64_t plane = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDepthThreads + threadIdx.x;
  if (at >= plane) return;
  for_each_unit(arguments, [&](int64_t group, int64_t number) {
    const PassUnit unit = unit_at(arguments, group, arguments.first + number);
    const T* const adjoint = arguments.adjoint + unit.element * arguments.nz * plane + at;
    const int radius = arguments.radius[2];
    Sums<T, kFields> out[kPlanes];
    const auto load = [&](int i) {
      const int z = unit.z - radius + i;
      Sums<T, kFields> fields{};
      if (unsigned(z) < unsigned(arguments.nz)) {
        REGKERNELS_UNROLL
        for (int f = 0; f < kFields; ++f) {
          fields.v[f] = adjoint[f * arguments.adjoint_stride + z * plane];
        }
      }
      return fields;
    };
    sum_spans(arguments.window.rectangular, radius, arguments.window.weight[2], load, out);
    T* const to = reinterpret_cast<T*>(arguments.sums) +
                  (group * arguments.units + number) * kPlanes * kFields * plane + at;
    REGKERNELS_UNROLL
    for (int p = 0; p < kPlanes; ++p) {
      if (unit.z + p >= arguments.nz) break;
      REGKERNELS_UNROLL
      for (int f = 0; f < kFields; ++f) to[(p * kFields + f) * plane] = out[p].v[f];
    }
  });
}

// Stores the gradients at a voxel, or adds them to what is there, from the complete sums of the
// adjoint fields.
template <int kFields, class T>
__device__ __forceinline__ void store_gradients(T scale, T value_i, T value_j,
                                                const T (&sums)[kFields], bool add_i, T* to_i,
                                                bool add_j, T* to_j) {
  const T gradient = scale * assemble(value_i, value_j, sums[0], sums[1], sums[2]);
  *to_i = add_i ? *to_i + gradient : gradient;
  if constexpr (kFields == 5) {
    const T other = scale * assemble(value_j, value_i, sums[0], sums[3], sums[4]);
    *to_j = add_j ? *to_j + other : other;
  }
}

// The part of a plane that a block sums up along y and x: `kCount` arrays of kPassRows rows. A
// thread takes kStrip sums along a row, an odd number, so that a warp's meet different banks.
template <class S, int kCount, int kStrip>
struct PlaneTile {
  static constexpr int kWidth = kWarp * kStrip;
  S* memory;
  int stride;  // the width with the halo

  __device__ __forceinline__ S* row(int array, int row) const {
    return memory + (array * kPassRows + row) * stride;
  }

  // Leaves the sums of the tile's own columns at the beginning of its rows, which belong to the
  // warp that then reads them. `planes` holds kCount planes; outside of them is outside(array).
  template <class T, class Outside>
  __device__ __forceinline__ void sum(const LnccPassArguments<T>& arguments,
                                      const S (&weight)[3][kMaxRadius + 1], int x0, int y0,
                                      const S* planes, const Outside& outside) const {
    const bool is_box = arguments.window.rectangular;
    const int radius_x = arguments.radius[0], radius_y = arguments.radius[1];
    const int nx = arguments.nx, first = y0 - radius_y;
    __syncthreads();
    for (int i = threadIdx.x; i < kCount * stride; i += kPassThreads) {
      const int array = i / stride, column = i - array * stride;
      const int x = x0 - radius_x + column;
      const bool column_inside = x >= 0 && x < nx;
      const S* const from = planes + (static_cast<int64_t>(array) * arguments.ny + first) * nx + x;
      const S rest = outside(array);
      Sums<S, 1> out[kPassRows];
      sum_spans(
          is_box, radius_y, weight[1],
          [&](int k) {
            const bool inside = column_inside && unsigned(first + k) < unsigned(arguments.ny);
            return Sums<S, 1>{{inside ? from[k * static_cast<int64_t>(nx)] : rest}};
          },
          out);
      REGKERNELS_UNROLL
      for (int r = 0; r < kPassRows; ++r) row(array, r)[column] = out[r].v[0];
    }
    __syncthreads();
    const int lane = threadIdx.x % kWarp;
    REGKERNELS_UNROLL
    for (int array = 0; array < kCount; ++array) {
      S* const mine = row(array, threadIdx.x / kWarp);
      Sums<S, 1> out[kStrip];
      sum_spans(
          is_box, radius_x, weight[0], [&](int k) { return Sums<S, 1>{{mine[lane * kStrip + k]}}; },
          out);
      __syncwarp();
      REGKERNELS_UNROLL
      for (int s = 0; s < kStrip; ++s) mine[lane * kStrip + s] = out[s].v[0];
    }
    __syncwarp();
  }
};

// Calls body(unit, number of the unit, plane of the unit, x0, y0) for the tiles of one group that
// are this block's.
template <class T, int kStrip, class Body>
__device__ __forceinline__ void for_each_tile(const LnccPassArguments<T>& arguments, int64_t group,
                                              const Body& body) {
  const int planes = arguments.passes.planes;
  const int64_t tiles = static_cast<int64_t>(arguments.tiles_x) * arguments.tiles_y;
#pragma unroll 1
  for (int64_t task = blockIdx.y; task < arguments.units * planes * tiles; task += gridDim.y) {
    const int64_t plane = task / tiles;
    const int tile = static_cast<int>(task - plane * tiles);
    const int64_t number = plane / planes;
    const int p = static_cast<int>(plane - number * planes);
    const PassUnit unit = unit_at(arguments, group, arguments.first + number);
    if (unit.z + p >= arguments.nz) continue;
    const int tile_y = tile / arguments.tiles_x, tile_x = tile - tile_y * arguments.tiles_x;
    body(unit, number, p, tile_x * kWarp * kStrip, tile_y * kPassRows);
  }
}

template <class T, int kFields, int kStrip>
__global__ void __launch_bounds__(kPassThreads, 4)
    correlate_planes_kernel(const __grid_constant__ LnccPassArguments<T> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ T scratch[kPassThreads / kWarp];
  using Tile = PlaneTile<double, kWindowSums, kStrip>;
  const Tile tile{reinterpret_cast<double*>(memory), Tile::kWidth + 2 * arguments.radius[0]};
  const Window<T>& window = arguments.window;
  const int64_t plane = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const int64_t group = blockIdx.x;
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T total = 0;
  for_each_tile<T, kStrip>(
      arguments, group, [&](const PassUnit& unit, int64_t number, int p, int x0, int y0) {
        const double* const sums =
            arguments.sums + ((group * arguments.units + number) * arguments.passes.planes + p) *
                                 kWindowSums * plane;
        const Pivots<T> pivots(arguments, unit.element);
        tile.sum(arguments, arguments.weight, x0, y0, sums, [&](int s) {
          const double first = s == 1 || s == 3 ? -pivots.j : -pivots.i;
          const double second = s < 2 ? 1.0 : s == 2 ? -pivots.i : -pivots.j;
          return arguments.depth_mass * first * second;
        });
        const int y = y0 + row, z = unit.z + p;
        if (y >= arguments.ny) return;
        const T* const mask =
            arguments.mask.present() ? arguments.mask.at(group, unit.item, unit.channel) : nullptr;
        const T* const cotangent = arguments.cotangent.present()
                                       ? arguments.cotangent.at(group, unit.item, unit.channel)
                                       : nullptr;
        T* const map =
            arguments.map.present() ? arguments.map.at(group, unit.item, unit.channel) : nullptr;
#pragma unroll 1
        for (int k = 0; k < kStrip; ++k) {
          const int column = k * kWarp + lane, x = x0 + column;
          if (x >= arguments.nx) break;
          double window_sums[kWindowSums];
          REGKERNELS_UNROLL
          for (int s = 0; s < kWindowSums; ++s) window_sums[s] = tile.row(s, row)[column];
          const auto moments =
              window_moments<T>(window_sums, arguments.inverse_mass, arguments.rounding);
          Correlation<T> at = correlate(moments, window);
          const int64_t in_volume = z * plane + static_cast<int64_t>(y) * arguments.nx + x;
          const T weight = mask != nullptr ? mask[in_volume] : T(1);
          at.ncc *= weight;
          total += at.ncc;
          if (map != nullptr) map[in_volume] = -at.ncc;
          if constexpr (kFields > 0) {
            T fields[kFields];
            adjoint_fields(at, at.mean_i, at.mean_j, fields);
            const T factor = cotangent != nullptr ? weight * cotangent[in_volume] : weight;
            T* const to = arguments.adjoint + unit.element * arguments.nz * plane + in_volume;
            REGKERNELS_UNROLL
            for (int f = 0; f < kFields; ++f) {
              to[f * arguments.adjoint_stride] = factor * fields[f];
            }
          }
        }
      });
  if (arguments.partial_sums != nullptr) {
    const T sum = block_sum<kPassThreads>(total, scratch);
    T* const to = arguments.partial_sums + group * kLnccPassParts + blockIdx.y;
    // The planes before have left theirs.
    if (threadIdx.x == 0) *to = arguments.first == 0 ? sum : *to + sum;
  }
}

template <class T, int kFields, int kStrip>
__global__ void __launch_bounds__(kPassThreads, 4)
    assemble_planes_kernel(const __grid_constant__ LnccPassArguments<T> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  using Tile = PlaneTile<T, kFields, kStrip>;
  const Tile tile{reinterpret_cast<T*>(memory), Tile::kWidth + 2 * arguments.radius[0]};
  const int64_t plane = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const int64_t group = blockIdx.x;
  const int row = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T scale = arguments.scale;
  if (arguments.mask_sum != nullptr) {
    const T sum = arguments.mask_sum[group];
    scale = sum > 0 ? scale / sum : T(0);
  }
  for_each_tile<T, kStrip>(
      arguments, group, [&](const PassUnit& unit, int64_t number, int p, int x0, int y0) {
        const T* const sums =
            reinterpret_cast<const T*>(arguments.sums) +
            ((group * arguments.units + number) * arguments.passes.planes + p) * kFields * plane;
        tile.sum(arguments, arguments.window.weight, x0, y0, sums, [](int) { return T(0); });
        const int y = y0 + row;
        if (y >= arguments.ny) return;
        const int64_t first =
            (unit.z + p) * plane + static_cast<int64_t>(y) * arguments.nx + x0 + lane;
        const T* const image_i = arguments.image_i.at(group, unit.item, unit.channel) + first;
        const T* const image_j = arguments.image_j.at(group, unit.item, unit.channel) + first;
        T* const grad_i = arguments.grad_i.at(group, unit.item, unit.channel) + first;
        T* const grad_j =
            kFields == 5 ? arguments.grad_j.at(group, unit.item, unit.channel) + first : nullptr;
        const T* const pivots = arguments.pivots + 2 * unit.element;
        REGKERNELS_UNROLL
        for (int k = 0; k < kStrip; ++k) {
          const int column = k * kWarp + lane;
          if (x0 + column >= arguments.nx) break;
          T complete[kFields];
          REGKERNELS_UNROLL
          for (int f = 0; f < kFields; ++f) complete[f] = tile.row(f, row)[column];
          store_gradients(scale, image_i[k * kWarp] - pivots[0], image_j[k * kWarp] - pivots[1],
                          complete, arguments.add_i, grad_i + k * kWarp, arguments.add_j,
                          kFields == 5 ? grad_j + k * kWarp : nullptr);
        }
      });
}

// The width of tiles, in warps, that wastes least on halos and beyond the volume's edge.
inline int pass_strip(int nx, int radius) {
  const auto cost = [&](int strip) {
    const int width = kWarp * strip;
    return static_cast<int64_t>((nx + width - 1) / width) * (width + 2 * radius);
  };
  return cost(5) < cost(3) ? 5 : 3;
}

// Runs the passes. Where the items of a group share a gradient, one is added after the other.
template <int kFields, class T>
void run_passes(const Cuda& device, LnccPassArguments<T> arguments, const LnccCall& checked,
                bool items_share) {
  const LnccPasses& passes = arguments.passes;
  const int64_t plane = static_cast<int64_t>(arguments.nx) * arguments.ny;
  const unsigned groups = static_cast<unsigned>(arguments.groups);
  const auto with_planes = [&](const auto& body) {
    passes.planes == 1 ? body(IntTag<1>{}) : body(IntTag<kLnccPassPlanes>{});
  };
  const auto along_depth = [&](auto* kernel) {
    const dim3 grid(static_cast<unsigned>((plane + kDepthThreads - 1) / kDepthThreads),
                    static_cast<unsigned>(std::min<int64_t>(arguments.units, 65535)),
                    std::min(groups, 65535u));
    kernel<<<grid, kDepthThreads, 0, device.stream>>>(arguments);
    check_launch();
  };
  const int strip = pass_strip(arguments.nx, arguments.radius[0]);
  arguments.tiles_x = (arguments.nx + kWarp * strip - 1) / (kWarp * strip);
  arguments.tiles_y = (arguments.ny + kPassRows - 1) / kPassRows;
  const auto in_planes = [&](auto* kernel, int64_t parts, int64_t element_bytes) {
    const int64_t bytes =
        kPassRows * element_bytes * (kWarp * strip + 2 * static_cast<int64_t>(arguments.radius[0]));
    allow_shared_memory(kernel, bytes);
    kernel<<<dim3(groups, static_cast<unsigned>(parts)), kPassThreads, bytes, device.stream>>>(
        arguments);
    check_launch();
  };
  const auto for_each_part = [&](int64_t all, const auto& body) {
    for (arguments.first = 0; arguments.first < all; arguments.first += passes.together) {
      arguments.units = std::min(passes.together, all - arguments.first);
      body();
    }
  };

  arguments.item = -1;
  const int64_t units = checked.channels * passes.depth;
  for_each_part(units * arguments.items, [&] {
    with_planes(
        [&](auto planes) { along_depth(&sum_image_depth_kernel<T, decltype(planes)::value>); });
    const int64_t parts = passes.parts;
    constexpr int64_t kBytes = kWindowSums * sizeof(double);
    strip == 5 ? in_planes(&correlate_planes_kernel<T, kFields, 5>, parts, kBytes)
               : in_planes(&correlate_planes_kernel<T, kFields, 3>, parts, kBytes);
  });
  if constexpr (kFields > 0) {
    const int items = items_share ? arguments.items : 1;
    const bool add_i = arguments.add_i, add_j = arguments.add_j;
    for (int item = 0; item < items; ++item) {
      if (items_share) arguments.item = item;
      arguments.add_i = add_i && item > 0;
      arguments.add_j = add_j && item > 0;
      for_each_part(items_share ? units : units * arguments.items, [&] {
        with_planes([&](auto planes) {
          along_depth(&sum_adjoint_depth_kernel<T, decltype(planes)::value, kFields>);
        });
        const int64_t tiles =
            static_cast<int64_t>(arguments.tiles_x) * arguments.tiles_y * passes.planes;
        const int64_t parts = std::min<int64_t>(arguments.units * tiles, 65535);
        constexpr int64_t kBytes = kFields * sizeof(T);
        strip == 5 ? in_planes(&assemble_planes_kernel<T, kFields, 5>, parts, kBytes)
                   : in_planes(&assemble_planes_kernel<T, kFields, 3>, parts, kBytes);
      });
    }
  }
}

}  // namespace regkernels

#endif

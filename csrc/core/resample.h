// Sampling one array at the positions that an affine and a vector field give, and the gradients of
// that. `interpolate` (images, channels first) and `compose` (fields, channels last) are both this.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/check.h"
#include "core/for_each.h"
#include "core/geometry.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "core/sampling.h"

namespace reg {

// Where the channels of a voxel lie. Offsets count voxels.
struct ChannelsFirst {
  int64_t channels;
  int64_t volume;  // voxels from one channel to the next
  REG_HD int64_t count() const { return channels; }
  REG_HD int64_t at(int64_t voxel, int64_t channel) const { return channel * volume + voxel; }
};

template <int D>
struct ChannelsLast {
  REG_HD constexpr int count() const { return D; }
  REG_HD int64_t at(int64_t voxel, int channel) const { return voxel * D + channel; }
};

template <class Scalar, int kD, bool kHasAffine, class InLayout>
struct Resampling {
  using T = Scalar;
  static constexpr int D = kD;
  static constexpr bool kAffine = kHasAffine;
  using Layout = InLayout;
  using Map = PositionMap<T, D, kAffine>;

  Map map;
  Sampling sampling;
  Layout in_layout;
  Layout out_layout;
  Operand<const T> input;
  Operand<const T> affine;
  Operand<const T> field;

  // One batch element, ready to be asked for positions.
  struct Element {
    const Resampling* self;
    const T* input;
    const T* field;
    typename Map::Item item;

    REG_HD int64_t voxel_offset(const Voxel& voxel) const {
      const auto& size = self->map.out.size;
      return static_cast<int64_t>(voxel.z * size[1] + voxel.y) * size[0] + voxel.x;
    }
    REG_HD Vec<T, D> vector(const Voxel& voxel) const {
      if (field == nullptr) return Vec<T, D>{};
      return load_vec<T, D>(field + voxel_offset(voxel) * D);
    }
    REG_HD Neighbourhood<T, D> locate(const Voxel& voxel, const Vec<T, D>& u) const {
      return neighbourhood(self->map.position(item, voxel.index<D>(), u), self->map.in.size,
                           self->sampling);
    }
  };

  REG_HD Element element(int64_t group, int64_t n) const {
    Element result;
    result.self = this;
    result.input = input.at(group, n);
    result.field = field.data == nullptr ? nullptr : field.at(group, n);
    result.item = map.item(kAffine ? affine.at(group, n) : nullptr);
    return result;
  }
};

template <class R>
struct ResampleForward {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = R::kAffine ? 4 : 1;

  R resampling;
  Operand<T> output;
  bool add_field;  // channels last only: output = field + sample

  struct Element {
    typename R::Element source;
    const ResampleForward* self;
    T* output;

    REG_HD void operator()(const Voxel& voxel) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const auto at = source.locate(voxel, u);
      T weight[1 << D];
      int64_t offset[1 << D];
      REG_UNROLL
      for (int corner = 0; corner < (1 << D); ++corner) {
        weight[corner] = at.weight(corner);
        offset[corner] = at.offset(corner);
      }
#ifndef __CUDA_ARCH__
      const bool full = at.full();
#endif
      auto sample = [&](auto channel) {
        T sum = 0;
#ifndef __CUDA_ARCH__
        if (full) {
          for (int corner = 0; corner < (1 << D); ++corner) {
            sum += weight[corner] * source.input[r.in_layout.at(offset[corner], channel)];
          }
          return sum;
        }
#endif
        REG_UNROLL
        for (int corner = 0; corner < (1 << D); ++corner) {
          if (weight[corner] != 0) {
            sum += weight[corner] * source.input[r.in_layout.at(offset[corner], channel)];
          }
        }
        return sum;
      };
      if constexpr (std::is_same_v<typename R::Layout, ChannelsFirst>) {
        const int64_t target = source.voxel_offset(voxel);
        for (int64_t channel = 0; channel < r.in_layout.count(); ++channel) {
          const T value = sample(channel);
          if (voxel.active) output[r.out_layout.at(target, channel)] = value;
        }
      } else {
        Vec<T, D> value;
        REG_UNROLL
        for (int k = 0; k < D; ++k) value[k] = sample(k) + (self->add_field ? u[k] : T(0));
        const int64_t row = static_cast<int64_t>(voxel.z * r.map.out.size[1] + voxel.y);
        store_packed(output + row * voxel.row_size * D, voxel, value);
      }
    }
  };

  REG_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, output.at(group, item)};
  }
};

// dot[corner] += g * value at the corner, for one channel: what derivatives with respect to the
// position are made of.
template <class R>
REG_HD void accumulate_corners(const R& r, const typename R::Element& source,
                               const Neighbourhood<typename R::T, R::D>& at, int64_t channel,
                               typename R::T g, typename R::T (&dot)[1 << R::D]) {
#ifndef __CUDA_ARCH__
  if (at.full()) {
    for (int corner = 0; corner < (1 << R::D); ++corner) {
      dot[corner] += g * source.input[r.in_layout.at(at.offset(corner), channel)];
    }
    return;
  }
#endif
  REG_UNROLL
  for (int corner = 0; corner < (1 << R::D); ++corner) {
    if (at.inside(corner)) {
      dot[corner] += g * source.input[r.in_layout.at(at.offset(corner), channel)];
    }
  }
}

// The gradient with respect to the field. A field shared by all items (`shared_items` > 1) sums
// over them here, in one thread, so that nobody else writes to it.
template <class R>
struct FieldGradient {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = R::kAffine ? 4 : 1;

  R resampling;
  Operand<const T> grad_output;
  Operand<T> grad_field;
  bool add_field;
  int64_t shared_items;  // 1, or the number of items that share the field

  struct Element {
    typename R::Element first;
    const FieldGradient* self;
    int64_t group, item;

    REG_HD void add_item(const typename R::Element& source, int64_t n, const Voxel& voxel,
                         Vec<T, D>& total) const {
      const R& r = self->resampling;
      const T* grad = self->grad_output.at(group, n);
      const auto at = source.locate(voxel, source.vector(voxel));
      const int64_t here = source.voxel_offset(voxel);
      T dot[1 << D] = {};
      for (int channel = 0; channel < r.in_layout.count(); ++channel) {
        const T g = grad[r.out_layout.at(here, channel)];
        accumulate_corners(r, source, at, channel, g, dot);
        if constexpr (!std::is_same_v<typename R::Layout, ChannelsFirst>) {
          if (self->add_field) total[channel] += g;
        }
      }
      const Vec<T, D> grad_u = r.map.pull_back(source.item, position_gradient(at, dot));
      REG_UNROLL
      for (int k = 0; k < D; ++k) total[k] += grad_u[k];
    }

    REG_HD void operator()(const Voxel& voxel) const {
      Vec<T, D> total{};
      add_item(first, item, voxel, total);
      for (int64_t n = 1; n < self->shared_items; ++n) {
        add_item(self->resampling.element(group, n), n, voxel, total);
      }
      const int64_t row =
          static_cast<int64_t>(voxel.z * self->resampling.map.out.size[1] + voxel.y);
      store_packed(self->grad_field.at(group, item) + row * voxel.row_size * D, voxel, total);
    }
  };

  REG_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, group, item};
  }
};

// The sums over voxels that the gradient of an affine is made of: for each row j of the affine,
// grad_p[j] * q[k] and grad_p[j] itself, with q what the matrix acts on (see PositionMap::source).
template <class R>
struct AffineMoments {
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kSums = D * (D + 1);

  R resampling;
  Operand<const T> grad_output;

  struct Element {
    typename R::Element source;
    const AffineMoments* self;
    const T* grad;

    REG_HD void operator()(const Voxel& voxel, T (&sums)[kSums]) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const auto at = source.locate(voxel, u);
      const int64_t here = source.voxel_offset(voxel);
      T dot[1 << D] = {};
      for (int channel = 0; channel < r.in_layout.count(); ++channel) {
        accumulate_corners(r, source, at, channel, grad[r.out_layout.at(here, channel)], dot);
      }
      const Vec<T, D> grad_p = position_gradient(at, dot);
      const Vec<T, D> q = r.map.source(voxel.index<D>(), u);
      REG_UNROLL
      for (int j = 0; j < D; ++j) {
        REG_UNROLL
        for (int k = 0; k < D; ++k) sums[j * (D + 1) + k] += grad_p[j] * q[k];
        sums[j * (D + 1) + D] += grad_p[j];
      }
    }
  };

  REG_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, grad_output.at(group, item)};
  }

  // From a sum to the gradient of entry (j, k), in normalised units.
  REG_HD double scale(int entry) const {
    const int j = entry / (D + 1), k = entry % (D + 1);
    const double half = resampling.map.in.half[j];
    return k == D ? half : half * resampling.map.out.inverse[k];
  }
};

// ---- Scatter on the CPU -------------------------------------------------------------------------
//
// Each task owns a slab of the target (along its slowest axis) and walks over all source rows in
// order, so every target voxel receives its contributions in the same order however the target is
// cut: the result does not depend on the number of threads. A first pass notes for each source row
// which slabs it can reach, so that a task skips the rows of others.

// Adds one voxel's contributions, as far as they fall on [low, high) of the slowest axis.
template <class R>
inline void scatter_voxel(const R& resampling, const typename R::Element& source,
                          const Voxel& voxel, int low, int high, const typename R::T* grad,
                          typename R::T* target) {
  using T = typename R::T;
  constexpr int D = R::D;
  auto at = source.locate(voxel, source.vector(voxel));
  Cell<T>& slow = at.axis[D - 1];
  if (slow.index + 1 < low || slow.index >= high) return;
  if (slow.index < low) slow.weight[0] = 0;
  if (slow.index + 1 >= high) slow.weight[1] = 0;
  T weight[1 << D];
  int64_t offset[1 << D];
  for (int corner = 0; corner < (1 << D); ++corner) {
    weight[corner] = at.weight(corner);
    offset[corner] = at.offset(corner);
  }
  const bool full = at.full();
  const int64_t here = source.voxel_offset(voxel);
  for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
    const T g = grad[resampling.out_layout.at(here, channel)];
    if (full) {
      for (int corner = 0; corner < (1 << D); ++corner) {
        target[resampling.in_layout.at(offset[corner], channel)] += weight[corner] * g;
      }
    } else {
      for (int corner = 0; corner < (1 << D); ++corner) {
        if (weight[corner] == 0) continue;
        target[resampling.in_layout.at(offset[corner], channel)] += weight[corner] * g;
      }
    }
  }
}

template <class R>
void scatter(const Cpu&, const VoxelSpace& space, const R& resampling,
             const Operand<const typename R::T>& grad_output, const Tensor& grad_input,
             int32_t* row_bounds) {
  using T = typename R::T;
  constexpr int D = R::D;
  const int64_t rows = space.rows();
  const int slow_size = resampling.map.in.size[D - 1];

  auto voxel_at = [&](int64_t row, int x) {
    return Voxel{
        static_cast<int>(row / space.y), static_cast<int>(row % space.y), x, true, x, space.x};
  };

  auto find_bounds = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows;
      const auto source = resampling.element(b / space.items, b % space.items);
      int32_t low = INT32_MAX, high = INT32_MIN;
      for (int x = 0; x < space.x; ++x) {
        const Voxel voxel = voxel_at(i - b * rows, x);
        const Vec<T, D> p =
            resampling.map.position(source.item, voxel.index<D>(), source.vector(voxel));
        const int index = locate(p[D - 1], slow_size, resampling.sampling).index;
        low = std::min(low, index);
        high = std::max(high, index + 1);
      }
      row_bounds[2 * i] = low;
      row_bounds[2 * i + 1] = high;
    }
  };
  parallel_for(space.batch() * rows, std::max<int64_t>(1, 4096 / space.x), find_bounds);

  int64_t slow_stride = 1;
  for (int k = 0; k + 1 < D; ++k) slow_stride *= resampling.map.in.size[k];
  const int64_t targets = grad_input.shape[0] * grad_input.shape[1];
  const bool shared_input = grad_input.shape[1] != space.items;
  const Operand<T> target_operand(grad_input);
  const int64_t pieces =
      std::min<int64_t>(slow_size, targets >= 2 * num_threads() ? 1 : 2 * num_threads());
  const int64_t slab = (slow_size + pieces - 1) / pieces;

  auto fill_slabs = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t target_index = task / pieces;
      const int64_t group = target_index / grad_input.shape[1];
      const int64_t target_item = target_index % grad_input.shape[1];
      const int low = static_cast<int>(std::min<int64_t>(task % pieces * slab, slow_size));
      const int high = static_cast<int>(std::min<int64_t>(low + slab, slow_size));
      T* target = target_operand.at(group, target_item);
      for (int64_t channel = 0; channel < resampling.in_layout.count(); ++channel) {
        for (int64_t v = low * slow_stride; v < high * slow_stride; ++v) {
          target[resampling.in_layout.at(v, channel)] = 0;
        }
      }
      const int64_t first = shared_input ? 0 : target_item;
      const int64_t last = shared_input ? space.items : target_item + 1;
      for (int64_t n = first; n < last; ++n) {
        const auto source = resampling.element(group, n);
        const T* grad = grad_output.at(group, n);
        const int32_t* bounds = row_bounds + 2 * (group * space.items + n) * rows;
        for (int64_t row = 0; row < rows; ++row) {
          if (bounds[2 * row + 1] < low || bounds[2 * row] >= high) continue;
          for (int x = 0; x < space.x; ++x) {
            scatter_voxel(resampling, source, voxel_at(row, x), low, high, grad, target);
          }
        }
      }
    }
  };
  parallel_for(targets * pieces, 1, fill_slabs);
}

#ifdef __CUDACC__

// ---- Scatter on CUDA ----------------------------------------------------------------------------
//
// Neighbouring voxels of a smooth warp add to mostly the same targets. A warp takes 8 x 4 voxels of
// a plane and walks along z; each thread holds the contributions to the corners of its cell, and
// before anything goes to memory they are merged: the upper plane of a cell with the lower plane of
// the next one along z, the right corners with the left ones of the next thread, the far row with
// the near row of the next. Of eight atomic additions per voxel and channel little more than one is
// left. Merging compares addresses, so a field that is not smooth only merges less.

inline constexpr int kScatterTileX = 8;
inline constexpr int kScatterTileY = 4;
inline constexpr int kScatterWarpsX = 2;
inline constexpr int kScatterWarpsY = 4;
inline constexpr int kScatterDepth = 16;
inline constexpr int64_t kNowhere = INT64_MIN / 2;

// The contributions of one thread to a plane of its cell: corners (x, y) = 00, 10, 01, 11.
template <class T, int kChannels>
struct CellPlane {
  T value[4][kChannels];
};

template <class T, int kChannels, class Layout>
__device__ __forceinline__ void add_plane(const CellPlane<T, kChannels>& plane, int64_t base,
                                          int64_t stride_y, const Layout& layout, int64_t channel,
                                          T* target) {
  REG_UNROLL
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t voxel = base + (corner & 1) + (corner >> 1) * stride_y;
    REG_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const T value = plane.value[corner][c];
      if (value != 0) atomicAdd(target + layout.at(voxel, channel + c), value);
    }
  }
}

// Moves what threads next to each other add to the same voxel to one of them. All lanes take part.
template <class T, int kChannels>
__device__ __forceinline__ void merge_plane(CellPlane<T, kChannels>& plane, int64_t base,
                                            int64_t stride_y) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x & 31;
  const bool sends_right =
      lane % kScatterTileX < kScatterTileX - 1 && __shfl_down_sync(kAll, base, 1) == base + 1;
  REG_UNROLL
  for (int row = 0; row < 4; row += 2) {
    REG_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const T sent = sends_right ? plane.value[row + 1][c] : T(0);
      const T received = __shfl_up_sync(kAll, sent, 1);
      if (lane > 0) plane.value[row][c] += received;
      if (sends_right) plane.value[row + 1][c] = 0;
    }
  }
  const bool sends_up = lane < kWarp - kScatterTileX &&
                        __shfl_down_sync(kAll, base, kScatterTileX) == base + stride_y;
  REG_UNROLL
  for (int side = 0; side < 2; ++side) {
    REG_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const T sent = sends_up ? plane.value[2 + side][c] : T(0);
      const T received = __shfl_up_sync(kAll, sent, kScatterTileX);
      if (lane >= kScatterTileX) plane.value[side][c] += received;
      if (sends_up) plane.value[2 + side][c] = 0;
    }
  }
}

template <class R>
__global__ void __launch_bounds__(kWarp * kScatterWarpsX * kScatterWarpsY)
    scatter_kernel(const __grid_constant__ R resampling,
                   const __grid_constant__ Operand<const typename R::T> grad_output,
                   const __grid_constant__ Operand<typename R::T> grad_input,
                   const __grid_constant__ VoxelSpace space, int tiles_x) {
  using T = typename R::T;
  constexpr int D = R::D;
  constexpr bool kFirst = std::is_same_v<typename R::Layout, ChannelsFirst>;
  constexpr int kChannels = kFirst ? 1 : D;  // held in registers at a time
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tile_y = blockIdx.x / tiles_x, tile_x = blockIdx.x - tile_y * tiles_x;
  const int x =
      (tile_x * kScatterWarpsX + warp % kScatterWarpsX) * kScatterTileX + lane % kScatterTileX;
  const int y =
      (tile_y * kScatterWarpsY + warp / kScatterWarpsX) * kScatterTileY + lane / kScatterTileX;
  const bool active = x < space.x && y < space.y;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = b / space.items, item = b - group * space.items;
    const auto source = resampling.element(group, item);
    const T* grad = grad_output.at(group, item);
    T* target = grad_input.at(group, item);
    for (int64_t channel = 0; channel < resampling.in_layout.count(); channel += kChannels) {
      for (int z0 = blockIdx.y * kScatterDepth; z0 < space.z; z0 += gridDim.y * kScatterDepth) {
        CellPlane<T, kChannels> above = {};  // waits to be merged with the next plane
        int64_t above_base = kNowhere;
        int64_t stride_y = 0;
        const int last = min(z0 + kScatterDepth, space.z);
        for (int z = z0; z < last; ++z) {
          CellPlane<T, kChannels> plane = {}, next = {};
          int64_t base = kNowhere, stride_z = 0;
          if (active) {
            const Voxel voxel{z, y, x, true, x, space.x};
            const auto at = source.locate(voxel, source.vector(voxel));
            const int64_t here = source.voxel_offset(voxel);
            base = at.base;
            REG_UNROLL
            for (int c = 0; c < kChannels; ++c) {
              const T g = grad[resampling.out_layout.at(here, channel + c)];
              REG_UNROLL
              for (int corner = 0; corner < 4; ++corner) {
                plane.value[corner][c] = at.weight(corner) * g;
                if constexpr (D == 3) next.value[corner][c] = at.weight(corner + 4) * g;
              }
            }
          }
          stride_y = resampling.map.in.size[0];
          if constexpr (D == 3) {
            stride_z = stride_y * resampling.map.in.size[1];
            if (base == above_base) {
              REG_UNROLL
              for (int corner = 0; corner < 4; ++corner) {
                REG_UNROLL
                for (int c = 0; c < kChannels; ++c) {
                  plane.value[corner][c] += above.value[corner][c];
                }
              }
            } else {
              add_plane(above, above_base, stride_y, resampling.in_layout, channel, target);
            }
          }
          merge_plane(plane, base, stride_y);
          add_plane(plane, base, stride_y, resampling.in_layout, channel, target);
          above = next;
          above_base = base + stride_z;
        }
        if constexpr (D == 3) {
          merge_plane(above, above_base, stride_y);
          add_plane(above, above_base, stride_y, resampling.in_layout, channel, target);
        }
      }
    }
  }
}

template <class R>
void scatter(const Cuda& device, const VoxelSpace& space, const R& resampling,
             const Operand<const typename R::T>& grad_output, const Tensor& grad_input, int32_t*) {
  clear(device, grad_input);
  if (space.batch() == 0) return;
  constexpr int kBlockX = kScatterTileX * kScatterWarpsX, kBlockY = kScatterTileY * kScatterWarpsY;
  const int64_t tiles_x = (space.x + kBlockX - 1) / kBlockX;
  const int64_t tiles_y = (space.y + kBlockY - 1) / kBlockY;
  const int64_t tiles_z = (space.z + kScatterDepth - 1) / kScatterDepth;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  scatter_kernel<<<grid, kWarp * kScatterWarpsX * kScatterWarpsY, 0, device.stream>>>(
      resampling, grad_output, Operand<typename R::T>(grad_input), space,
      static_cast<int>(tiles_x));
  check_launch();
}

#endif

// ---- Launches -----------------------------------------------------------------------------------

// Everything that a call needs to know, independent of dtype and dimensions.
struct ResampleCall {
  const Tensor* input = nullptr;
  const Tensor* affine = nullptr;
  const Tensor* field = nullptr;
  Sizes in_sizes;
  Sizes out_sizes;
  int dimensions = 3;
  Placement placement = Placement::kAffineFirst;
  Sampling sampling;
  bool channels_last = false;
  bool add_field = false;
  int64_t groups = 1;
  int64_t items = 1;
  // Gradients only.
  const Tensor* grad_output = nullptr;
  const Tensor* grad_input = nullptr;
  const Tensor* grad_affine = nullptr;
  const Tensor* grad_field = nullptr;
  const Tensor* row_bounds = nullptr;
  const Tensor* partial_sums = nullptr;
};

template <class T, int D, bool kAffine, class Layout>
Resampling<T, D, kAffine, Layout> make_resampling(const ResampleCall& call, Layout in_layout,
                                                  Layout out_layout) {
  Resampling<T, D, kAffine, Layout> r;
  const int64_t in[3] = {call.in_sizes.x, call.in_sizes.y, call.in_sizes.z};
  const int64_t out[3] = {call.out_sizes.x, call.out_sizes.y, call.out_sizes.z};
  r.map.placement = call.placement;
  r.map.in = make_frame<T, D>(in, call.sampling.align_corners);
  r.map.out = make_frame<T, D>(out, call.sampling.align_corners);
  for (int k = 0; k < D; ++k) {
    r.map.ratio[k] = in[k] == out[k] ? T(1) : r.map.in.half[k] * r.map.out.inverse[k];
  }
  r.sampling = call.sampling;
  r.in_layout = in_layout;
  r.out_layout = out_layout;
  r.input = Operand<const T>(*call.input);
  if (kAffine) r.affine = Operand<const T>(*call.affine);
  r.field = Operand<const T>(*call.field);
  return r;
}

// Calls body(resampling) with the concrete type for this call.
template <bool kChannelsLast, class Body>
void with_resampling(const ResampleCall& call, const Body& body) {
  dispatch_dtype(call.input->dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(call.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      const bool affine = call.affine->present && call.placement != Placement::kFull;
      dispatch_bool(affine, [&](auto has_affine) {
        constexpr bool kAffine = decltype(has_affine)::value;
        if constexpr (kChannelsLast) {
          body(make_resampling<T, D, kAffine>(call, ChannelsLast<D>{}, ChannelsLast<D>{}));
        } else {
          const int64_t channels = call.input->shape[2];
          body(make_resampling<T, D, kAffine>(call, ChannelsFirst{channels, call.in_sizes.voxels()},
                                              ChannelsFirst{channels, call.out_sizes.voxels()}));
        }
      });
    });
  });
}

template <bool kChannelsLast, class Device>
void resample_forward(const Device& device, const ResampleCall& call, const Tensor& output) {
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_resampling<kChannelsLast>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    ResampleForward<R> body{resampling, Operand<typename R::T>(output), call.add_field};
    for_each_voxel(device, space, body);
  });
}

template <bool kChannelsLast, class Device>
void resample_backward(const Device& device, const ResampleCall& call) {
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_resampling<kChannelsLast>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    using T = typename R::T;
    const Operand<const T> grad_output(*call.grad_output);
    if (call.grad_field->present) {
      const bool shared = call.grad_field->shape[1] != call.items;
      VoxelSpace outer = space;
      if (shared) outer.items = 1;
      if (space.items > 0) {
        for_each_voxel(device, outer,
                       FieldGradient<R>{resampling, grad_output, Operand<T>(*call.grad_field),
                                        call.add_field, shared ? space.items : 1});
      } else {
        clear(device, *call.grad_field);
      }
    }
    if (call.grad_input->present) {
      scatter(device, space, resampling, grad_output, *call.grad_input,
              call.row_bounds->template as<int32_t>());
    }
    if constexpr (R::kAffine) {
      if (call.grad_affine->present) {
        const AffineMoments<R> body{resampling, grad_output};
        reduce_voxels(device, space, body, *call.partial_sums, *call.grad_affine);
      }
    } else if (call.grad_affine->present) {
      clear(device, *call.grad_affine);  // a full warp ignores the affine
    }
  });
}

}  // namespace reg

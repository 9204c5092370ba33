// The gradient of the array that is sampled, on the CPU.
//
// Each task owns a slab of the target (along its slowest axis) and walks over all source rows in
// order, so every target voxel receives its contributions in the same order however the target is
// cut: the result does not depend on the number of threads. A first pass notes for each source row
// which slabs it can reach, so that a task skips the rows of others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/thread_pool.h"
#include "resample/resampling.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

// Adds the contributions of one voxel that fall on [low, high) of the slowest axis.
template <class R>
inline void scatter_voxel(const R& resampling, const typename R::Element& source,
                          const Voxel& voxel, int low, int high, const typename R::S* grad,
                          typename R::T* target) {
  using T = typename R::T;
  constexpr int D = R::D;
  const Vec<T, D> p = source.position(voxel, source.vector(voxel));
  const int slow =
      locate(p[D - 1], resampling.map.in.size[D - 1], resampling.boundary.sampling).index;
  if (slow + 1 < low || slow >= high) return;
  T weight[1 << D];
  int64_t offset[1 << D];
  const int64_t base = resampling.voxel_offset(source.corner_weights(p, weight));
  bool full = true;
  for (int corner = 0; corner < (1 << D); ++corner) {
    const int index = slow + (corner >> (D - 1) & 1);
    if (index < low || index >= high) weight[corner] = 0;
    full = full && weight[corner] != 0;
    offset[corner] = base + resampling.corner_offset(corner);
  }
  const int64_t here = source.voxel_offset(voxel);
  for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
    const T g = to_arithmetic(grad[resampling.out_layout.at(here, channel)]);
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
void scatter(const Cpu&, const VoxelSpace& space, const R& resampling, const Tensor& grad_output,
             const Tensor& grad_input, const ScatterWorkspace& workspace) {
  using S = typename R::S;
  using T = typename R::T;
  constexpr int D = R::D;
  const Operand<const S> grad_operand(grad_output);
  int32_t* row_bounds = workspace.row_bounds->as<int32_t>();
  const int64_t rows = space.rows();
  const int slow_size = resampling.map.in.size[D - 1];
  int planes = slow_size;  // those at hand, from `first_plane` on
  int first_plane = 0;
  if constexpr (R::kSlab) {
    planes = resampling.slab.planes;
    first_plane = resampling.slab.first[0];
  }

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
        const Vec<T, D> p = source.position(voxel, source.vector(voxel));
        const int index = locate(p[D - 1], slow_size, resampling.boundary.sampling).index;
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
      std::min<int64_t>(planes, targets >= 2 * num_threads() ? 1 : 2 * num_threads());
  const int64_t slab = (planes + pieces - 1) / pieces;

  auto fill_slabs = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t target_index = task / pieces;
      const int64_t group = target_index / grad_input.shape[1];
      const int64_t target_item = target_index % grad_input.shape[1];
      const int begins = static_cast<int>(std::min<int64_t>(task % pieces * slab, planes));
      const int low = first_plane + begins;
      const int high = first_plane + static_cast<int>(std::min<int64_t>(begins + slab, planes));
      T* target =
          resampling.element(group, target_item).plane_zero(target_operand.at(group, target_item));
      for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
        for (int64_t v = low * slow_stride; v < high * slow_stride; ++v) {
          target[resampling.in_layout.at(v, channel)] = 0;
        }
      }
      const int64_t first = shared_input ? 0 : target_item;
      const int64_t last = shared_input ? space.items : target_item + 1;
      for (int64_t n = first; n < last; ++n) {
        const auto source = resampling.element(group, n);
        const S* grad = grad_operand.at(group, n);
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

}  // namespace regkernels

// The gradient of the array that is sampled, on the CPU.
//
// Each task owns a slab of the target (along its slowest axis) and walks over all source rows in
// order, so every target voxel receives its contributions in the same order however the target is
// cut: the result does not depend on the number of threads. A first pass notes for each source row
// which planes it can reach, so that a task skips the rows of others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "resample/neighbours.h"
#include "resample/resampling.h"
#include "resample/scatter_workspace.h"

namespace regkernels {

// Adds parts[corner][i] to the corners of each neighbour's cell that lie in `count` elements of the
// target from `begin` on. Corner 0 is at offset[i], and the others are `corner` further on. It is a
// function of its own as no vector code comes of it, and adding in pairs would have loads wait for
// two stores.
template <int kPixel, class T, int kCorners, int kCount>
__attribute__((noinline, optimize("no-tree-vectorize"))) void add_to_corners(
    const T (&parts)[kCorners][kCount], const int (&within)[kCount], int repeated,
    const int (&offset)[kCount], const Vec<int64_t, kCorners>& corner, int64_t begin,
    uint64_t count, T* target) {
  constexpr int kHalf = kCorners / 2;
  const int64_t upper_begin = begin - corner[kHalf];
  T* row[kHalf];
  for (int k = 0; k < kHalf; ++k) row[k] = target + corner[2 * k];
  for (int i = repeated; i < kCount; ++i) {
    if (!within[i]) continue;
    const int64_t first = offset[i];
    const auto add_to_row = [&](int k) {
      row[k][first] += parts[2 * k][i];
      row[k][first + kPixel] += parts[2 * k + 1][i];
    };
    // As an unsigned number, what is negative is large. The upper half of the corners is in the
    // next plane, which may be another task's.
    if (static_cast<uint64_t>(first - begin) < count) {
      for (int k = 0; k < kHalf / 2; ++k) add_to_row(k);
    }
    if (static_cast<uint64_t>(first - upper_begin) < count) {
      for (int k = kHalf / 2; k < kHalf; ++k) add_to_row(k);
    }
  }
}

// Adds the contributions of a batch item that fall on planes from `low` to `high` of the target,
// row by row.
template <class R>
struct Scatter {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kCorners = 1 << D;

  const R& resampling;
  typename R::Element source;
  int low, high;
  const S* grad;
  T* target;

  void operator()(const Voxel& voxel) const {
    const Vec<T, D> p = source.position(voxel, source.vector(voxel));
    const int slow =
        locate(p[D - 1], resampling.map.in.size[D - 1], resampling.boundary.sampling).index;
    if (slow + 1 < low || slow >= high) return;
    T weight[kCorners];
    int64_t offset[kCorners];
    const int64_t base = resampling.voxel_offset(source.corner_weights(p, weight));
    for (int corner = 0; corner < kCorners; ++corner) {
      const int index = slow + (corner >> (D - 1) & 1);
      if (index < low || index >= high) weight[corner] = 0;
      offset[corner] = base + resampling.corner_offset(corner);
    }
    const int64_t here = source.voxel_offset(voxel);
    for (int channel = 0; channel < resampling.in_layout.count(); ++channel) {
      const T g = to_arithmetic(grad[resampling.out_layout.at(here, channel)]);
      for (int corner = 0; corner < kCorners; ++corner) {
        if (weight[corner] == 0) continue;
        target[resampling.in_layout.at(offset[corner], channel)] += weight[corner] * g;
      }
    }
  }

  static constexpr bool kComputesRows = std::is_same_v<S, T>;
  void row(int z, int y, int size) const {
    const auto add_alone = [&](int x) { compute_voxel(*this, Voxel{z, y, x, true, x, size}); };
    const auto add_together = [&](const Neighbours<R, true>& near, const Voxel& first, auto) {
      add_neighbours(near, first);
    };
    sample_row<R, true, true>(source, z, y, size, add_together, add_alone);
  }

  void add_neighbours(const Neighbours<R, true>& near, const Voxel& first) const {
    constexpr int kPixel = R::Layout::kPixel;
    const auto corner = resampling.template corner_elements<kPixel>();
    const int64_t plane = resampling.stride[D - 1] * kPixel;
    const S* const pixel = source.template out_pointer<kPixel>(grad, first);
    for_each_channel(resampling.in_layout, [&](auto channel) {
      const S* const g = pixel + resampling.out_layout.channel(channel);
      T parts[kCorners][near.kCount];
#pragma GCC ivdep
      for (int i = 0; i < near.kCount; ++i) {
        const Cell<T, D> cell = near.cell(i);
        for (int k = 0; k < kCorners; ++k) {
          // A corner without weight does not count, whatever the cotangent: NaN times 0 is not 0.
          const T weight = cell.weight(k);
          parts[k][i] = weight != 0 ? weight * g[i * kPixel] : T(0);
        }
      }
      add_to_corners<kPixel>(parts, near.within, near.repeated, near.offset, corner, low * plane,
                             (high - low) * plane, target + resampling.in_layout.channel(channel));
    });
  }
};

// The planes of the target, from `low` to `high`, beyond which nothing of a row of voxels falls.
struct Reach {
  int32_t low, high;
};

template <class R>
Reach row_reach(const R&, const typename R::Element& source, int z, int y, int size) {
  using T = typename R::T;
  constexpr int D = R::D, kSlow = D - 1;
  const Boundary<T, D>& boundary = source.self->boundary;
  const T first = boundary.low[kSlow], last = boundary.high[kSlow];
  Reach reach = {INT32_MAX, INT32_MIN};
  int inside = 0;
  with_known_placement(*source.self, [&](const auto& map) {
    for (int x = 0; x < size; ++x) {
      const Voxel voxel{z, y, x, true, x, size};
      const T p = map.template position<R::kField>(source.item, source.place(voxel),
                                                   source.vector(voxel))[kSlow];
      inside += (p >= first) & (p <= last);
      const T q = p > first ? p : first;
      const int plane = static_cast<int>(q < last ? q : last);  // one too high below 0: no matter
      reach.low = std::min(reach.low, plane);
      reach.high = std::max(reach.high, plane + 1);
    }
  });
  const bool reflects = boundary.sampling.padding == Padding::kReflection;
  if (reflects && inside < size) return {0, boundary.size[kSlow] - 1};
  return reach;
}

template <class R>
void scatter(const Cpu&, const VoxelSpace& space, const R& resampling, const Tensor& grad_output,
             const Tensor& grad_input, const ScatterWorkspace& workspace) {
  using S = typename R::S;
  using T = typename R::T;
  constexpr int D = R::D;
  const Operand<const S> grad_operand(grad_output);
  static_assert(sizeof(Reach) == 2 * sizeof(int32_t));
  auto* const reach = reinterpret_cast<Reach*>(workspace.row_bounds->as<int32_t>());
  const int64_t rows = space.rows();
  int planes = resampling.map.in.size[D - 1];  // those at hand, from `first_plane` on
  int first_plane = 0;
  if constexpr (R::kSlab) {
    planes = resampling.slab.planes;
    first_plane = resampling.slab.first[0];
  }

  auto find_reaches = [&](int64_t begin, int64_t end) {
    with_vector_code([&] {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / rows, row = i % rows;
        const auto source = resampling.element(b / space.items, b % space.items);
        reach[i] = row_reach(resampling, source, static_cast<int>(row / space.y),
                             static_cast<int>(row % space.y), space.x);
      }
    });
  };
  parallel_for(space.batch() * rows, std::max<int64_t>(1, 4096 / space.x), find_reaches);

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
        const Scatter<R> element{resampling, resampling.element(group, n), low,
                                 high,       grad_operand.at(group, n),    target};
        const Reach* const reaches = reach + (group * space.items + n) * rows;
        compute_rows(element, space.x, [&](const auto& add_row) {
          for (int64_t row = 0; row < rows; ++row) {
            if (reaches[row].high < low || reaches[row].low >= high) continue;
            add_row(static_cast<int>(row / space.y), static_cast<int>(row % space.y));
          }
        });
      }
    }
  };
  parallel_for(targets * pieces, 1, fill_slabs);
}

}  // namespace regkernels

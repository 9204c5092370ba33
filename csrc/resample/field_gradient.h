// The gradient with respect to the field that places the samples.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "maths/voxel_vectors.h"
#include "resample/neighbours.h"
#include "resample/resampling.h"

namespace regkernels {

// The gradient with respect to the field. If all items share the field (`shared_items` > 1), one
// thread sums over them, so that no other thread writes to the same place.
template <class R>
struct FieldGradient {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = 4;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = R::kCubic    ? (sizeof(T) == sizeof(double) ? 1 : 2)
                                    : R::kAffine ? 3
                                                 : 4;

  R resampling;
  Operand<const S> grad_output;
  Operand<T> grad_field;
  bool add_field;
  int64_t shared_items;  // 1, or the number of items that share the field

  struct Element {
    typename R::Element first;
    const FieldGradient* self;
    int64_t group, item;

    REGKERNELS_HD void add_item(const typename R::Element& source, int64_t n, const Voxel& voxel,
                                Vec<T, D>& total) const {
      const S* grad =
          source.template out_pointer<R::Layout::kPixel>(self->grad_output.at(group, n), voxel);
      const Vec<T, D> p = source.position(voxel, source.vector(voxel));
      const Vec<T, D> grad_u =
          self->resampling.map.pull_back(source.item, source.position_gradient(p, grad));
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        total[k] += grad_u[k];
        if constexpr (R::Layout::kLast) {
          if (self->add_field) total[k] += to_arithmetic(grad[k]);
        }
      }
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      Vec<T, D> total{};
      add_item(first, item, voxel, total);
      REGKERNELS_NO_UNROLL
      for (int64_t n = 1; n < self->shared_items; ++n) {
        add_item(self->resampling.element(group, n), n, voxel, total);
      }
      const R& r = self->resampling;
      T* const target = self->grad_field.at(group, item);
      if (r.field_is_packed()) {
        store_packed(target + voxel.row(r.map.out.size) * D, voxel, total);
      } else if (voxel.active) {
        r.field_layout.store_gradient(target, first.voxel_offset(voxel), total);
      }
    }

    static constexpr bool kComputesRows = R::kComputesNeighbours;
    void row(int z, int y, int size) const {
      const auto sample_alone = [&](int x) { compute_voxel(*this, Voxel{z, y, x, true, x, size}); };
      const bool few_channels = R::Layout::kLast || self->resampling.in_layout.count() == 1;
      if (few_channels && self->shared_items == 1) {
        const auto sample_together = [&](const Neighbours<R, false>& near, const Voxel& voxel,
                                         auto checked) {
          store_neighbours<decltype(checked)::value>(near, voxel);
        };
        sample_row<R, false, false>(first, z, y, size, sample_together, sample_alone);
      } else {
        for (int x = 0; x < size; ++x) sample_alone(x);
      }
    }

    // The gradients of one item's neighbours, from one channel or from those that lie last.
    template <bool kChecked>
    void store_neighbours(const Neighbours<R, false>& near, const Voxel& voxel) const {
      const R& r = self->resampling;
      constexpr int kPixel = R::Layout::kPixel;
      const S* const grad =
          first.template out_pointer<kPixel>(self->grad_output.at(group, item), voxel);
      T* const field = self->grad_field.at(group, item);
      T unpacked[near.kCount * D];
      T* const target =
          r.field_is_packed() ? first.template out_pointer<D>(field, voxel) : unpacked;
      const typename R::Map::Item map_item = first.item;
      [[maybe_unused]] const bool add = R::Layout::kLast && self->add_field;
      with_known_placement(r, [&](const auto& map) {
        neighbour_gradients<kChecked>(near, first, grad, [&](int i, const Vec<T, D>& grad_p) {
          const Vec<T, D> grad_u = map.pull_back(map_item, grad_p);
          for (int k = 0; k < D; ++k) {
            T total = T(0) + grad_u[k];  // the sum over items begins like this, too
            if constexpr (R::Layout::kLast) total += add ? grad[i * kPixel + k] : T(0);
            target[i * D + k] = total;
          }
        });
      });
      if (r.field_is_packed()) return;
      for (int i = 0; i < near.kCount; ++i) {
        r.field_layout.store_gradient(field, first.voxel_offset(voxel) + i,
                                      load_vec<T, D>(unpacked + i * D));
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, group, item};
  }
};

}  // namespace regkernels

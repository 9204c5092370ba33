// The samples themselves: what a forward op returns.
#pragma once

#include <type_traits>

#include "core/for_each.h"
#include "core/half.h"
#include "core/operand.h"
#include "maths/voxel_vectors.h"
#include "resample/neighbours.h"
#include "resample/resampling.h"

namespace regkernels {

template <class R>
struct ResampleForward {
  using S = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = R::kField ? 8 : 16;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = R::kAffine || R::Layout::kLast ? 5 : 6;

  R resampling;
  Operand<S> output;
  bool add_field;  // output = field + sample, where channels are last

  struct Element {
    typename R::Element source;
    const ResampleForward* self;
    S* output;

    // Samples at p, and calls store(channel, value) for each channel.
    template <class Store>
    REGKERNELS_HD void sample(const Vec<T, D>& p, const Store& store) const {
      source.sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>&) {
        constexpr bool kChecked = decltype(checked)::value;
        for_each_channel(self->resampling.in_layout, [&](auto channel) {
          T value[1 << D];
          source.template load_corners<kChecked>(cell, channel, value);
          store(channel, sample_value<kChecked>(cell, value));
        });
      });
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const R& r = self->resampling;
      const Vec<T, D> u = source.vector(voxel);
      const Vec<T, D> p = source.position(voxel, u);
      if constexpr (R::Layout::kLast) {
        Vec<T, D> value;
        sample(p, [&](auto k, T sampled) { value[k] = sampled + (self->add_field ? u[k] : T(0)); });
        store_packed(output + voxel.row(r.map.out.size) * D, voxel, value);
      } else {
        S* target = source.template out_pointer<1>(output, voxel);
        sample(p, [&](auto channel, T sampled) {
          if (voxel.active) target[r.out_layout.channel(channel)] = to_storage<S>(sampled);
        });
      }
    }

    static constexpr bool kComputesRows = std::is_same_v<S, T>;
    void row(int z, int y, int size) const {
      const auto sample_alone = [&](int x) { compute_voxel(*this, Voxel{z, y, x, true, x, size}); };
      const auto sample_together = [&](const Neighbours<R, true>& near, const Voxel& first,
                                       auto checked) {
        sample_neighbours<decltype(checked)::value>(near, first);
      };
      sample_row<R, true, false>(source, z, y, size, sample_together, sample_alone);
    }

    template <bool kChecked>
    void sample_neighbours(const Neighbours<R, true>& near, const Voxel& first) const {
      const R& r = self->resampling;
      constexpr int kPixel = R::Layout::kPixel;
      const auto corner = r.template corner_elements<kPixel>();
      S* const pixel = source.template out_pointer<kPixel>(output, first);
      [[maybe_unused]] const bool add = R::Layout::kLast && self->add_field;
      for_each_channel(r.in_layout, [&](auto channel) {
        const S* const input = source.input + r.in_layout.channel(channel);
        S* const target = pixel + r.out_layout.channel(channel);
#pragma GCC ivdep
        for (int i = 0; i < near.kCount; ++i) {
          T value[1 << D];
          for (int k = 0; k < (1 << D); ++k) value[k] = input[near.offset[i] + corner[k]];
          const T inside = sample_value<kChecked>(near.cell(i), value);
          const T sampled = near.within[i] ? inside : T(0);
          if constexpr (R::Layout::kLast) {
            target[i * kPixel] =
                sampled + (add ? near.field[i * D + static_cast<int>(channel)] : T(0));
          } else {
            target[i] = sampled;
          }
        }
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, opaque_pointer(output.at(group, item))};
  }
};

}  // namespace regkernels

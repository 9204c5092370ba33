#pragma once

#include <limits>

#include "ops/interpolate/call.h"
#include "ops/interpolate_labels/interpolate_labels.h"
#include "resample/with_resampling.h"

namespace regkernels {

// Returns the label whose corners have the largest sum of weights, and the smallest of several such
// labels. No weight is negative, and some are more than 0.
template <class T, class Bits, int kCorners>
REGKERNELS_HD Bits heaviest_label(const T (&weight)[kCorners], const Bits (&label)[kCorners],
                                  T* sum) {
  bool all_alike = true;
  T total = 0;
  REGKERNELS_UNROLL
  for (int i = 0; i < kCorners; ++i) {
    all_alike = all_alike & (label[i] == label[0]);
    total += weight[i];
  }
  // Nearly everywhere all are alike, and their sum is what the general case would find.
  Bits heaviest = label[0];
  *sum = total;
  if (all_alike) return heaviest;
  *sum = 0;
  REGKERNELS_UNROLL
  for (int i = 0; i < kCorners; ++i) {
    T own = 0;
    REGKERNELS_UNROLL
    for (int j = 0; j < kCorners; ++j) own += label[j] == label[i] ? weight[j] : T(0);
    if (own > *sum || (own == *sum && label[i] < heaviest)) {
      *sum = own;
      heaviest = label[i];
    }
  }
  return heaviest;
}

// Labels are held as unsigned numbers of their width, in the same order.
template <class R>
struct LabelInterpolation {
  using Bits = typename R::S;
  using T = typename R::T;
  static constexpr int D = R::D;
  static constexpr int kDepth = R::kField ? 8 : 16;
  static constexpr int kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 2 : 4;

  R resampling;
  Operand<Bits> output;
  Operand<float> weight;  // may be absent
  Bits flip;              // the bits that are inverted on the way from and to memory
  Bits background;

  struct Element {
    typename R::Element source;
    const LabelInterpolation* self;
    Bits* output;
    float* weight;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const R& r = self->resampling;
      const Bits flip = self->flip;
      const Vec<T, D> p = source.position(voxel, source.vector(voxel));
      const int64_t offset = source.voxel_offset(voxel);
      source.sample(p, [&](const Cell<T, D>& cell, auto checked, const Vec<T, D>&) {
        constexpr bool kChecked = decltype(checked)::value;
        T weights[1 << D];
        REGKERNELS_UNROLL
        for (int i = 0; i < (1 << D); ++i) weights[i] = cell.weight(i);
        for_each_channel(r.in_layout, [&](auto channel) {
          Bits labels[1 << D];
          source.template load_corners<kChecked>(
              cell, channel, self->background,
              [flip](Bits stored) { return static_cast<Bits>(stored ^ flip); }, labels);
          T sum;
          const Bits label = heaviest_label(weights, labels, &sum);
          if (!voxel.active) return;
          const int64_t target = r.out_layout.channel(channel) + offset;
          output[target] = label ^ flip;
          if (weight == nullptr) return;
          const bool unanswered = R::kSlab && cell.index[D - 1] == kUnanswered;
          weight[target] = unanswered ? 0.0f : static_cast<float>(sum);
        });
      });
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {resampling.element(group, item), this, output.at(group, item), weight.at(group, item)};
  }
};

template <class Device>
void interpolate_labels(const Device& device, const Call& call) {
  const Tensor& output = call.output("output");
  if (output.shape.count() == 0) return;
  const ResampleCall resample = interpolation(call, "labels", Mode::kBilinear);
  const VoxelSpace space = voxel_space(resample.groups, resample.items, resample.out_sizes);
  uint64_t sign = 0;
  size_t bytes = 0;
  dispatch_integer(output.dtype, [&](auto type) {
    using Label = typename decltype(type)::type;
    bytes = sizeof(Label);
    if (std::numeric_limits<Label>::is_signed) sign = uint64_t(1) << (8 * bytes - 1);
  });
  dispatch_width(bytes, [&](auto width) {
    using Bits = typename decltype(width)::type;
    const Bits flip = static_cast<Bits>(sign);
    const Bits background = static_cast<Bits>(call.integer("background")) ^ flip;
    dispatch_dtype(call.checked<InterpolateCall>().arithmetic, [&](auto type) {
      using T = typename decltype(type)::type;
      with_stored<false, Bits, T>(resample, [&](const auto& resampling) {
        using R = std::decay_t<decltype(resampling)>;
        LabelInterpolation<R> body{resampling, Operand<Bits>(output),
                                   Operand<float>(call.output("weight")), flip, background};
        for_each_voxel(device, space, body);
      });
    });
  });
}

}  // namespace regkernels

#pragma once

#include <algorithm>

#include "core/dispatch.h"
#include "core/large_gpu.h"
#include "ops/losses/compared.h"
#include "ops/mutual_information/maths.h"

namespace regkernels {

// What a checked call of any of the ops amounts to.
struct MutualInformationCall {
  DType dtype;
  Batch batch;
  int64_t channels;
  int64_t samples;        // of an image and channel
  int64_t plane_samples;  // of a plane of them, along the first spatial axis
  int64_t whole_samples;  // of the whole volume, of which these may be a part
  int num_bins;
  ParzenKernel kernel;
  int reach;
  bool joint_range;

  int64_t elements() const { return batch.groups * batch.items * channels; }
  int64_t bins() const { return int64_t{1} * num_bins * num_bins; }

  // What a sample that weighs 1 adds to the counts: a power of two that leaves room for the whole
  // volume, so that the counts of its parts add up to its own.
  double count_units() const {
    int bits = 0;
    while ((int64_t{1} << bits) < whole_samples) ++bits;
    return static_cast<double>(int64_t{1} << (62 - bits));
  }
};

template <class T>
Parzen<T> parzen_window(const Call& call, const MutualInformationCall& checked);

// The table of derivatives has a margin of zeros, as wide as a window reaches over the ends.
inline int64_t table_size(const MutualInformationCall& checked) {
  return checked.num_bins + 2 * checked.reach;
}

// What is found out about a pair of images before their samples are counted: the extremes of both
// and the largest weight, which is 1 without a mask. The lowest have their sign changed, so that
// the extremes of parts combine by the maximum, all of them.
enum Extreme { kMinusLowPred, kHighPred, kMinusLowTarget, kHighTarget, kHighMask, kExtremes };

constexpr int64_t kMostWholeSamples = int64_t{1} << 48;

inline int64_t extreme_parts(int64_t samples) {
  return std::max<int64_t>(
      1, std::min<int64_t>(2 * kLargeGpuMultiprocessors, (samples + 8191) / 8192));
}

// What the forward pass saves for the gradient: the ranges, 1 / (sum of the weights), and the
// largest weight, by which all weights are divided.
enum Scaling { kRangePred, kRangeTarget = 2, kInverseTotal = 4, kLargestWeight, kScalings };

// How the values of one pair of images are read.
template <class T>
struct PairScale {
  IntensityRange<T> pred, target;
  // Samples weigh mask / largest_weight, so that sums neither overflow nor vanish.
  T largest_weight;

  // The weights of a mask without a finite one above 0 are not scaled.
  REGKERNELS_HD T weight(T mask) const { return largest_weight > 0 ? mask / largest_weight : mask; }

  // Each is null where it is absent; the extremes are not needed with a given range and no mask.
  REGKERNELS_HD static PairScale from(const T* given, bool joint, const T* extremes) {
    T low_pred, high_pred, low_target, high_target;
    if (given != nullptr) {
      low_pred = given[0], high_pred = given[1], low_target = given[2], high_target = given[3];
    } else {
      low_pred = -extremes[kMinusLowPred], high_pred = extremes[kHighPred];
      low_target = -extremes[kMinusLowTarget], high_target = extremes[kHighTarget];
      if (joint) {
        low_pred = low_target = low_pred < low_target ? low_pred : low_target;
        high_pred = high_target = high_pred > high_target ? high_pred : high_target;
      }
    }
    return {IntensityRange<T>(low_pred, high_pred), IntensityRange<T>(low_target, high_target),
            extremes != nullptr ? extremes[kHighMask] : T(1)};
  }
};

// An element of a call is a pair of images: those of a group, item and channel.
struct ElementIndex {
  int64_t group, item, channel;
};

struct ElementSpace {
  int64_t items, channels;

  REGKERNELS_HD ElementIndex index(int64_t element) const {
    const int64_t outer = element / channels;
    const int64_t group = outer / items;
    return {group, outer - group * items, element - outer * channels};
  }
  REGKERNELS_HD int64_t element(const ElementIndex& index) const {
    return (index.group * items + index.item) * channels + index.channel;
  }
};

// The samples of an image that are looked at. Where only the first planes are the volume's own, as
// many as the device knows, the others are padding.
struct OwnSamples {
  int64_t samples, plane_samples;
  Operand<const int32_t> planes;  // absent: all

  OwnSamples(const Call& call, const MutualInformationCall& checked)
      : samples(checked.samples),
        plane_samples(checked.plane_samples),
        planes(call.input("own_planes")) {}
  REGKERNELS_HD int64_t of(int64_t group) const {
    if (planes.data == nullptr) return samples;
    const int64_t own = *planes.at(group, 0) * plane_samples;
    return own < 0 ? 0 : own < samples ? own : samples;
  }
};

// Where it stands how the values of all elements are read.
template <class T>
struct ScaleOperands {
  ElementSpace space;
  bool joint_range;
  Operand<const T> value_range;  // absent: that of the extremes
  Operand<const T> extremes;     // (parts, kExtremes) of each element; absent: not needed
  int parts = 1;

  // The tensor of extremes may be one without an axis of parts.
  ScaleOperands(const Call& call, const MutualInformationCall& checked, const Tensor& found)
      : space{checked.batch.items, checked.channels},
        joint_range(checked.joint_range),
        value_range(call.input("value_range")),
        extremes(found) {
    if (found.present && found.shape.rank() == 5) parts = static_cast<int>(found.shape[3]);
  }
  REGKERNELS_HD const T* extremes_of(const ElementIndex& index) const {
    if (extremes.data == nullptr) return nullptr;
    return extremes.at(index.group, index.item) + index.channel * parts * kExtremes;
  }
  // `combined`: the extremes of all parts of the element.
  REGKERNELS_HD PairScale<T> scale(const ElementIndex& index, const T* combined) const {
    const T* const given =
        value_range.data == nullptr ? nullptr : value_range.at(index.group, index.item);
    return PairScale<T>::from(given, joint_range, extremes.data == nullptr ? nullptr : combined);
  }
};

// The images whose samples are counted.
template <class T>
struct HistogramOperands {
  MutualInformationCall checked;
  Channels<const T> pred, target, mask;
  OwnSamples own;

  explicit HistogramOperands(const Call& call)
      : checked(call.checked<MutualInformationCall>()),
        pred(call.input("pred")),
        target(call.input("target")),
        mask(call.input("mask")),
        own(call, checked) {}
  REGKERNELS_HD ElementSpace space() const { return {checked.batch.items, checked.channels}; }
};

// What the gradient is computed from.
template <class T>
struct GradientOperands {
  Parzen<T> window;
  Channels<const T> pred, target, mask;
  OwnSamples own;
  Channels<T> grad_pred, grad_target;
  bool sum_pred, sum_target;  // the gradient is shared by all items
  Operand<const T> table, scaling, cotangent;
  bool one_cotangent;  // for all items and channels
  T reduction;
  ElementSpace space;
  int64_t table_count;  // entries of one channel's table

  GradientOperands(const Call& call, const HistogramOperands<T>& histogram)
      : window(parzen_window<T>(call, histogram.checked)),
        pred(histogram.pred),
        target(histogram.target),
        mask(histogram.mask),
        own(histogram.own),
        grad_pred(call.output("grad_pred")),
        grad_target(call.output("grad_target")),
        table(call.input("table")),
        scaling(call.input("scaling")),
        space(histogram.space()) {
    const MutualInformationCall& checked = histogram.checked;
    const auto shared = [&](const Channels<T>& gradient, const char* name) {
      return gradient.present() && call.output(name).shape[1] != checked.batch.items;
    };
    sum_pred = shared(grad_pred, "grad_pred");
    sum_target = shared(grad_target, "grad_target");
    const Tensor& grad_output = call.input("grad_output");
    one_cotangent = grad_output.shape.rank() == 1;
    cotangent.data = grad_output.as<const T>();
    cotangent.stride.group = grad_output.shape[0] == 1 ? 0 : grad_output.shape.count(1);
    reduction = T(1);
    if (call.choice<Reduction>("reduction") == Reduction::kMean) {
      reduction = static_cast<T>(1 / static_cast<double>(space.items * space.channels));
    }
    table_count = table_size(checked) * table_size(checked);
  }

  // Where gradients are shared, all items of a group and channel are one piece of work.
  REGKERNELS_HD bool items_together() const { return sum_pred || sum_target; }

  REGKERNELS_HD const T* table_of(const ElementIndex& index) const {
    return table.at(index.group, index.item) + index.channel * table_count;
  }
  REGKERNELS_HD PairScale<T> scale(const ElementIndex& index) const {
    const T* const values = scaling_of(index);
    return {IntensityRange<T>(values[kRangePred], values[kRangePred + 1]),
            IntensityRange<T>(values[kRangeTarget], values[kRangeTarget + 1]),
            values[kLargestWeight]};
  }
  REGKERNELS_HD T factor(const ElementIndex& index) const {
    const int64_t place = one_cotangent ? 0 : index.item * space.channels + index.channel;
    const T cotangent_here = cotangent.data[index.group * cotangent.stride.group + place];
    return cotangent_here * reduction * scaling_of(index)[kInverseTotal];
  }

 private:
  REGKERNELS_HD const T* scaling_of(const ElementIndex& index) const {
    return scaling.at(index.group, index.item) + index.channel * kScalings;
  }
};

// Calls body(kernel, reach) with compile-time values, for kernels with a derivative.
template <class T, class Body>
void dispatch_smooth_window(const MutualInformationCall& checked, const Body& body) {
  using Reach = GaussianReach<T>;
  if (checked.kernel == ParzenKernel::kBSpline) {
    return body(IntTag<static_cast<int>(ParzenKernel::kBSpline)>{}, IntTag<kBSplineReach>{});
  }
  constexpr IntTag<static_cast<int>(ParzenKernel::kGaussian)> gaussian;
  if (checked.reach == Reach::kNarrow) return body(gaussian, IntTag<Reach::kNarrow>{});
  if (checked.reach == Reach::kMiddling) return body(gaussian, IntTag<Reach::kMiddling>{});
  body(gaussian, IntTag<Reach::kWide>{});
}

// Calls body(kernel, reach) with compile-time values, for all kernels.
template <class T, class Body>
void dispatch_window(const MutualInformationCall& checked, const Body& body) {
  if (checked.kernel == ParzenKernel::kDelta) {
    return body(IntTag<static_cast<int>(ParzenKernel::kDelta)>{}, IntTag<0>{});
  }
  dispatch_smooth_window<T>(checked, body);
}

}  // namespace regkernels

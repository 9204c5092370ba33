// The descriptors from the distances of patches, and the way back. `average_patches`, which each
// device has its own of, is all the rest.
#pragma once

#include <cstdint>
#include <limits>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/half.h"
#include "core/reduce.h"
#include "maths/fast_math.h"
#include "ops/mind_ssc/call.h"
#include "ops/mind_ssc/mind_ssc.h"
#include "ops/mind_ssc/sources.h"

namespace regkernels {

// A variance below this one counts as none: its reciprocal, and gradients, might overflow.
template <class T>
inline constexpr T kLeastVariance = std::numeric_limits<T>::min() * 1048576;

// The variances that distances are divided by are within these bounds.
template <class T>
struct VarianceBounds {
  T low, high;

  REGKERNELS_HD explicit VarianceBounds(T mean) : low(T(1e-3) * mean), high(T(1e3) * mean) {}
  // Whether the image is as good as constant. What is not a number is none, and stays so.
  REGKERNELS_HD bool constant() const { return low < kLeastVariance<T>; }
  REGKERNELS_HD T bounded(T variance) const {
    return variance < low ? low : variance > high ? high : variance;
  }
  REGKERNELS_HD bool within(T variance) const { return variance >= low && variance <= high; }
};

// The distances of all pairs of patches of one voxel.
template <class T, int D>
struct PairDistances {
  static constexpr int kChannels = descriptor_channels(D);
  T distance[kChannels];
  T least;
  int nearest;  // the first channel that has the least distance
  T variance;   // mean distance beyond the least one

  REGKERNELS_HD void find_variance() {
    least = distance[0];
    nearest = 0;
    T sum = distance[0];
    REGKERNELS_UNROLL
    for (int k = 1; k < kChannels; ++k) {
      sum += distance[k];
      const bool nearer = distance[k] < least;
      least = nearer ? distance[k] : least;
      nearest = nearer ? k : nearest;
    }
    // Differences are summed, so that equal distances have no variance at all.
    T beyond = 0;
    REGKERNELS_UNROLL
    for (int k = 0; k < kChannels; ++k) beyond += distance[k] - least;
    variance = beyond / kChannels;
  }
};

// Reads the distances of the voxels of a volume. The products of strides are the same for all of
// them, and are computed once.
template <class T, int D>
struct DistanceReader {
  static constexpr int kFamilies = pair_families(D);
  const T* data;
  Surroundings<D> around;
  int64_t voxels;
  int64_t shift[kFamilies];  // from the distance of a family's first channel to that of its second

  DistanceReader(const T* data, const Surroundings<D>& around, int dilation)
      : data(data), around(around), voxels(around.voxels()) {
    for (int f = 0; f < kFamilies; ++f) {
      const PatchPair pair = patch_pair(f, dilation);
      shift[f] =
          pair.shift(0) + pair.shift(1) * around.stride(1) + pair.shift(2) * around.stride(2);
    }
  }

  REGKERNELS_HD PairDistances<T, D> operator()(int64_t volume, int x, int y, int z) const {
    PairDistances<T, D> result;
    const T* family = data + volume * kFamilies * voxels + around.offset(x, y, z);
    REGKERNELS_UNROLL
    for (int f = 0; f < kFamilies; ++f) {
      result.distance[2 * f] = family[0];
      result.distance[2 * f + 1] = family[shift[f]];
      family += voxels;
    }
    result.find_variance();
    return result;
  }
};

// What the bodies below have in common.
template <int D>
struct Volumes {
  Surroundings<D> around;
  int64_t items;     // volumes of a group
  int64_t in_image;  // volumes

  REGKERNELS_HD int64_t number(int64_t group, int64_t item) const { return group * items + item; }
  REGKERNELS_HD int64_t of_image(int64_t group, int64_t item) const {
    return in_image == items ? item : number(group, item);
  }
  REGKERNELS_HD int64_t voxels() const {
    return static_cast<int64_t>(around.size[2]) * around.size[1] * around.size[0];
  }
};

template <class T_, int D>
struct MeanVariance {
  using T = T_;
  static constexpr int kSums = 1;
  static constexpr int kMinBlocks = 4;
  Volumes<D> volumes;
  DistanceReader<T, D> distances;

  struct Element {
    const MeanVariance* self;
    int64_t volume;
    REGKERNELS_HD void operator()(const Voxel& voxel, T (&sums)[kSums]) const {
      sums[0] += self->distances(volume, voxel.x, voxel.y, voxel.z).variance;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, volumes.of_image(group, item)};
  }
  REGKERNELS_HD double scale(int) const { return 1.0 / static_cast<double>(volumes.voxels()); }
};

// The variances by themselves, for devices that share a volume to take their mean together.
template <class T_, int D>
struct Variances {
  using T = T_;
  static constexpr int kDepth = 4, kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 2 : 4;
  Volumes<D> volumes;
  DistanceReader<T, D> distances;
  T* output;

  struct Element {
    const Variances* self;
    int64_t volume;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const T variance = self->distances(volume, voxel.x, voxel.y, voxel.z).variance;
      if (!voxel.active) return;
      const int64_t place = voxel.row(self->volumes.around.size) + voxel.x;
      self->output[volume * self->volumes.voxels() + place] = variance;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, volumes.of_image(group, item)};
  }
};

template <class T>
REGKERNELS_HD T descriptor(T distances_beyond) {
  return exp2_of(distances_beyond * T(-1.4426950408889634));
}

template <class S, int D>
struct Descriptors {
  using T = Arithmetic<S>;
  static constexpr int kDepth = 4, kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 2 : 4;
  Volumes<D> volumes;
  DistanceReader<T, D> distances;
  const T* mean;
  S* output;

  struct Element {
    const Descriptors* self;
    int64_t volume;
    VarianceBounds<T> bounds;
    S* output;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      constexpr int kChannels = descriptor_channels(D);
      const PairDistances<T, D> pairs = self->distances(volume, voxel.x, voxel.y, voxel.z);
      const T scale = bounds.constant() ? T(0) : 1 / bounds.bounded(pairs.variance);
      if (!voxel.active) return;
      S* out = output + voxel.row(self->volumes.around.size) + voxel.x;
      const int64_t voxels = self->volumes.voxels();
      REGKERNELS_UNROLL
      for (int k = 0; k < kChannels; ++k, out += voxels) {
        *out = to_storage<S>(descriptor((pairs.distance[k] - pairs.least) * scale));
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int64_t volume = volumes.of_image(group, item);
    const int64_t first = volumes.number(group, item) * descriptor_channels(D);
    return {this, volume, VarianceBounds<T>(mean[volume]), output + first * volumes.voxels()};
  }
};

// The gradients of the distances. Those of a descriptor are
//   d / d distance_j of exp(-(distance_k - least) / variance)
// where the least distance is that of the nearest pair, and the variance has a gradient unless a
// bound replaces it.
template <class S, int D>
struct DistanceSlopes {
  using T = Arithmetic<S>;
  static constexpr int kDepth = 4, kUnroll = 1;
  static constexpr int kMinBlocks = sizeof(T) == sizeof(double) ? 2 : 3;
  Volumes<D> volumes;
  DistanceReader<T, D> distances;
  const T* mean;
  const S* grad_output;
  int64_t in_grad_output;  // volumes
  T* slopes;

  struct Element {
    const DistanceSlopes* self;
    int64_t volume;
    VarianceBounds<T> bounds;
    const S* grad;
    T* slopes;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      constexpr int kChannels = descriptor_channels(D);
      const PairDistances<T, D> pairs = self->distances(volume, voxel.x, voxel.y, voxel.z);
      const T scale = bounds.constant() ? T(0) : 1 / bounds.bounded(pairs.variance);
      const int64_t voxels = self->volumes.voxels();
      const int64_t place = voxel.row(self->volumes.around.size) + voxel.x;
      const S* of_channel = grad + place;
      T slope[kChannels];  // by the quotient of distance and variance
      T by_least = 0, by_variance = 0;
      REGKERNELS_UNROLL
      for (int k = 0; k < kChannels; ++k, of_channel += voxels) {
        const T quotient = (pairs.distance[k] - pairs.least) * scale;
        slope[k] = -to_arithmetic(*of_channel) * descriptor(quotient);
        by_least += slope[k];
        by_variance += slope[k] * quotient;
      }
      if (!bounds.within(pairs.variance)) by_variance = 0;
      const T shared = by_variance / kChannels;
      if (!voxel.active) return;
      T* out = slopes + place;
      REGKERNELS_UNROLL
      for (int k = 0; k < kChannels; ++k, out += voxels) {
        const T of_nearest = k == pairs.nearest ? by_least - by_variance : T(0);
        *out = (slope[k] - shared - of_nearest) * scale;
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int64_t volume = volumes.of_image(group, item), number = volumes.number(group, item);
    const int64_t size = descriptor_channels(D) * volumes.voxels();
    const int64_t of_grad = in_grad_output == volumes.items ? item : number;
    return {this, volume, VarianceBounds<T>(mean[volume]), grad_output + of_grad * size,
            slopes + number * size};
  }
};

// The gradient of the image continued beyond its border, by half: each voxel collects from the
// squared differences that it enters. Those are a step along one axis away from it, and the other
// values in them a step along each of two.
template <class S, int D>
struct ContinuedGradient {
  using T = Arithmetic<S>;
  static constexpr int kDepth = 4, kUnroll = 1, kMinBlocks = 3;
  Volumes<D> volumes;  // with what surrounds them
  int dilation;        // the length of a step
  const S* image;
  const T* families;
  T* gradient;

  struct Element {
    const ContinuedGradient* self;
    const S* image;
    const T* families;
    T* gradient;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      constexpr int kFamilies = pair_families(D);
      const Surroundings<D>& around = self->volumes.around;
      const int place[3] = {voxel.x - around.margin[0], voxel.y - around.margin[1],
                            voxel.z - around.margin[2]};
      // By axis, for a step back, none and one ahead: where the image is, and the families are.
      int64_t in_image[3][3], in_family[3][3];
      bool inside[3][3];
      int64_t stride = 1;
      REGKERNELS_UNROLL
      for (int axis = 0; axis < 3; ++axis) {
        REGKERNELS_UNROLL
        for (int way = 0; way < 3; ++way) {
          const int i = place[axis] + (way - 1) * self->dilation;
          in_image[axis][way] = nearest_index(i, around.size[axis]) * stride;
          in_family[axis][way] = (i + around.margin[axis]) * around.stride(axis);
          inside[axis][way] = around.contains(i, axis);
        }
        stride *= around.size[axis];
      }
      const auto image_at = [&](const int (&ways)[3]) {
        return to_arithmetic(
            image[in_image[0][1 + ways[0]] + in_image[1][1 + ways[1]] + in_image[2][1 + ways[2]]]);
      };
      const T mine = image_at({0, 0, 0});
      const T* family = families;
      T sum = 0;
      // Adds the gradient of the squared difference a step against `from`, whose other value is a
      // step along `to` from there.
      const auto collect = [&](const int (&from)[3], const int (&to)[3]) {
        const bool there = inside[0][1 - from[0]] & inside[1][1 - from[1]] & inside[2][1 - from[2]];
        const int64_t offset =
            in_family[0][1 - from[0]] + in_family[1][1 - from[1]] + in_family[2][1 - from[2]];
        const T weight = there ? family[offset] : T(0);
        sum += weight * (mine - image_at({to[0] - from[0], to[1] - from[1], to[2] - from[2]}));
      };
      REGKERNELS_UNROLL
      for (int f = 0; f < kFamilies; ++f) {
        const PatchPair pair = patch_pair(f, 1);
        collect(pair.p, pair.q);
        collect(pair.q, pair.p);
        family += around.voxels();
      }
      if (voxel.active) gradient[around.offset(place[0], place[1], place[2])] = sum;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const Surroundings<D>& around = volumes.around;
    const int64_t number = volumes.number(group, item);
    return {this, image + volumes.of_image(group, item) * volumes.voxels(),
            families + number * pair_families(D) * around.voxels(),
            gradient + number * around.voxels()};
  }
};

// A voxel at the border is also what the image is beyond it.
template <class S, int D>
struct FoldedGradient {
  using T = Arithmetic<S>;
  static constexpr int kDepth = 4, kUnroll = 1, kMinBlocks = 4;
  Volumes<D> volumes;  // with what surrounds them
  const T* continued;
  S* gradient;

  struct Element {
    const FoldedGradient* self;
    const T* continued;
    S* gradient;

    REGKERNELS_HD int begin(int i, int axis) const {
      return i == 0 ? -self->volumes.around.margin[axis] : i;
    }
    REGKERNELS_HD int end(int i, int axis) const {
      const Surroundings<D>& around = self->volumes.around;
      return (i == around.size[axis] - 1 ? i + around.margin[axis] : i) + 1;
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Surroundings<D>& around = self->volumes.around;
      T sum = 0;
      REGKERNELS_NO_UNROLL
      for (int z = begin(voxel.z, 2); z < end(voxel.z, 2); ++z) {
        REGKERNELS_NO_UNROLL
        for (int y = begin(voxel.y, 1); y < end(voxel.y, 1); ++y) {
          REGKERNELS_NO_UNROLL
          for (int x = begin(voxel.x, 0); x < end(voxel.x, 0); ++x) {
            sum += continued[around.offset(x, y, z)];
          }
        }
      }
      if (voxel.active) gradient[voxel.row(around.size) + voxel.x] = to_storage<S>(2 * sum);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int64_t number = volumes.number(group, item);
    return {this, continued + number * volumes.around.voxels(),
            gradient + number * volumes.voxels()};
  }
};

// Calls body(checked, TypeTag<S>, IntTag<D>) with the types for this call.
template <class Body>
void with_mind_ssc(const Call& call, const Body& body) {
  const auto& checked = call.checked<MindSscCall>();
  dispatch_storage<true>(checked.storage, [&](auto type) {
    dispatch_dimensions(checked.dimensions,
                        [&](auto dimensions) { body(checked, type, dimensions); });
  });
}

// The distances of the pairs of a call's image, and all that a step from there on needs to know.
template <class S, int D>
struct DistancesOfCall {
  using T = Arithmetic<S>;
  Volumes<D> volumes;
  DistanceReader<T, D> reader;
  VoxelSpace space;

  template <class Device>
  static DistancesOfCall compute(const Device& device, const Call& call,
                                 const MindSscCall& checked) {
    const auto around = surroundings<D>(checked.sizes, checked.dilation);
    T* const distances = call.output("distances").template as<T>();
    average_patches(device,
                    SquaredDifferences<S, D>{call.input("image").template as<const S>(), around,
                                             checked.dilation},
                    checked.in_image, checked.radius, distances);
    return {{around, checked.batch.items, checked.in_image},
            {distances, around, checked.dilation},
            voxel_space(checked.batch.groups, checked.batch.items, checked.sizes)};
  }

  template <class Device>
  void describe(const Device& device, const Call& call, const Tensor& mean_variance) const {
    for_each_voxel(device, space,
                   Descriptors<S, D>{volumes, reader, mean_variance.template as<const T>(),
                                     call.output("output").template as<S>()});
  }
};

template <class Device>
void mind_ssc(const Device& device, const Call& call) {
  with_mind_ssc(call, [&](const MindSscCall& checked, auto type, auto dimensions) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    constexpr int D = decltype(dimensions)::value;
    const auto distances = DistancesOfCall<S, D>::compute(device, call, checked);
    const Tensor& saved = call.output("mean_variance");
    Tensor mean = saved.present ? saved : call.output("mean");
    mean.shape = {checked.batch.groups, checked.batch.items};
    reduce_voxels(device, distances.space, MeanVariance<T, D>{distances.volumes, distances.reader},
                  call.output("partial_sums"), mean);
    distances.describe(device, call, mean);
  });
}

template <class Device>
void mind_ssc_variances(const Device& device, const Call& call) {
  with_mind_ssc(call, [&](const MindSscCall& checked, auto type, auto dimensions) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    constexpr int D = decltype(dimensions)::value;
    const auto distances = DistancesOfCall<S, D>::compute(device, call, checked);
    for_each_voxel(device, distances.space,
                   Variances<T, D>{distances.volumes, distances.reader,
                                   call.output("output").template as<T>()});
  });
}

template <class Device>
void mind_ssc_of_variance(const Device& device, const Call& call) {
  with_mind_ssc(call, [&](const MindSscCall& checked, auto type, auto dimensions) {
    using S = typename decltype(type)::type;
    constexpr int D = decltype(dimensions)::value;
    const auto distances = DistancesOfCall<S, D>::compute(device, call, checked);
    distances.describe(device, call, call.input("mean_variance"));
  });
}

template <class Device>
void mind_ssc_grad(const Device& device, const Call& call) {
  with_mind_ssc(call, [&](const MindSscCall& checked, auto type, auto dimensions) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    constexpr int D = decltype(dimensions)::value;
    const int radius = checked.radius, dilation = checked.dilation;
    const Batch& batch = checked.batch;
    const S* const image = call.input("image").template as<const S>();
    const Tensor& grad_output = call.input("grad_output");
    T* const families = call.output("families").template as<T>();
    T* const slopes = call.output("slopes").template as<T>();
    T* const continued = slopes;
    const VoxelSpace space = voxel_space(batch.groups, batch.items, checked.sizes);

    const auto near = surroundings<D>(checked.sizes, dilation);
    average_patches(device, SquaredDifferences<S, D>{image, near, dilation}, checked.in_image,
                    radius, families);
    for_each_voxel(device, space,
                   DistanceSlopes<S, D>{{near, batch.items, checked.in_image},
                                        {families, near, dilation},
                                        call.input("mean_variance").template as<const T>(),
                                        grad_output.template as<const S>(),
                                        grad_output.shape[0] * batch.items,
                                        slopes});

    const auto around = surroundings<D>(checked.sizes, radius + dilation);
    const Volumes<D> volumes{around, batch.items, checked.in_image};
    average_patches(device, DistanceGradients<T, D>{slopes, around, dilation}, checked.in_output,
                    radius, families);
    const Sizes extended = extended_sizes(checked.sizes, D, radius + dilation);
    for_each_voxel(device, voxel_space(batch.groups, batch.items, extended),
                   ContinuedGradient<S, D>{volumes, dilation, image, families, continued});
    for_each_voxel(
        device, space,
        FoldedGradient<S, D>{volumes, continued, call.output("grad_image").template as<S>()});
  });
}

}  // namespace regkernels

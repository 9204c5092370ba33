#pragma once

#include "core/dispatch.h"
#include "core/host_device.h"
#include "core/operand.h"
#include "maths/coordinates.h"
#include "ops/step_gradient/call.h"

namespace regkernels {

// The gradient before it is smoothed: at each voxel the slope of the loss times that of the moved
// image, summed over the channels, and what is added to it: the pull on a displacement, taken
// through its warp where that is given.
template <class Scalar, int Dimensions>
struct GradientProduct {
  using T = Scalar;
  static constexpr int D = Dimensions;
  Operand<const T> moved, slope, pull, displacement;
  Operand<const T> slope_scale, pull_scale;
  int64_t channels, volume;  // of an image; voxels of a channel
  Frame<T, D> frame;         // of the whole volume
  int planes;                // at hand
  FirstPlane first_plane;

  explicit GradientProduct(const Call& call)
      : moved(call.input("moved")),
        slope(call.input("slope")),
        pull(call.input("pull")),
        displacement(call.input("displacement")),
        slope_scale(call.input("slope_scale")),
        pull_scale(call.input("pull_scale")),
        first_plane(call.slab) {
    const auto& checked = call.checked<StepGradientCall>();
    const int64_t sizes[3] = {checked.sizes.x, checked.sizes.y, checked.planes};
    frame = make_frame<T, D>(sizes, true);
    channels = checked.channels;
    volume = checked.sizes.voxels();
    planes = static_cast<int>(checked.sizes.z);
  }

  // Of which neighbours along an axis the difference is taken at a voxel, which itself stands for
  // one that it has not, and what the difference is multiplied by.
  struct Neighbours {
    bool below, above;
    T factor;
  };
  REGKERNELS_HD Neighbours neighbours(int axis, int x, int y, int z) const {
    const int first = axis == 2 ? first_plane() : 0;
    const int at = axis == 0 ? x : axis == 1 ? y : z;
    const int in_hand = axis == 2 ? planes : frame.size[axis];
    const bool below = at > 0 && at + first > 0;
    const bool above = at + 1 < in_hand && at + first + 1 < frame.size[axis];
    return {below, above, frame.half[axis] * (below && above ? T(0.5) : T(1))};
  }

  // The same as steps from the voxel in memory.
  struct Difference {
    int64_t low, high;
    T factor;
  };
  REGKERNELS_HD Difference difference(int axis, int x, int y, int z) const {
    const Neighbours has = neighbours(axis, x, y, z);
    const int64_t row = frame.size[0];
    const int64_t stride = axis == 0 ? 1 : axis == 1 ? row : row * frame.size[1];
    return {has.below ? -stride : 0, has.above ? stride : 0, has.factor};
  }

  // The images and the field of a batch item.
  struct Item {
    const T* moved;
    const T* slope;
    const T* pull;          // may be null
    const T* displacement;  // likewise
    T slope_scale, pull_scale;
  };
  REGKERNELS_HD Item item(int64_t group, int64_t item) const {
    return {moved.at(group, item),
            slope.at(group, item),
            pull.data == nullptr ? nullptr : pull.at(group, item),
            displacement.data == nullptr ? nullptr : displacement.at(group, item),
            slope_scale.data == nullptr ? T(1) : *slope_scale.at(group, item),
            pull_scale.data == nullptr ? T(1) : *pull_scale.at(group, item)};
  }

  // One component at a voxel, whose number is `voxel`.
  REGKERNELS_HD T component(const Item& item, int64_t voxel, int k, const Difference& along) const {
    T sum = 0;
    // A product with 0 would let through what is not finite.
    if (along.low != along.high) {
      for (int64_t c = 0; c < channels; ++c) {
        const T* const image = item.moved + (c * volume + voxel);
        sum += item.slope_scale * item.slope[c * volume + voxel] *
               ((image[along.high] - image[along.low]) * along.factor);
      }
    }
    if (item.pull == nullptr) return sum;
    const T* const pull = item.pull + voxel * D;
    if (item.displacement != nullptr && along.low != along.high) {
      const T* const at = item.displacement + voxel * D;
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        sum += item.pull_scale * pull[j] *
               ((at[along.high * D + j] - at[along.low * D + j]) * along.factor);
      }
    }
    return sum + item.pull_scale * pull[k];
  }
};

// Calls body(GradientProduct<T, D>) with the types for this call, unless there is nothing to do.
template <class Body>
void with_gradient_product(const Call& call, const Body& body) {
  const auto& checked = call.checked<StepGradientCall>();
  if (call.output("output").shape.count() == 0) return;
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      body(GradientProduct<T, decltype(dimensions)::value>(call));
    });
  });
}

}  // namespace regkernels

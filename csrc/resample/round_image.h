// Gradients of images that are stored in half precision.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/for_each.h"
#include "core/half.h"

namespace regkernels {

// Converts an image gradient, which was added up as T, to the type that it is stored in.
template <class Storage>
struct RoundImage {
  using S = Storage;
  using T = Arithmetic<S>;
  const T* sums;
  S* image;
  int rows;  // along y
  int64_t volume;

  struct Element {
    const RoundImage* self;
    int64_t start;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t row = voxel.z * self->rows + voxel.y;
      const int64_t i = start + row * voxel.row_size + voxel.x;
      if (voxel.active) self->image[i] = to_storage<S>(self->sums[i]);
    }
  };
  REGKERNELS_HD Element element(int64_t volumes, int64_t) const { return {this, volumes * volume}; }
};

template <class S, class Device>
void round_image(const Device& device, const Tensor& sums, const Tensor& image) {
  const Sizes sizes = image_sizes(image);
  const int64_t volumes = image.shape[0] * image.shape[1] * image.shape[2];
  for_each_voxel(device, voxel_space(volumes, 1, sizes),
                 RoundImage<S>{sums.as<Arithmetic<S>>(), image.as<S>(), static_cast<int>(sizes.y),
                               sizes.voxels()});
}

}  // namespace regkernels

// How the vectors that place samples lie in memory, and in which unit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/check.h"
#include "core/host_device.h"
#include "maths/coordinates.h"
#include "maths/vec.h"

namespace regkernels {

// The choices of attributes, in the order of their names.
enum class LengthUnit { kNormalised, kVoxel, kMillimetre };
enum class ComponentPlace { kLast, kFirst };
enum class ComponentOrder { kXyz, kZyx };

// As a call says it. Fields that are packed have their components last, in x, y, z order and
// normalised.
struct FieldFormat {
  bool channels_first = false;
  bool components_reversed = false;  // z, y, x
  bool in_voxels = false;

  bool packed() const { return !channels_first && !components_reversed && !in_voxels; }
};

// How many voxels of a grid a displacement of 1 in normalised coordinates is. An axis of one voxel
// has no extent with align_corners: the scale of two voxels keeps the conversion invertible, and
// displacements along it have no effect anyway.
inline double voxels_per_normalised(int64_t size, bool align_corners) {
  return half_extent(align_corners ? std::max<int64_t>(size, 2) : size, align_corners);
}

template <class T, int D>
struct FieldLayout {
  bool packed = true;
  // The rest is for fields that are not.
  int64_t voxel = D;            // numbers from one voxel to the next
  Vec<int64_t, D> component{};  // from a voxel's first number to those of its components
  Vec<T, D> scale{};            // from the unit to normalised coordinates

  FieldLayout() = default;
  // `sizes` are those of the grid that displacements are measured on, of which the field may be a
  // part of `voxels`.
  FieldLayout(const FieldFormat& format, const int64_t (&sizes)[3], int64_t voxels,
              bool align_corners)
      : packed(format.packed()), voxel(format.channels_first ? 1 : D) {
    for (int k = 0; k < D; ++k) {
      const int place = format.components_reversed ? D - 1 - k : k;
      component[k] = format.channels_first ? place * voxels : place;
      scale[k] = T(1);
      if (format.in_voxels) {
        scale[k] = static_cast<T>(1 / voxels_per_normalised(sizes[k], align_corners));
      }
    }
  }

  REGKERNELS_HD Vec<T, D> load(const T* field, int64_t index) const {
    const T* const first = field + index * voxel;
    Vec<T, D> result;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) result[k] = first[component[k]] * scale[k];
    return result;
  }
  // Stores the gradient with respect to what `load` has read.
  REGKERNELS_HD void store_gradient(T* field, int64_t index, const Vec<T, D>& value) const {
    T* const first = field + index * voxel;
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) first[component[k]] = value[k] * scale[k];
  }
};

}  // namespace regkernels

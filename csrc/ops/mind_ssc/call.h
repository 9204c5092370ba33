#pragma once

#include <algorithm>
#include <cstdint>

#include "core/check.h"
#include "core/host_device.h"

namespace regkernels {

// The patches are at most so wide: each width has kernels of its own.
inline constexpr int kLargestPatchRadius = 4;
inline constexpr int kLargestDilation = 16;

// Pairs of patches come in families of two: see mind_ssc.h.
REGKERNELS_HD constexpr int pair_families(int dimensions) { return dimensions * (dimensions - 1); }
REGKERNELS_HD constexpr int descriptor_channels(int dimensions) {
  return 2 * pair_families(dimensions);
}

// What a checked call amounts to. A volume is one channel of one item of one group.
struct MindSscCall {
  DType arithmetic;
  DType storage;
  int dimensions;
  Sizes sizes;
  Batch batch;        // with the channels among the items
  int64_t in_image;   // volumes that the image has; those of further groups are the same again
  int64_t in_output;  // volumes
  int radius;
  int dilation;
};

// The region that patches reach beyond a volume, on each side.
inline Sizes extended_sizes(const Sizes& sizes, int dimensions, int margin) {
  return {dimensions == 3 ? sizes.z + 2 * margin : 1, sizes.y + 2 * margin, sizes.x + 2 * margin};
}

// The voxels of a volume and of what surrounds it. Positions are those in the volume: negative ones
// lie before it.
template <int D>
struct Surroundings {
  int size[3];    // of the volume along x, y, z
  int margin[3];  // on each side

  REGKERNELS_HD int extent(int axis) const { return size[axis] + 2 * margin[axis]; }
  REGKERNELS_HD int64_t stride(int axis) const {
    const int64_t row = extent(0);
    return axis == 0 ? 1 : axis == 1 ? row : row * extent(1);
  }
  REGKERNELS_HD int64_t voxels() const { return stride(2) * extent(2); }
  REGKERNELS_HD int64_t offset(int x, int y, int z) const {
    return (z + margin[2]) * stride(2) + (y + margin[1]) * stride(1) + (x + margin[0]);
  }
  REGKERNELS_HD bool contains(int i, int axis) const {
    return static_cast<unsigned>(i + margin[axis]) < static_cast<unsigned>(extent(axis));
  }
};

template <int D>
Surroundings<D> surroundings(const Sizes& sizes, int margin) {
  return {{static_cast<int>(sizes.x), static_cast<int>(sizes.y), static_cast<int>(sizes.z)},
          {margin, margin, D == 3 ? margin : 0}};
}

// The two neighbours that a family compares: p is `dilation` along one axis, q is `dilation` along
// a later one, forwards or backwards. Channel 2 f compares those of family f, and channel 2 f + 1
// their opposites, -p and -q.
struct PatchPair {
  int p[3], q[3];  // x, y, z

  // Where family f has the distance of the second channel's pair, relative to the voxel.
  REGKERNELS_HD int shift(int axis) const { return -(p[axis] + q[axis]); }
};

REGKERNELS_HD PatchPair patch_pair(int family, int dilation) {
  const int axes = family / 2;  // x and y, x and z, y and z
  const int first = axes == 2 ? 1 : 0, second = axes == 0 ? 1 : 2;
  PatchPair pair;
  REGKERNELS_UNROLL
  for (int axis = 0; axis < 3; ++axis) {
    pair.p[axis] = axis == first ? dilation : 0;
    pair.q[axis] = axis == second ? (family % 2 == 0 ? dilation : -dilation) : 0;
  }
  return pair;
}

}  // namespace regkernels

// What is averaged over patches: squared differences on the way to the descriptors, and on the way
// back the gradients of the distances.
//
// Each has a view of one family in one volume. What it has at a position in or around the volume it
// combines from two arrays, each of which it reads at a displacement from there. On the CPU
// `view.row(...)` is a run of such values along x.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/half.h"
#include "core/host_device.h"
#include "ops/mind_ssc/call.h"

namespace regkernels {

REGKERNELS_HD int nearest_index(int i, int size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// The image beyond its border is that of the nearest voxel.
template <class S>
struct ContinuedImage {
  const S* data;
  int size[3];

  REGKERNELS_HD const S* row(int y, int z) const {
    const int64_t rows = static_cast<int64_t>(nearest_index(z, size[2])) * size[1];
    return data + (rows + nearest_index(y, size[1])) * size[0];
  }
};

template <class S_, int D_>
struct SquaredDifferences {
  using S = S_;
  using T = Arithmetic<S>;
  static constexpr int D = D_;
  const S* image;
  Surroundings<D> around;
  int dilation;

  struct View {
    using S = S_;
    static constexpr bool kContinued = true;  // beyond the border
    ContinuedImage<S> image;
    PatchPair pair;

    REGKERNELS_HD const S* array(int) const { return image.data; }
    REGKERNELS_HD int displacement(int array, int axis) const {
      return array == 0 ? pair.p[axis] : pair.q[axis];
    }
    REGKERNELS_HD static T combined(T a, T b) { return (a - b) * (a - b); }

    void row(int first, int count, int y, int z, T* __restrict__ out) const {
      const S* const a = image.row(y + pair.p[1], z + pair.p[2]);
      const S* const b = image.row(y + pair.q[1], z + pair.q[2]);
      const int size = image.size[0];
      const int along_a = first + pair.p[0], along_b = first + pair.q[0];
      const auto at = [&](int ia, int ib) {
        return combined(to_arithmetic(a[ia]), to_arithmetic(b[ib]));
      };
      // Where neither neighbour lies beyond the border there is nothing to choose.
      const int begin = std::clamp(-std::min(along_a, along_b), 0, count);
      const int end = std::clamp(size - std::max(along_a, along_b), begin, count);
      const auto at_border = [&](int from, int to) {
        for (int i = from; i < to; ++i) {
          out[i] = at(nearest_index(along_a + i, size), nearest_index(along_b + i, size));
        }
      };
      at_border(0, begin);
      for (int i = begin; i < end; ++i) out[i] = at(along_a + i, along_b + i);
      at_border(end, count);
    }
  };

  REGKERNELS_HD View view(int64_t volume, int family) const {
    const int64_t voxels = static_cast<int64_t>(around.size[2]) * around.size[1] * around.size[0];
    return {{image + volume * voxels, {around.size[0], around.size[1], around.size[2]}},
            patch_pair(family, dilation)};
  }
};

// The gradients of the distances of both of a family's channels, at the place of the first one's
// pair, and none where there is no voxel.
template <class T_, int D_>
struct DistanceGradients {
  using T = T_;
  static constexpr int D = D_;
  const T* slopes;  // of each volume its channels
  Surroundings<D> around;
  int dilation;

  struct View {
    using S = T_;
    static constexpr bool kContinued = false;
    const T* first;
    const T* second;
    int size[3];
    PatchPair pair;

    REGKERNELS_HD const T* array(int array) const { return array == 0 ? first : second; }
    REGKERNELS_HD int displacement(int array, int axis) const {
      return array == 0 ? 0 : -pair.shift(axis);
    }
    REGKERNELS_HD static T combined(T a, T b) { return a + b; }

    void add_row(const T* channel, int from, int count, int y, int z, T* __restrict__ out) const {
      if (y < 0 || y >= size[1] || z < 0 || z >= size[2]) return;
      const T* const row = channel + (static_cast<int64_t>(z) * size[1] + y) * size[0];
      const int begin = std::max(0, -from), end = std::min(count, size[0] - from);
      for (int i = begin; i < end; ++i) out[i] += row[from + i];
    }
    void row(int from, int count, int y, int z, T* __restrict__ out) const {
      std::fill(out, out + count, T(0));
      add_row(first, from, count, y, z, out);
      add_row(second, from - pair.shift(0), count, y - pair.shift(1), z - pair.shift(2), out);
    }
  };

  REGKERNELS_HD View view(int64_t volume, int family) const {
    const int64_t voxels = static_cast<int64_t>(around.size[2]) * around.size[1] * around.size[0];
    const T* const first = slopes + (volume * descriptor_channels(D) + 2 * family) * voxels;
    return {first,
            first + voxels,
            {around.size[0], around.size[1], around.size[2]},
            patch_pair(family, dilation)};
  }
};

}  // namespace regkernels

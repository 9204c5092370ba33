#pragma once

#include <algorithm>
#include <cmath>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/operand.h"
#include "maths/product_plus.h"
#include "maths/vec.h"
#include "maths/voxel_vectors.h"
#include "ops/coverage/call.h"
#include "ops/coverage/coverage.h"

namespace regkernels {

// A number as a share between 0 and 1; one that is none is 0.
template <class T>
REGKERNELS_HD T share_of(T value) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return __saturatef(value);  // comes for free with what it is from
#endif
  return value > 0 ? (value < 1 ? value : T(1)) : T(0);
}

// The larger and the smaller of two numbers, and neither if one of them is none.
template <class T>
REGKERNELS_HD T larger(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
REGKERNELS_HD T smaller(T a, T b) {
  return a < b || a != a ? a : b;
}

// Along each axis, a place is `depth` voxels inside of the centres of the image's first and last
// voxel, less the margin, and weighs 1 + slope depth, between 0 and 1. With a reach, the box around
// the place has to lie inside, too: for all voxels whose box is on the grid as a whole it has the
// same extent, so that the weight differs from that of the place alone by a constant.
template <class Scalar, int D, bool kHasReach>
struct Coverage {
  using T = Scalar;
  static constexpr int kDepth = 4, kUnroll = 1, kMinBlocks = sizeof(T) == 8 ? 2 : 4;
  // Of the grid, in x, y, z order. A single slice has the half extent 1: what displaces it is in
  // normalised coordinates.
  int size[D];
  T centre[D];
  T half[D];
  T inverse[D];
  // Of the image. The centres of a single slice are all one, but a normalised coordinate of 1 is
  // half a voxel away from them.
  int source_size[D];
  T source_half[D];
  T extent[D];
  T ratio[D];  // of the image's half extent to that of the grid; exactly 1 for equal sizes
  FirstPlane first_plane;
  Operand<const T> affine, displacement, margin, reach;
  Operand<T> output;

  struct Element {
    static constexpr bool kComputesRows = true;
    const Coverage* self;
    int first;
    // From the grid's voxels about its centre to the image's about the centre of that.
    T matrix[D][D];
    T offset[D];
    T edge[D];
    T slope[D];
    T top[D];  // what a place at the image's centre would weigh, were there no bound
    T reach;
    const T* displacement;
    T* output;

    REGKERNELS_HD Vec<int, D> index_of(int z, int y, int x) const {
      Vec<int, D> index;
      index[0] = x;
      index[1] = y;
      if constexpr (D == 3) index[2] = z;
      index[D - 1] += first;
      return index;
    }

    // Whether the box around a voxel is on the grid as a whole.
    REGKERNELS_HD bool has_whole_box(const Vec<int, D>& index) const {
      bool whole = true;
      if constexpr (kHasReach) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          whole = whole && static_cast<T>(index[k]) >= reach &&
                  static_cast<T>(self->size[k] - 1 - index[k]) >= reach;
        }
      }
      return whole;
    }

    // The share along the axis j of a place whose box is cut off at the faces of the grid.
    REGKERNELS_HD T share_with_cut_box(int j, T place, const Vec<int, D>& index) const {
      T below = 0, above = 0;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const T before = smaller(reach, static_cast<T>(index[k]));
        const T after = smaller(reach, static_cast<T>(self->size[k] - 1 - index[k]));
        const T factor = matrix[j][k];
        below = product_plus(std::abs(factor), factor > 0 ? before : after, below);
        above = product_plus(std::abs(factor), factor > 0 ? after : before, above);
      }
      const T farthest = larger(std::abs(place - below), std::abs(place + above));
      const T quarter = static_cast<T>((self->source_size[j] - 1) / 4);
      const T inside = self->extent[j] - std::abs(place) - edge[j];
      const T around = self->extent[j] - farthest;
      const T depth = smaller(inside, larger(around, inside - quarter));
      return share_of(product_plus(slope[j], depth, T(1)));
    }

    template <bool kHasWholeBox>
    REGKERNELS_HD T weight(const Vec<int, D>& index, const Vec<T, D>& u) const {
      Vec<T, D> q;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        q[k] = product_plus(u[k], self->half[k], static_cast<T>(index[k]) - self->centre[k]);
      }
      T weight = 1;
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        T place = offset[j];
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) place = product_plus(matrix[j][k], q[k], place);
        if constexpr (kHasWholeBox) {
          weight *= share_of(product_plus(-slope[j], std::abs(place), top[j]));
        } else {
          weight *= share_with_cut_box(j, place, index);
        }
      }
      return weight;
    }

    REGKERNELS_HD Vec<T, D> vector_at(int64_t i) const {
      return displacement == nullptr ? Vec<T, D>{} : load_vec<T, D>(displacement + i * D);
    }

    REGKERNELS_HD int64_t row_start(int z, int y) const {
      return static_cast<int64_t>(z * self->size[1] + y) * self->size[0];
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t i = row_start(voxel.z, voxel.y) + voxel.x;
      const Vec<int, D> index = index_of(voxel.z, voxel.y, voxel.x);
      const Vec<T, D> u = vector_at(i);
      const T value = has_whole_box(index) ? weight<true>(index, u) : weight<false>(index, u);
      if (voxel.active) output[i] = value;
    }

    template <bool kIsDisplaced, bool kHasWholeBox>
    void part_of_row(int z, int y, int begin, int end) const {
      // No store can change copies, so that the loop becomes vector code.
      const Coverage body = *self;
      Element here = *this;
      here.self = &body;
      const int64_t start = here.row_start(z, y);
      const T* const vectors = kIsDisplaced ? here.displacement + start * D : nullptr;
      T* const weights = here.output + start;
      for (int x = begin; x < end; ++x) {
        Vec<T, D> u{};
        if constexpr (kIsDisplaced) u = load_vec<T, D>(vectors + static_cast<int64_t>(x) * D);
        weights[x] = here.template weight<kHasWholeBox>(here.index_of(z, y, x), u);
      }
    }

    template <bool kIsDisplaced>
    void parts_of_row(int z, int y, int count) const {
      const auto is_whole = [&](int x) { return has_whole_box(index_of(z, y, x)); };
      int begin = 0, end = count;
      if constexpr (kHasReach) {
        while (begin < end && !is_whole(begin)) ++begin;
        while (end > begin && !is_whole(end - 1)) --end;
        part_of_row<kIsDisplaced, false>(z, y, 0, begin);
        part_of_row<kIsDisplaced, false>(z, y, end, count);
      }
      part_of_row<kIsDisplaced, true>(z, y, begin, end);
    }

    void row(int z, int y, int count) const {
      if (displacement == nullptr) {
        parts_of_row<false>(z, y, count);
      } else {
        parts_of_row<true>(z, y, count);
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    Element result;
    result.self = this;
    result.first = first_plane();
    // The box around a place and that of a negative reach are the same.
    result.reach = reach.data == nullptr ? T(0) : std::abs(*reach.at(group, item));
    const T* entries = affine.data == nullptr ? nullptr : affine.at(group, item);
    const T* edges = margin.data == nullptr ? nullptr : margin.at(group, item);
    REGKERNELS_UNROLL
    for (int j = 0; j < D; ++j) {
      result.offset[j] = entries == nullptr ? T(0) : source_half[j] * entries[j * (D + 1) + D];
      T sum = 0;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const T scale = j == k ? ratio[j] : source_half[j] * inverse[k];
        const T entry = entries == nullptr ? T(j == k) : entries[j * (D + 1) + k];
        result.matrix[j][k] = entry * scale;
        sum += std::abs(result.matrix[j][k]);
      }
      const T edge = edges == nullptr ? T(0) : edges[j];
      result.edge[j] = edge;
      // Data ends at the outer edge of the last voxel, half a voxel from its centre, or where a
      // margin has its centre. Across a single slice it ends at the next one.
      result.slope[j] = edge > 0 || source_size[j] == 1 ? T(1) : T(2);
      T depth = extent[j] - edge;
      if constexpr (kHasReach) {
        const T quarter = static_cast<T>((source_size[j] - 1) / 4);
        const T around = product_plus(-sum, result.reach, extent[j]);
        depth = smaller(depth, larger(around, depth - quarter));
      }
      result.top[j] = product_plus(result.slope[j], depth, T(1));
    }
    result.displacement = displacement.data == nullptr ? nullptr : displacement.at(group, item);
    result.output = output.at(group, item);
    return result;
  }
};

template <class Body>
Body coverage_body(const Call& call) {
  using T = typename Body::T;
  const auto& checked = call.checked<CoverageCall>();
  const Sizes &source = checked.source_sizes, &sizes = checked.sizes;
  const int64_t from[3] = {source.x, source.y, source.z};
  int64_t onto[3] = {sizes.x, sizes.y, sizes.z};
  if (call.slab.present()) onto[checked.dimensions - 1] = call.slab.planes;
  Body body;
  for (int k = 0; k < checked.dimensions; ++k) {
    const double half = onto[k] > 1 ? 0.5 * static_cast<double>(onto[k] - 1) : 1;
    const double source_half = 0.5 * static_cast<double>(std::max<int64_t>(from[k] - 1, 1));
    body.size[k] = static_cast<int>(onto[k]);
    body.centre[k] = static_cast<T>(0.5 * static_cast<double>(onto[k] - 1));
    body.half[k] = static_cast<T>(half);
    body.inverse[k] = static_cast<T>(1 / half);
    body.source_size[k] = static_cast<int>(from[k]);
    body.source_half[k] = static_cast<T>(source_half);
    body.extent[k] = static_cast<T>(from[k] > 1 ? source_half : 0);
    body.ratio[k] = static_cast<T>(source_half / half);
  }
  body.first_plane = FirstPlane(call.slab);
  body.affine = Operand<const T>(call.input("affine"));
  body.displacement = Operand<const T>(call.input("displacement"));
  body.margin = Operand<const T>(call.input("margin"));
  body.reach = Operand<const T>(call.input("reach"));
  body.output = Operand<T>(call.output("output"));
  return body;
}

template <class Device>
void coverage(const Device& device, const Call& call) {
  const auto& checked = call.checked<CoverageCall>();
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      if (call.input("reach").present) {
        for_each_voxel(device, space, coverage_body<Coverage<T, D, true>>(call));
      } else {
        for_each_voxel(device, space, coverage_body<Coverage<T, D, false>>(call));
      }
    });
  });
}

}  // namespace regkernels

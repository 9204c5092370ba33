#pragma once

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "maths/coordinates.h"
#include "maths/voxel_vectors.h"
#include "ops/affine_warp/affine_warp.h"
#include "ops/affine_warp/call.h"

namespace regkernels {

// The normalised coordinate of a voxel, of an array that begins at the plane `first`.
template <class T, int D>
REGKERNELS_HD Vec<T, D> normalised(const Frame<T, D>& frame, const Voxel& voxel, int first) {
  Vec<int, D> index = voxel_index<D>(voxel);
  index[D - 1] += first;
  Vec<T, D> x;
  REGKERNELS_UNROLL
  for (int k = 0; k < D; ++k)
    x[k] = (static_cast<T>(index[k]) - frame.centre[k]) * frame.inverse[k];
  return x;
}

template <class T, int D>
REGKERNELS_HD int64_t field_row(const Frame<T, D>& frame, const Voxel& voxel) {
  return static_cast<int64_t>(voxel.z * frame.size[1] + voxel.y) * frame.size[0] * D;
}

template <class Scalar, int D>
struct AffineWarpForward {
  using T = Scalar;
  static constexpr int kDepth = 4, kUnroll = 1, kMinBlocks = 4;
  Frame<T, D> frame;
  FirstPlane first_plane;
  Operand<const T> affine, displacement;
  Operand<T> output;

  struct Element {
    const AffineWarpForward* self;
    int first;
    T matrix[D][D + 1];
    const T* displacement;
    T* output;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t row = field_row(self->frame, voxel);
      const Vec<T, D> x = normalised(self->frame, voxel, first);
      Vec<T, D> value = load_vec<T, D>(displacement + row + static_cast<int64_t>(voxel.x) * D);
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        T sum = matrix[j][D];
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sum += matrix[j][k] * x[k];
        value[j] += sum;
      }
      store_packed(output + row, voxel, value);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    Element result;
    result.self = this;
    result.first = first_plane();
    const T* entries = affine.at(group, item);
    REGKERNELS_UNROLL
    for (int j = 0; j < D; ++j) {
      REGKERNELS_UNROLL
      for (int k = 0; k <= D; ++k) result.matrix[j][k] = entries[j * (D + 1) + k];
    }
    result.displacement = displacement.at(group, item);
    result.output = output.at(group, item);
    return result;
  }
};

// The displacement's gradient is the cotangent, summed over the items that share it.
template <class Scalar, int D>
struct SumOverItems {
  using T = Scalar;
  Frame<T, D> frame;
  Operand<const T> grad_output;
  Operand<T> grad_displacement;
  int64_t shared_items;

  struct Element {
    const SumOverItems* self;
    int64_t group, item;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t row = field_row(self->frame, voxel);
      Vec<T, D> sum{};
      for (int64_t n = item; n < item + self->shared_items; ++n) {
        const Vec<T, D> g = load_vec<T, D>(self->grad_output.at(group, n) + row +
                                           static_cast<int64_t>(voxel.x) * D);
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sum[k] += g[k];
      }
      store_packed(self->grad_displacement.at(group, item) + row, voxel, sum);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const { return {this, group, item}; }
};

template <class Scalar, int D>
struct AffineWarpMoments {
  using T = Scalar;
  static constexpr int kSums = D * (D + 1);
  static constexpr int kMinBlocks = 4;
  Frame<T, D> frame;
  FirstPlane first_plane;
  Operand<const T> grad_output;

  struct Element {
    const AffineWarpMoments* self;
    int first;
    const T* grad;

    REGKERNELS_HD void operator()(const Voxel& voxel, T (&sums)[kSums]) const {
      const Vec<T, D> x = normalised(self->frame, voxel, first);
      const Vec<T, D> g =
          load_vec<T, D>(grad + field_row(self->frame, voxel) + static_cast<int64_t>(voxel.x) * D);
      REGKERNELS_UNROLL
      for (int j = 0; j < D; ++j) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) sums[j * (D + 1) + k] += g[j] * x[k];
        sums[j * (D + 1) + D] += g[j];
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, first_plane(), grad_output.at(group, item)};
  }
  REGKERNELS_HD double scale(int) const { return 1; }
};

template <class T, int D>
Frame<T, D> affine_warp_frame(const Call& call, const Sizes& sizes) {
  int64_t extent[3] = {sizes.x, sizes.y, sizes.z};
  if (call.slab.present()) extent[D - 1] = call.slab.planes;
  return make_frame<T, D>(extent, call.flag("align_corners"));
}

template <class Device>
void affine_warp(const Device& device, const Call& call) {
  const auto& checked = call.checked<AffineWarpCall>();
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      for_each_voxel(
          device, voxel_space(checked.batch.groups, checked.batch.items, checked.sizes),
          AffineWarpForward<T, D>{affine_warp_frame<T, D>(call, checked.sizes),
                                  FirstPlane(call.slab), Operand<const T>(call.input("affine")),
                                  Operand<const T>(call.input("displacement")),
                                  Operand<T>(call.output("output"))});
    });
  });
}

template <class Device>
void affine_warp_grad(const Device& device, const Call& call) {
  const auto& checked = call.checked<AffineWarpCall>();
  const Tensor& grad_affine = call.output("grad_affine");
  const Tensor& grad_displacement = call.output("grad_displacement");
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      const Frame<T, D> frame = affine_warp_frame<T, D>(call, checked.sizes);
      const Operand<const T> grad_output(call.input("grad_output"));
      if (grad_displacement.present) {
        const bool shared = grad_displacement.shape[1] != space.items;
        VoxelSpace outer = space;
        if (shared) outer.items = 1;
        for_each_voxel(device, outer,
                       SumOverItems<T, D>{frame, grad_output, Operand<T>(grad_displacement),
                                          shared ? space.items : 1});
      }
      if (grad_affine.present) {
        reduce_voxels(device, space,
                      AffineWarpMoments<T, D>{frame, FirstPlane(call.slab), grad_output},
                      call.output("partial_sums"), grad_affine);
      }
    });
  });
}

}  // namespace regkernels

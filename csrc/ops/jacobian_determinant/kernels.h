#pragma once

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/operand.h"
#include "maths/differences.h"
#include "maths/matrix.h"
#include "maths/voxel_vectors.h"
#include "ops/jacobian_determinant/call.h"
#include "ops/jacobian_determinant/jacobian_determinant.h"

namespace regkernels {

template <class Scalar, int D>
struct JacobianForward {
  using T = Scalar;
  Differences<T, D> differences;
  FirstPlane first_plane;
  int halo;  // planes of the displacement before the first of the output, in a slab
  Operand<const T> displacement;
  Operand<T> output;

  struct Element {
    const JacobianForward* self;
    int first;
    const T* displacement;
    T* output;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Differences<T, D>& d = self->differences;
      Vec<int, D> i = voxel_index<D>(voxel);
      i[D - 1] += first;
      const T value = determinant(plus_identity(d.slopes(displacement, i)));
      if (voxel.active) output[d.offset(i)] = value;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int first = first_plane();
    const int64_t plane = differences.plane();
    return {this, first, displacement.at(group, item) - (first - halo) * plane * D,
            output.at(group, item) - first * plane};
  }
};

// The gradient is a gather: each voxel collects from the neighbours whose differences it enters.
template <class Scalar, int D>
struct JacobianBackward {
  using T = Scalar;
  Differences<T, D> differences;
  FirstPlane first_plane;
  int halo;  // planes of the cotangent before the first of the result; of the displacement, twice
  Operand<const T> displacement;
  Operand<const T> grad_output;
  Operand<T> grad_displacement;

  struct Element {
    const JacobianBackward* self;
    int first;
    const T* displacement;
    const T* grad;
    T* output;

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Differences<T, D>& d = self->differences;
      Vec<int, D> i = voxel_index<D>(voxel);
      i[D - 1] += first;
      Vec<T, D> sum{};
      d.for_each_use(i, [&](const Vec<int, D>& j, int axis, T weight) {
        const Matrix<T, D> jacobian = plus_identity(d.slopes(displacement, j));
        const T g = grad[d.offset(j)] * weight;
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          if (d.frame.half[k] != 0) sum[k] += g * d.frame.half[k] * cofactor(jacobian, k, axis);
        }
      });
      const int64_t row = static_cast<int64_t>(voxel.z * d.frame.size[1] + voxel.y);
      store_packed(output + row * voxel.row_size * D, voxel, sum);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int first = first_plane();
    const int64_t plane = differences.plane();
    return {this, first, displacement.at(group, item) - (first - 2 * halo) * plane * D,
            grad_output.at(group, item) - (first - halo) * plane,
            grad_displacement.at(group, item)};
  }
};

// A difference reaches one plane beyond a slab.
inline int difference_halo(const Call& call) { return call.slab.present() ? 1 : 0; }

// Calls body(differences, space, TypeTag<T>, IntTag<D>) with the types for this call.
template <class Body>
void with_differences(const Call& call, const Body& body) {
  const auto& checked = call.checked<JacobianDeterminantCall>();
  const Sizes& sizes = checked.sizes;
  int64_t extent[3] = {sizes.x, sizes.y, sizes.z};
  if (call.slab.present()) extent[checked.dimensions - 1] = call.slab.planes;
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, sizes);
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      body(Differences<T, D>{make_frame<T, D>(extent, call.flag("align_corners"))}, space,
           TypeTag<T>{}, dimensions);
    });
  });
}

template <class Device>
void jacobian_determinant(const Device& device, const Call& call) {
  with_differences(call, [&](const auto& differences, const VoxelSpace& space, auto type,
                             auto dimensions) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(dimensions)::value;
    for_each_voxel(device, space,
                   JacobianForward<T, D>{differences, FirstPlane(call.slab), difference_halo(call),
                                         Operand<const T>(call.input("displacement")),
                                         Operand<T>(call.output("output"))});
  });
}

template <class Device>
void jacobian_determinant_grad(const Device& device, const Call& call) {
  with_differences(call, [&](const auto& differences, const VoxelSpace& space, auto type,
                             auto dimensions) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(dimensions)::value;
    for_each_voxel(device, space,
                   JacobianBackward<T, D>{differences, FirstPlane(call.slab), difference_halo(call),
                                          Operand<const T>(call.input("displacement")),
                                          Operand<const T>(call.input("grad_output")),
                                          Operand<T>(call.output("grad_displacement"))});
  });
}

}  // namespace regkernels

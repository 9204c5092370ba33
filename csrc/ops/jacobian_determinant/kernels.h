#pragma once

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/operand.h"
#include "maths/coordinates.h"
#include "maths/matrix.h"
#include "maths/voxel_vectors.h"
#include "ops/jacobian_determinant/call.h"
#include "ops/jacobian_determinant/jacobian_determinant.h"

namespace regkernels {

// Takes the differences of a displacement field: they are central inside, one-sided at the two
// ends, and none along an axis of one voxel.
template <class T, int D>
struct Differences {
  Frame<T, D> frame;

  REGKERNELS_HD int64_t offset(const Vec<int, D>& i) const {
    int64_t row = D == 3 ? i[D - 1] * static_cast<int64_t>(frame.size[1]) + i[1] : i[1];
    return row * frame.size[0] + i[0];
  }

  // Jacobian of x + u(x) at voxel i, in voxel units: entry (k, axis) is d(x + u)_k / d axis.
  REGKERNELS_HD Matrix<T, D> jacobian(const T* u, const Vec<int, D>& i) const {
    Matrix<T, D> result;
    REGKERNELS_UNROLL
    for (int axis = 0; axis < D; ++axis) {
      Vec<int, D> low = i, high = i;
      if (i[axis] > 0) low[axis] -= 1;
      if (i[axis] < frame.size[axis] - 1) high[axis] += 1;
      const int steps = high[axis] - low[axis];
      const T scale = steps == 2 ? T(0.5) : T(1);
      const T* a = u + offset(low) * D;
      const T* b = u + offset(high) * D;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        // A product with 0 would let through a displacement that is not finite.
        const bool counts = steps != 0 && frame.half[k] != 0;
        const T slope = counts ? scale * frame.half[k] * (b[k] - a[k]) : T(0);
        result.m[k][axis] = (k == axis ? T(1) : T(0)) + slope;
      }
    }
    return result;
  }
};

template <class Scalar, int D>
struct JacobianForward {
  using T = Scalar;
  Differences<T, D> differences;
  Operand<const T> displacement;
  Operand<T> output;

  struct Element {
    const JacobianForward* self;
    const T* displacement;
    T* output;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Differences<T, D>& d = self->differences;
      const Vec<int, D> i = voxel_index<D>(voxel);
      const T value = determinant(d.jacobian(displacement, i));
      if (voxel.active) output[d.offset(i)] = value;
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, displacement.at(group, item), output.at(group, item)};
  }
};

// The gradient is a gather: each voxel collects from the neighbours whose differences it enters.
template <class Scalar, int D>
struct JacobianBackward {
  using T = Scalar;
  Differences<T, D> differences;
  Operand<const T> displacement;
  Operand<const T> grad_output;
  Operand<T> grad_displacement;

  struct Element {
    const JacobianBackward* self;
    const T* displacement;
    const T* grad;
    T* output;

    // The difference at voxel j along `axis` contains the voxel in question `weight` times.
    REGKERNELS_HD void collect(const Vec<int, D>& j, int axis, T weight, Vec<T, D>& sum) const {
      const Differences<T, D>& d = self->differences;
      const Matrix<T, D> jacobian = d.jacobian(displacement, j);
      const T g = grad[d.offset(j)] * weight;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        if (d.frame.half[k] != 0) sum[k] += g * d.frame.half[k] * cofactor(jacobian, k, axis);
      }
    }

    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const Differences<T, D>& d = self->differences;
      const Vec<int, D> i = voxel_index<D>(voxel);
      Vec<T, D> sum{};
      REGKERNELS_UNROLL
      for (int axis = 0; axis < D; ++axis) {
        const int last = d.frame.size[axis] - 1;
        if (last == 0) continue;
        Vec<int, D> j = i;
        if (i[axis] > 0) {
          j[axis] = i[axis] - 1;
          collect(j, axis, j[axis] == 0 ? T(1) : T(0.5), sum);
        }
        if (i[axis] < last) {
          j[axis] = i[axis] + 1;
          collect(j, axis, j[axis] == last ? T(-1) : T(-0.5), sum);
        }
        if (i[axis] == 0) collect(i, axis, T(-1), sum);
        if (i[axis] == last) collect(i, axis, T(1), sum);
      }
      const int64_t row = static_cast<int64_t>(voxel.z * d.frame.size[1] + voxel.y);
      store_packed(output + row * voxel.row_size * D, voxel, sum);
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    return {this, displacement.at(group, item), grad_output.at(group, item),
            grad_displacement.at(group, item)};
  }
};

// Calls body(differences, space, TypeTag<T>, IntTag<D>) with the types for this call.
template <class Body>
void with_differences(const Call& call, const Body& body) {
  const auto& checked = call.checked<JacobianDeterminantCall>();
  const Sizes& sizes = checked.sizes;
  const int64_t extent[3] = {sizes.x, sizes.y, sizes.z};
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
                   JacobianForward<T, D>{differences, Operand<const T>(call.input("displacement")),
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
                   JacobianBackward<T, D>{differences, Operand<const T>(call.input("displacement")),
                                          Operand<const T>(call.input("grad_output")),
                                          Operand<T>(call.output("grad_displacement"))});
  });
}

}  // namespace regkernels

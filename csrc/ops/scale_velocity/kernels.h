#pragma once

#include <cmath>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "ops/scale_velocity/scale_velocity.h"

namespace regkernels {

template <class Scalar>
struct Scale {
  using T = Scalar;
  const T* input;
  T* output;
  T factor;  // a power of two: exact

  struct Element {
    const Scale* self;
    int64_t start;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t i = start + static_cast<int64_t>(voxel.y) * voxel.row_size + voxel.x;
      if (voxel.active) self->output[i] = self->input[i] * self->factor;
    }
  };
  int64_t plane;
  REGKERNELS_HD Element element(int64_t group, int64_t) const { return {this, group * plane}; }
};

template <class Device>
void scale(const Device& device, const Tensor& input, const Tensor& output, int64_t num_steps) {
  dispatch_dtype(input.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    // The loop takes any array as rows of its last spatial axis and components.
    const int rank = input.shape.rank();
    const int64_t row = input.shape[rank - 1] * input.shape[rank - 2];
    const int64_t rows = input.shape[rank - 3];
    const int64_t planes = row * rows == 0 ? 0 : input.shape.count() / (row * rows);
    const VoxelSpace space{planes, 1, 1, static_cast<int>(rows), static_cast<int>(row)};
    for_each_voxel(
        device, space,
        Scale<T>{input.as<T>(), output.as<T>(),
                 static_cast<T>(std::ldexp(1.0, -static_cast<int>(num_steps))), row * rows});
  });
}

template <class Device>
void scale_velocity(const Device& device, const Call& call) {
  scale(device, call.input("velocity"), call.output("output"), call.integer("num_steps"));
}

template <class Device>
void scale_velocity_grad(const Device& device, const Call& call) {
  scale(device, call.input("grad_output"), call.output("grad_velocity"), call.integer("num_steps"));
}

}  // namespace regkernels

#pragma once

#include "core/dispatch.h"
#include "core/for_each.h"
#include "maths/voxel_vectors.h"
#include "ops/convert_displacement/call.h"
#include "ops/convert_displacement/convert_displacement.h"

namespace regkernels {

template <class Scalar, int D>
struct Conversion {
  using T = Scalar;
  const T* input;
  T* output;
  int64_t items;
  int64_t volume;  // voxels
  int rows;        // voxels along y
  FieldFormat source, target;
  T factor[D];

  struct Element {
    const Conversion* self;
    const T* input;
    T* output;
    REGKERNELS_HD void operator()(const Voxel& voxel) const {
      const int64_t row = static_cast<int64_t>(voxel.z) * self->rows + voxel.y;
      const int64_t here = row * voxel.row_size + voxel.x;
      Vec<T, D> value;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const int from = self->source.components_reversed ? D - 1 - k : k;
        const int to = self->target.components_reversed ? D - 1 - k : k;
        const int64_t place =
            self->source.channels_first ? from * self->volume + here : here * D + from;
        value[to] = input[place] * self->factor[k];
      }
      if (!self->target.channels_first) {
        store_packed(output + row * voxel.row_size * D, voxel, value);
      } else if (voxel.active) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) output[k * self->volume + here] = value[k];
      }
    }
  };

  REGKERNELS_HD Element element(int64_t group, int64_t item) const {
    const int64_t start = (group * items + item) * volume * D;
    return {this, input + start, output + start};
  }
};

template <class Device>
void convert(const Device& device, const Call& call, const char* input, const char* output) {
  const auto& checked = call.checked<ConvertDisplacementCall>();
  const Batch& batch = checked.batch;
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_dimensions(checked.dimensions, [&](auto dimensions) {
      constexpr int D = decltype(dimensions)::value;
      Conversion<T, D> body{call.input(input).as<T>(),
                            call.output(output).template as<T>(),
                            batch.items,
                            checked.sizes.voxels(),
                            static_cast<int>(checked.sizes.y),
                            checked.source,
                            checked.target,
                            {}};
      for (int k = 0; k < D; ++k) body.factor[k] = static_cast<T>(checked.factor[k]);
      for_each_voxel(device, voxel_space(batch.groups, batch.items, checked.sizes), body);
    });
  });
}

template <class Device>
void convert_displacement(const Device& device, const Call& call) {
  convert(device, call, "displacement", "output");
}

template <class Device>
void convert_displacement_grad(const Device& device, const Call& call) {
  convert(device, call, "grad_output", "grad_displacement");
}

}  // namespace regkernels

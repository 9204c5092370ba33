#pragma once

#include <array>

#include "core/check.h"

namespace regkernels {

struct DisplacementConversion {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  bool source_last;  // components last, or first
  bool target_last;
  std::array<double, 3> factor;  // for each component, x, y, z
};

// Of the op itself, and with `gradient` of its adjoint: the same factors the other way round in
// layout.
DisplacementConversion displacement_conversion(const Call& call, const char* input, bool gradient);

// The shape of the output of either.
Shape converted_shape(const Call& call, const char* input,
                      const DisplacementConversion& conversion);

}  // namespace regkernels

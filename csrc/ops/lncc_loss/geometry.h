#pragma once

#include "core/large_gpu.h"
#include "ops/lncc_loss/maths.h"
#include "ops/losses/compared.h"

namespace regkernels {

// What the inputs and attributes of a call amount to, once checked.
struct LnccGeometry {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  int64_t channels;
  Shape map;  // of the correlations: (G, N, C, [Z,] Y, X)
  Reduction reduction;
  int kernel_size;
  bool fused;  // loss and gradient in one pass on CUDA; else by way of adjoint fields in memory
};

LnccGeometry lncc_geometry(const Call& call);

template <class T>
Window<T> lncc_window(const Call& call, const LnccGeometry& geometry);

inline constexpr int kLnccMaxParts = kLargeGpuMultiprocessors;
inline constexpr int kLnccMaxFused = 9;  // larger windows leave no room for their rings of planes

}  // namespace regkernels

#pragma once

#include "core/check.h"
#include "ops/lncc_loss/maths.h"

namespace reg {

enum class Reduction { kMean, kSum, kNone };

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

// How CUDA cuts a volume: tiles in x and y, each walked through along z in chunks. The number of
// chunks depends on the shape alone, as that of the partial sums does.
struct LnccTiling {
  int tiles_x, tiles_y, chunk, chunks;
  int64_t parts() const { return static_cast<int64_t>(tiles_x) * tiles_y * chunks; }
};

inline constexpr int kLnccTileX = 32;
inline constexpr int kLnccMaxFused = 9;  // larger windows leave no room for their rings of planes

// Rows of a tile: what shared memory has room for.
constexpr int lncc_tile_rows(int kernel_size, int gradients) {
  return kernel_size == 9 && gradients == 2 ? 16 : 32;
}

LnccTiling lncc_tiling(const LnccGeometry& geometry, int gradients);

}  // namespace reg

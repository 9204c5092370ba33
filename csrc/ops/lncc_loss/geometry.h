#pragma once

#include "core/compared.h"
#include "ops/lncc_loss/maths.h"

namespace reg {

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

// How CUDA cuts the work: tiles in x and y, columns of planes along z. The planes of all columns,
// one after the other, are cut into parts of equal length, a block each; a part may be the end of
// one column and the beginning of the next.
struct LnccTiling {
  int tiles_x, tiles_y;
  int64_t columns;  // in a group
  int64_t parts;    // of a group
};

inline constexpr int kLnccTileX = 32;
inline constexpr int kLnccMaxParts = 132;
inline constexpr int kLnccMaxFused = 9;  // larger windows leave no room for their rings of planes

// Rows of a tile: what shared memory has room for.
constexpr int lncc_tile_rows(bool is_double, int kernel_size, int gradients) {
  if (is_double || kernel_size == 9) return 16;
  return kernel_size == 7 && gradients == 2 ? 20 : 32;
}

// `items_together`: one block takes all items of a group, since they share a gradient.
LnccTiling lncc_tiling(const LnccGeometry& geometry, int gradients, bool items_together);

}  // namespace reg

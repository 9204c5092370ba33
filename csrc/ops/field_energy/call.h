#pragma once

#include <array>

#include "core/check.h"
#include "core/large_gpu.h"
#include "ops/losses/compared.h"

namespace regkernels {

enum class EnergyKind { kDiffusion, kBending, kCurvature, kElasticity, kDivergence, kJacobian };

// What a checked call amounts to.
struct FieldEnergyCall {
  DType dtype;
  int dimensions;
  Sizes sizes;     // of what the call is for: a slab's own planes alone
  int64_t planes;  // of the whole volume
  Batch batch;
  EnergyKind kind;
  Reduction reduction;
  std::array<double, 3> spacing;  // mm per voxel in x, y, z order, or 1 where the unit is a voxel
  double mu, lam, weight;
  bool is_gradient = false;  // alone, for a cotangent
  // A slab's gradient has room for the planes beyond its ends as well, which nobody writes to. The
  // slab says so by `answering`, which has no other meaning where nothing is sampled.
  bool gradient_has_halo = false;
  int planes_of_part;
  int64_t parts;  // that the sum over an item is cut into
  Shape output;   // (G), or (G, N) where nothing is reduced

  // What the sum over the voxels of an item is multiplied by.
  double scale() const {
    const bool mean = reduction == Reduction::kMean && batch.items > 0;
    const double voxels = static_cast<double>(sizes.x * sizes.y * planes);
    return weight / (voxels * (mean ? batch.items : 1));
  }
};

// These treat every component by itself, and a row of vectors as a row of numbers.
inline bool by_component(EnergyKind kind) { return kind <= EnergyKind::kCurvature; }

// A slab comes with so many planes beyond each end, as far as the gradient looks.
inline constexpr int kEnergyHalo = 2;

// A block of threads takes a tile of 32 elements of 8 rows, through so many planes at most. It
// looks at two planes more on either side, which is little beside these.
inline constexpr int kEnergyPlanes = 16;
// Of a small volume it takes fewer: one block waits for its planes one after the other, and all of
// them would not keep a GPU busy.
inline constexpr int kFewEnergyPlanes = 4;

inline int64_t energy_parts(const Sizes& sizes, int64_t row_elements, int planes_of_part) {
  const auto pieces = [](int64_t size, int64_t piece) { return (size + piece - 1) / piece; };
  return pieces(row_elements, 32) * pieces(sizes.y, 8) * pieces(sizes.z, planes_of_part);
}

// How many planes a part has, which depends on the volume alone, as the order of sums does.
inline int energy_planes(const Sizes& sizes, int64_t row_elements) {
  const int64_t enough = 8 * kLargeGpuMultiprocessors;
  return energy_parts(sizes, row_elements, kEnergyPlanes) < enough ? kFewEnergyPlanes
                                                                   : kEnergyPlanes;
}

}  // namespace regkernels

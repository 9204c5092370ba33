// How CUDA cuts the work, and what a block keeps in shared memory.
#pragma once

#include <algorithm>

#include "ops/lncc_loss/call.h"

namespace regkernels {

inline constexpr int kLnccTileX = 32;  // width of the widest tile, and of all for small windows
inline constexpr int kLnccStrip = 4;   // sums along a row that one thread computes at a time
inline constexpr int kLnccColumnStrip = 3;  // sums along a column that it computes at a time

// A block's tile, and its arrays in shared memory. Counts are of elements.
struct LnccTile {
  int columns, rows, radius, radius_z, fields;
  bool small;  // the compiler knows the size of the window
  bool fused;  // the adjoint fields stay in the block

  // The correlations are needed this far around the tile.
  REGKERNELS_HD constexpr int halo() const { return fused ? radius : 0; }
  REGKERNELS_HD constexpr int width() const { return columns + 2 * halo(); }
  REGKERNELS_HD constexpr int height() const { return rows + 2 * halo(); }
  REGKERNELS_HD constexpr int in_width() const { return width() + 2 * radius; }
  REGKERNELS_HD constexpr int in_height() const { return height() + 2 * radius; }
  // Planes whose sums along z are taken together, since their windows share most of their values.
  REGKERNELS_HD constexpr int ahead() const { return small && radius_z > 0 ? 2 : 1; }

  REGKERNELS_HD constexpr int in_stride() const { return odd_strips(in_width()); }
  REGKERNELS_HD constexpr int stride() const { return odd_strips(width()); }
  REGKERNELS_HD constexpr int out_stride() const { return odd_strips(columns); }

  REGKERNELS_HD constexpr int by_depth_size() const {
    return kWindowSums * in_height() * in_stride();
  }
  // The last strips of rows and columns may reach beyond an array.
  REGKERNELS_HD constexpr int by_row() const { return ahead() * by_depth_size() + kLnccStrip; }
  REGKERNELS_HD constexpr int adjoint() const {
    return by_row() + (kWindowSums * in_height() + kLnccColumnStrip) * stride();
  }
  REGKERNELS_HD constexpr int adjoint_size() const {
    return fused ? fields * height() * stride() : 0;
  }
  REGKERNELS_HD constexpr int adjoint_by_row() const { return adjoint() + adjoint_size(); }
  REGKERNELS_HD constexpr int ring() const {
    return adjoint_by_row() + (fused ? fields * height() * out_stride() : 0);
  }
  // The plane that completes a window needs no place in the ring.
  REGKERNELS_HD constexpr int ring_planes() const { return 2 * radius_z; }
  REGKERNELS_HD constexpr int size() const {
    return ring() + (fused ? fields * ring_planes() * rows * columns : 0);
  }

 private:
  // A stride of at least `width` and of an odd number of strips: threads that take the strips of
  // neighbouring rows then read from different banks of shared memory.
  REGKERNELS_HD static constexpr int odd_strips(int width) {
    return ((width + kLnccStrip - 1) / kLnccStrip | 1) * kLnccStrip;
  }
};

// The widest tile whose arrays fit into so many elements, as high as they allow. The largest window
// in double precision has room on any GPU that gives a block 99 KiB, and none gives less since
// 2020.
constexpr LnccTile lncc_tile(int radius, int radius_z, int fields, bool small, bool fused,
                             int64_t elements) {
  LnccTile tile{kLnccTileX, 32, radius, radius_z, fields, small, fused};
  while (tile.size() > elements && tile.rows * tile.columns > 4 * 8) {
    if (tile.rows > 4) {
      tile.rows -= 4;
    } else {
      tile.rows = 32;
      tile.columns /= 2;
    }
  }
  return tile;
}

// Arrays of a fixed size take this much shared memory at most.
inline constexpr int kLnccFixedBytes = 256;
// Kernels of small windows are compiled for GPUs that give a block this much shared memory: those
// of compute capability 9.0 and 10.0; of 8.0; any other.
inline constexpr int64_t kLnccSharedBytes[] = {227 * 1024, 163 * 1024, 99 * 1024};
inline constexpr int kLnccSharedLimits = 3;

// How the work is cut: into tiles in x and y, and columns of planes along z. The planes of all
// columns, one column after the other, are cut into parts of equal length, one for each block; a
// part may be the end of one column and the beginning of the next.
struct LnccTiling {
  int tiles_x, tiles_y;
  int64_t columns;  // in a group
  int64_t parts;    // of a group
};

// With `items_together` one block takes all items of a group, since they share a gradient.
inline LnccTiling lncc_tiling(const LnccCall& checked, const LnccTile& tile, bool items_together) {
  LnccTiling tiling;
  tiling.tiles_x = static_cast<int>((checked.sizes.x + tile.columns - 1) / tile.columns);
  tiling.tiles_y = static_cast<int>((checked.sizes.y + tile.rows - 1) / tile.rows);
  tiling.columns = checked.channels * (items_together ? 1 : checked.batch.items) * tiling.tiles_x *
                   tiling.tiles_y;
  // Each multiprocessor of a large GPU gets one block, as no two fit one. The number depends on the
  // shape alone, so that the order of summation does.
  const int64_t groups = std::max<int64_t>(1, checked.batch.groups);
  const int64_t wanted = (kLnccMaxParts + groups - 1) / groups;
  tiling.parts = std::max<int64_t>(1, std::min(wanted, tiling.columns * checked.sizes.z));
  return tiling;
}

// How the passes of windows that do not fit one kernel are cut.
struct LnccPasses {
  int planes;        // that a thread sums up together
  int64_t depth;     // units of so many planes in the depth of a volume
  int64_t together;  // units whose sums are in memory at a time, of each group
  int64_t parts;     // of the sum over a group
};

inline constexpr int kLnccPassPlanes = 4;
inline constexpr int64_t kLnccPassParts = 4 * kLnccMaxParts;  // four blocks fit a multiprocessor
// The sums of the planes at hand take no more than this, unless a single unit does: enough for
// launches that keep a large GPU busy.
inline constexpr int64_t kLnccPassBytes = int64_t{128} << 20;

inline LnccPasses lncc_passes(const LnccCall& checked) {
  LnccPasses passes;
  const int64_t groups = std::max<int64_t>(1, checked.batch.groups);
  passes.planes = checked.sizes.z == 1 ? 1 : kLnccPassPlanes;
  passes.depth = (checked.sizes.z + passes.planes - 1) / passes.planes;
  const int64_t units = std::max<int64_t>(1, checked.batch.items * checked.channels * passes.depth);
  const int64_t bytes = std::max<int64_t>(
      1, groups * passes.planes * checked.sizes.x * checked.sizes.y * kWindowSums * 8);
  passes.together = std::max<int64_t>(1, std::min(units, kLnccPassBytes / bytes));
  passes.parts = (kLnccPassParts + groups - 1) / groups;
  return passes;
}

}  // namespace regkernels

// How a block on CUDA reads a source (sources.h) over a tile, plane by plane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/large_gpu.h"
#include "ops/mind_ssc/sources.h"

namespace regkernels {

// The planes of results that a walk takes: many, since each walk also sums up the planes that
// patches reach beyond them, unless there is too little else to do. No result depends on it.
inline int planes_per_walk(int depth, int64_t other_walks) {
  constexpr int kFewest = 8, kMost = 32;
  constexpr int64_t kEnough = 8 * kLargeGpuMultiprocessors;
  const int64_t wanted = (kEnough + other_walks - 1) / other_walks;
  const int64_t walks =
      std::clamp<int64_t>(wanted, (depth + kMost - 1) / kMost, (depth + kFewest - 1) / kFewest);
  return static_cast<int>((depth + walks - 1) / walks);
}

// A tile of values in rows, which a block's threads share out.
template <int kRows_, int kColumns_, int kThreads_>
struct WalkTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kThreads = kThreads_;
  static constexpr int kValues = kRows * kColumns;
  static constexpr int kOwn = (kValues + kThreads - 1) / kThreads;  // of a thread
};

// The values of a tile in one plane after the other. Where they are within a plane is the same in
// all planes, and is found out once.
template <class View, class Tile>
struct Walk {
  using S = typename View::S;
  using T = Arithmetic<S>;
  static constexpr int kArrays = 2;
  int thread;
  int size[3];
  int z[kArrays];           // of the plane
  const S* plane[kArrays];  // at the tile's first row; the nearest plane where there is none
  int offset[kArrays][Tile::kOwn];  // from there; negative where there is no voxel
  S loaded[kArrays][Tile::kOwn];

  // The position of the tile's first value is `corner`.
  __device__ __forceinline__ Walk(const View& view, const int (&sizes)[3], const int (&corner)[3],
                                  int thread)
      : thread(thread), size{sizes[0], sizes[1], sizes[2]} {
    REGKERNELS_UNROLL
    for (int a = 0; a < kArrays; ++a) {
      const int x0 = corner[0] + view.displacement(a, 0);
      const int y0 = corner[1] + view.displacement(a, 1);
      z[a] = corner[2] + view.displacement(a, 2);
      const int first_row = nearest_index(y0, size[1]);
      const int64_t rows = static_cast<int64_t>(nearest_index(z[a], size[2])) * size[1] + first_row;
      plane[a] = view.array(a) + rows * size[0];
      REGKERNELS_UNROLL
      for (int own = 0; own < Tile::kOwn; ++own) {
        const int i = thread + own * Tile::kThreads;
        const int x = x0 + i % Tile::kColumns, y = y0 + i / Tile::kColumns;
        const int row = nearest_index(y, size[1]), column = nearest_index(x, size[0]);
        const bool there = View::kContinued || (row == y && column == x);
        // A row is no longer than 2^26 voxels, and a tile has no more than 32 of them.
        static_assert(Tile::kRows <= 32);
        offset[a][own] = there ? (row - first_row) * size[0] + column : -1;
      }
    }
  }

  __device__ __forceinline__ void load() {
    REGKERNELS_UNROLL
    for (int a = 0; a < kArrays; ++a) {
      const bool there = View::kContinued || (z[a] >= 0 && z[a] < size[2]);
      REGKERNELS_UNROLL
      for (int own = 0; own < Tile::kOwn; ++own) {
        if (!has(own)) continue;
        if constexpr (View::kContinued) {
          loaded[a][own] = plane[a][offset[a][own]];
        } else {
          loaded[a][own] = there && offset[a][own] >= 0 ? plane[a][offset[a][own]] : S(0);
        }
      }
    }
  }

  __device__ __forceinline__ void advance() {
    REGKERNELS_UNROLL
    for (int a = 0; a < kArrays; ++a) {
      if (z[a] >= 0 && z[a] < size[2] - 1) plane[a] += static_cast<int64_t>(size[1]) * size[0];
      ++z[a];
    }
  }

  // Calls consume(i, value) with the number of each of the thread's values in the tile.
  template <class Consume>
  __device__ __forceinline__ void for_each_value(const Consume& consume) const {
    REGKERNELS_UNROLL
    for (int own = 0; own < Tile::kOwn; ++own) {
      if (!has(own)) continue;
      consume(thread + own * Tile::kThreads,
              View::combined(to_arithmetic(loaded[0][own]), to_arithmetic(loaded[1][own])));
    }
  }

 private:
  __device__ __forceinline__ bool has(int own) const {
    return (own + 1) * Tile::kThreads <= Tile::kValues ||
           thread + own * Tile::kThreads < Tile::kValues;
  }
};

}  // namespace regkernels

// Tiles of numbers on their way to shared memory, on CUDA.
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "core/for_each.h"

namespace regkernels {

// Fetches the same tile of one plane after another: kRows rows of kCount numbers, a multiple of
// four, which lie one after another in shared memory. A block of kThreads threads does it together.
// What a thread fetches lies at the same place of each plane, and is found once. Of a tile that
// hangs over the edges of its plane, what is not there stays what it is. Numbers arrive by the end
// of a wait for the pipeline.
template <int kRows, int kCount, int kThreads>
class TileFetch {
 public:
  // The tile begins at a row and at a number of it, a multiple of four; both may be less than 0.
  // Planes lie one after another in `data`, of so many rows of so many numbers.
  __device__ __forceinline__ TileFetch(const float* data, int thread, int first_row, int first,
                                       int rows, int row_size)
      : thread_(thread),
        first_row_(first_row),
        first_(first),
        rows_(rows),
        row_size_(row_size),
        by_four_(row_size % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
    if (by_four_) {
      REGKERNELS_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        const int piece = thread + turn * kThreads;
        const int row = piece / (kCount / 4), e = first + 4 * (piece - row * (kCount / 4));
        const int y = first_row + row;
        const bool is_there =
            piece < kRows * kCount / 4 && y >= 0 && y < rows && e >= 0 && e < row_size;
        mine_[turn] =
            is_there ? static_cast<int>((static_cast<int64_t>(y) * row_size + e) / 4) : kNothing;
      }
    } else {
      mine_[0] = 0;
      REGKERNELS_UNROLL
      for (int k = 0; k * kWarp < kCount; ++k) {
        const int column = thread % kWarp + k * kWarp, e = first + column;
        mine_[0] |= static_cast<int>(column < kCount && e >= 0 && e < row_size) << k;
      }
    }
  }

  // Sends the tile of a plane on its way.
  __device__ __forceinline__ void operator()(float* to, const float* plane) const {
    if (by_four_) {
      REGKERNELS_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        if (mine_[turn] == kNothing) continue;
        __pipeline_memcpy_async(to + 4 * (thread_ + turn * kThreads),
                                plane + static_cast<int64_t>(mine_[turn]) * 4, 4 * sizeof(float));
      }
      return;
    }
    // The rows do not all begin at a multiple of four numbers: a warp takes one after another.
    // Unrolled, that would take registers from the kernel.
    const int lane = thread_ % kWarp;
    REGKERNELS_NO_UNROLL
    for (int row = thread_ / kWarp; row < kRows; row += kThreads / kWarp) {
      const int y = first_row_ + row;
      if (y < 0 || y >= rows_) continue;
      const float* const from = plane + (static_cast<int64_t>(y) * row_size_ + first_ + lane);
      REGKERNELS_NO_UNROLL
      for (int k = 0; k * kWarp < kCount; ++k) {
        if (mine_[0] >> k & 1) {
          __pipeline_memcpy_async(to + row * kCount + lane + k * kWarp, from + k * kWarp,
                                  sizeof(float));
        }
      }
    }
  }

 private:
  static_assert(kCount % 4 == 0 && kThreads % kWarp == 0);
  static constexpr int kTurns = (kRows * kCount / 4 + kThreads - 1) / kThreads;
  static constexpr int kNothing = -1;

  int thread_, first_row_, first_, rows_, row_size_;
  bool by_four_;
  // By four: from where in a plane, counted in fours. Otherwise the first has a bit for each number
  // that a lane takes of a row, whether it is there.
  int mine_[kTurns];
};

}  // namespace regkernels

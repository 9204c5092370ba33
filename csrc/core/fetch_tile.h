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
    REGKERNELS_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
      const int piece = thread + turn * kThreads;
      const int row = piece / (kCount / 4), e = first + 4 * (piece - row * (kCount / 4));
      const int y = first_row + row;
      const bool is_there =
          piece < kRows * kCount / 4 && y >= 0 && y < rows && e >= 0 && e < row_size;
      from_[turn] =
          is_there ? static_cast<int>((static_cast<int64_t>(y) * row_size + e) / 4) : kNothing;
    }
  }

  // Sends the tile of a plane on its way.
  __device__ __forceinline__ void operator()(float* to, const float* plane) const {
    if (by_four_) {
      REGKERNELS_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        if (from_[turn] == kNothing) continue;
        __pipeline_memcpy_async(to + 4 * (thread_ + turn * kThreads),
                                plane + static_cast<int64_t>(from_[turn]) * 4, 4 * sizeof(float));
      }
      return;
    }
    // The rows do not all begin at a multiple of four numbers. Unrolled, this would take registers
    // for as many places.
    int row = thread_ / kCount, column = thread_ - row * kCount;
    REGKERNELS_NO_UNROLL
    for (int i = 0; i < kRows * kCount; i += kThreads) {
      const int y = first_row_ + row, e = first_ + column;
      if (row < kRows && y >= 0 && y < rows_ && e >= 0 && e < row_size_) {
        __pipeline_memcpy_async(to + i + thread_, plane + (static_cast<int64_t>(y) * row_size_ + e),
                                sizeof(float));
      }
      row += kThreads / kCount;
      column += kThreads % kCount;
      if (column >= kCount) {
        column -= kCount;
        ++row;
      }
    }
  }

 private:
  static_assert(kCount % 4 == 0);
  static constexpr int kTurns = (kRows * kCount / 4 + kThreads - 1) / kThreads;
  static constexpr int kNothing = -1;

  int thread_, first_row_, first_, rows_, row_size_;
  bool by_four_;
  int from_[kTurns];  // four numbers each, within a plane
};

}  // namespace regkernels

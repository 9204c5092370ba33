// Rows of numbers on their way to shared memory, on CUDA.
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "core/for_each.h"

namespace regkernels {

// Whether rows of so many numbers can be fetched four numbers at a time, from a multiple of four
// on.
inline __device__ bool rows_of_four(const void* data, int64_t row_size) {
  return row_size % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// A warp sends kCount numbers of a row to shared memory, those from `first` on: of them those that
// are in the row, which has `size` numbers; the others stay what they are. Both counts, and
// `first`, are multiples of four. They arrive by the end of a wait for the pipeline.
template <int kCount>
__device__ __forceinline__ void fetch_row(float* to, const float* row, int first, int size,
                                          bool by_four) {
  static_assert(kCount % 4 == 0 && kCount <= 4 * kWarp);
  const int lane = threadIdx.x;
  if (by_four) {
    const int e = first + 4 * lane;
    if (4 * lane < kCount && e >= 0 && e < size) {
      __pipeline_memcpy_async(to + 4 * lane, row + e, 4 * sizeof(float));
    }
    return;
  }
  REGKERNELS_UNROLL
  for (int k = 0; k < kCount; k += kWarp) {
    const int e = first + k + lane;
    if (k + lane < kCount && e >= 0 && e < size) {
      __pipeline_memcpy_async(to + k + lane, row + e, sizeof(float));
    }
  }
}

}  // namespace regkernels

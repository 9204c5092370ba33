// How many multiprocessors work is cut for.
#pragma once

namespace regkernels {

// An H100 has so many. The order in which a sum is taken depends on the parts that the work is cut
// into, so their number follows from this one and never from the GPU that happens to be there:
// every GPU then returns the same bits. A smaller GPU takes the parts one after the other; on a
// larger one a few multiprocessors stay idle.
inline constexpr int kLargeGpuMultiprocessors = 132;

}  // namespace regkernels

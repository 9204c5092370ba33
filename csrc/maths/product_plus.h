#pragma once

#include "core/host_device.h"

namespace regkernels {

// a b + c. CUDA's compiler rounds once or twice as it likes, which need not be the same in two
// kernels that have to give the same bits; here it is once.
template <class T>
REGKERNELS_HD T product_plus(T a, T b, T c) {
#ifdef __CUDA_ARCH__
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace regkernels

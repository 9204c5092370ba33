// What other ops do as gaussian_smooth does.
#pragma once

#include "core/for_each.h"
#include "ops/gaussian_smooth/call.h"

namespace regkernels {

// Smooths an array of float or double, for which a call was checked. On the CPU, `in` and `out` may
// be the same, and there is no need of `scratch`.
template <class T>
void smooth_array(const Cpu& device, const GaussianSmoothCall& call, const T* in, T* out,
                  T* weights, T* scratch);

#ifdef __CUDACC__
template <class T>
void smooth_array(const Cuda& device, const GaussianSmoothCall& call, const T* in, T* out,
                  T* weights, T* scratch);

// Where the first pass of a call that is not fused must not find what it smooths, as it leaves its
// result there: the other one of the output and the scratch memory is free.
inline bool first_pass_writes_output(const GaussianSmoothCall& call) {
  return call.passes.size() % 2 == 1;
}
#endif

}  // namespace regkernels

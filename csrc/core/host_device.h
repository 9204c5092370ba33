// Marks functions that are compiled for the CPU and for CUDA alike.
#pragma once

#ifdef __CUDACC__
#define REGKERNELS_HD __host__ __device__ __forceinline__
#else
#define REGKERNELS_HD inline __attribute__((always_inline))
#endif

// Marks likewise what is rarely called: inlined, it would take registers from the code around it.
#ifdef __CUDACC__
#define REGKERNELS_HD_APART __host__ __device__ __noinline__
#else
#define REGKERNELS_HD_APART __attribute__((noinline))
#endif

// Unrolls the loop that follows, so that arrays indexed by its counter can live in registers.
#if defined(__CUDA_ARCH__)
#define REGKERNELS_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define REGKERNELS_UNROLL  // the host pass of nvcc knows neither spelling
#else
#define REGKERNELS_UNROLL _Pragma("GCC unroll 32")
#endif

// Keeps the compiler from unrolling a loop that mostly runs once.
#if defined(__CUDA_ARCH__)
#define REGKERNELS_NO_UNROLL _Pragma("unroll 1")
#else
#define REGKERNELS_NO_UNROLL
#endif

// Whether all threads of the warp that are here say yes; one thread decides for itself on the CPU.
REGKERNELS_HD bool warp_agrees(bool yes) {
#ifdef __CUDA_ARCH__
  return __all_sync(__activemask(), yes);
#else
  return yes;
#endif
}

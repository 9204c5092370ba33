// The few CUDA runtime calls that ops make, with their errors checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace regkernels {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

inline void check_launch() { check_cuda(cudaGetLastError()); }

// Bytes of shared memory that a block may have on the current device. The environment variable is
// for tests: kernels that choose their tiles by this number then run as on a smaller GPU.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const char* text = std::getenv("REGKERNELS_SHARED_MEMORY");
  return text == nullptr ? bytes : std::min<int64_t>(bytes, std::atoll(text));
}

// Lets a kernel be launched with so many bytes of dynamic shared memory.
template <class Function>
void allow_shared_memory(Function* kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return;  // always allowed
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
}

// The number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Makes the given device current for as long as it lives; -1 leaves the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (device < 0) return;
    check_cuda(cudaGetDevice(&previous_));
    if (previous_ == device) {
      previous_ = -1;
    } else {
      check_cuda(cudaSetDevice(device));
    }
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace regkernels

// Vectors of two or three components, and pointers to the voxels of an array.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"

namespace regkernels {

// A vector of D components in x, y, z order.
template <class T, int D>
struct Vec {
  T v[D];
  REGKERNELS_HD T& operator[](int i) { return v[i]; }
  REGKERNELS_HD const T& operator[](int i) const { return v[i]; }
};

template <class T, int D>
REGKERNELS_HD Vec<T, D> load_vec(const T* p) {
  Vec<T, D> result;
  REGKERNELS_UNROLL
  for (int i = 0; i < D; ++i) result[i] = p[i];
  return result;
}

// The same pointer, but one whose origin the compiler does not see. Otherwise it would carry the
// parts that the pointer was computed from into loops, and add them up for each voxel again.
template <class T>
REGKERNELS_HD T* opaque_pointer(T* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

// The pointer that is `bytes` further on.
template <class T>
REGKERNELS_HD T* advance_bytes(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + bytes);
}

// A pointer to voxel x of a row, in an array of kPixel elements a voxel. Computed in bytes and in
// this order, it takes CUDA one multiply-add for the row and one for x, although it has 64 bits.
// (The bytes of a row fit 32 bits, which check_sizes sees to.)
template <int kPixel, class T>
REGKERNELS_HD T* voxel_pointer(T* base, int row, int row_size, int x) {
  constexpr int kBytes = kPixel * static_cast<int>(sizeof(T));
  T* start = advance_bytes(base, static_cast<int64_t>(row) * (row_size * kBytes));
  return advance_bytes(start, static_cast<int64_t>(x) * kBytes);
}

}  // namespace regkernels

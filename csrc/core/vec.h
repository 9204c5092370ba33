#pragma once

#include "core/host_device.h"

namespace reg {

// D components in x, y, z order.
template <class T, int D>
struct Vec {
  T v[D];
  REG_HD T& operator[](int i) { return v[i]; }
  REG_HD const T& operator[](int i) const { return v[i]; }
};

template <class T, int D>
REG_HD Vec<T, D> load_vec(const T* p) {
  Vec<T, D> result;
  REG_UNROLL
  for (int i = 0; i < D; ++i) result[i] = p[i];
  return result;
}

}  // namespace reg

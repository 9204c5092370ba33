// From run-time dtypes and dimensions to template arguments.
#pragma once

#include <stdexcept>

#include "core/half.h"
#include "core/tensor.h"

namespace reg {

template <class T>
struct TypeTag {
  using type = T;
};

template <int kValue>
struct IntTag {
  static constexpr int value = kValue;
};

// Calls body(TypeTag<T>) with the C++ type of a dtype that there is arithmetic in. A new one is a
// line here.
template <class Body>
void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(TypeTag<float>{});
    case DType::kFloat64:
      return body(TypeTag<double>{});
    default:
      throw std::logic_error("a dtype that the checks let through has no kernel");
  }
}

// The same, and where `kHalf` is set for dtypes that are for storage only. A new one is a line
// here.
template <bool kHalf, class Body>
void dispatch_storage(DType dtype, const Body& body) {
  if constexpr (kHalf) {
    if (dtype == DType::kFloat16) return body(TypeTag<Float16>{});
    if (dtype == DType::kBFloat16) return body(TypeTag<BFloat16>{});
  }
  dispatch_dtype(dtype, body);
}

template <class Body>
void dispatch_dimensions(int dimensions, const Body& body) {
  if (dimensions == 2) return body(IntTag<2>{});
  return body(IntTag<3>{});
}

template <class Body>
void dispatch_bool(bool value, const Body& body) {
  if (value) return body(IntTag<1>{});
  return body(IntTag<0>{});
}

}  // namespace reg

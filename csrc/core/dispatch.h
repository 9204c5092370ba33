// From run-time dtypes and dimensions to template arguments.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/half.h"
#include "core/tensor.h"

namespace regkernels {

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

// Calls body(TypeTag<S>) likewise, and where `kHalf` is set also for dtypes that are for storage
// only. A new one is a line here.
template <bool kHalf, class Body>
void dispatch_storage(DType dtype, const Body& body) {
  if constexpr (kHalf) {
    if (dtype == DType::kFloat16) return body(TypeTag<Float16>{});
    if (dtype == DType::kBFloat16) return body(TypeTag<BFloat16>{});
  }
  dispatch_dtype(dtype, body);
}

// Calls body(TypeTag<T>) with the C++ type of an integer dtype.
template <class Body>
void dispatch_integer(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBool:
      return body(TypeTag<bool>{});
    case DType::kInt8:
      return body(TypeTag<int8_t>{});
    case DType::kUInt8:
      return body(TypeTag<uint8_t>{});
    case DType::kInt16:
      return body(TypeTag<int16_t>{});
    case DType::kUInt16:
      return body(TypeTag<uint16_t>{});
    case DType::kInt32:
      return body(TypeTag<int32_t>{});
    case DType::kUInt32:
      return body(TypeTag<uint32_t>{});
    case DType::kInt64:
      return body(TypeTag<int64_t>{});
    case DType::kUInt64:
      return body(TypeTag<uint64_t>{});
    default:
      throw std::logic_error("a dtype that the checks let through is no integer");
  }
}

// Calls body(TypeTag<T>) with an unsigned type of as many bytes, for kernels to which no more than
// these matters.
template <class Body>
void dispatch_width(size_t bytes, const Body& body) {
  switch (bytes) {
    case 1:
      return body(TypeTag<uint8_t>{});
    case 2:
      return body(TypeTag<uint16_t>{});
    case 4:
      return body(TypeTag<uint32_t>{});
    default:
      return body(TypeTag<uint64_t>{});
  }
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

}  // namespace regkernels

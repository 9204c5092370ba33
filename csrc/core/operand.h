#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/host_device.h"

namespace regkernels {

// The data of a tensor with its steps from batch element to batch element.
template <class T>
struct Operand {
  T* data = nullptr;  // null: absent
  BatchStride stride;

  Operand() = default;
  explicit Operand(const Tensor& tensor) {
    if (!tensor.present) return;
    data = tensor.as<T>();
    stride = batch_stride(tensor);
  }
  REGKERNELS_HD T* at(int64_t group, int64_t item) const {
    return data + group * stride.group + item * stride.item;
  }
};

}  // namespace regkernels

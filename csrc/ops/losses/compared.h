// What the losses have in common: two images and a mask, by group, item and channel.
#pragma once

#include "core/check.h"
#include "core/host_device.h"
#include "core/operand.h"

namespace regkernels {

enum class Reduction { kMean, kSum, kNone };

// Checks `pred`, `target` and the optional `mask` against each other; returns D.
int check_compared(const Call& call);

// An image, or anything else with an axis of channels, by group, item and channel.
template <class T>
struct Channels {
  Operand<T> operand;
  int64_t stride = 0;  // from channel to channel; 0 where there is one for all

  Channels() = default;
  explicit Channels(const Tensor& tensor) : operand(tensor) {
    if (tensor.present && tensor.shape[2] != 1) stride = tensor.shape.count(3);
  }
  REGKERNELS_HD bool present() const { return operand.data != nullptr; }
  REGKERNELS_HD T* at(int64_t group, int64_t item, int64_t channel) const {
    return operand.at(group, item) + channel * stride;
  }
};

}  // namespace regkernels

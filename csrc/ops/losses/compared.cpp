#include "ops/losses/compared.h"

namespace regkernels {

namespace {

void check_same_axes(const Call& call, const char* argument, const Tensor& reference,
                     const char* reference_name, bool one_channel_will_do) {
  const Tensor& tensor = call.input(argument);
  bool same = tensor.shape.rank() == reference.shape.rank();
  for (int axis = 2; same && axis < reference.shape.rank(); ++axis) {
    const bool broadcast = axis == 2 && one_channel_will_do && tensor.shape[axis] == 1;
    same = tensor.shape[axis] == reference.shape[axis] || broadcast;
  }
  if (!same) {
    fail_shape(
        call, argument,
        concat("with the ", one_channel_will_do ? "spatial axes of " : "axes of ", reference_name,
               " after the batch axis", one_channel_will_do ? " and one channel or as many" : ""));
  }
}

}  // namespace

int check_compared(const Call& call) {
  const int dimensions = check_image(call, "pred");
  const Tensor& pred = call.input("pred");
  check_same_axes(call, "target", pred, "pred", false);
  if (call.input("mask").present) check_same_axes(call, "mask", pred, "pred", true);
  return dimensions;
}

}  // namespace regkernels

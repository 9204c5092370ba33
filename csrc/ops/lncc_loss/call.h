#pragma once

#include "core/dispatch.h"
#include "core/large_gpu.h"
#include "ops/lncc_loss/maths.h"
#include "ops/losses/compared.h"

namespace regkernels {

// What a checked call of either op amounts to.
struct LnccCall {
  DType dtype;
  int dimensions;
  Sizes sizes;
  Batch batch;
  int64_t channels;
  Shape map;  // of the correlations: (G, N, C, [Z,] Y, X)
  Reduction reduction;
  int kernel_size;  // the largest along any axis
  int kernel[3];    // along x, y and z
  bool fused;  // loss and gradient in one pass on CUDA; else by way of adjoint fields in memory
};

template <class T>
Window<T> lncc_window(const Call& call, const LnccCall& checked);

inline constexpr int kLnccMaxParts = kLargeGpuMultiprocessors;
inline constexpr int kLnccMaxFused = 9;  // larger windows leave no room for their rings of planes

// The arrays of a call. With one gradient asked for, I is the image that it belongs to.
template <class T>
struct LnccOperands {
  LnccCall checked;
  Window<T> window;
  Channels<const T> image_i, image_j, mask;
  Channels<const T> cotangent;   // of a map of correlations
  const T* given_sum = nullptr;  // (G) of the mask of the whole images; null: that of these counts
  Channels<T> grad_i, grad_j;
  bool sum_i, sum_j;  // the gradient is shared by all items
  Channels<T> map;    // the result, where it is one
  int gradients;

  explicit LnccOperands(const Call& call)
      : checked(call.checked<LnccCall>()),
        window(lncc_window<T>(call, checked)),
        mask(call.input("mask")) {
    const Tensor& pred = call.input("pred");
    const Tensor& target = call.input("target");
    const Tensor& grad_pred = call.output("grad_pred");
    const Tensor& grad_target = call.output("grad_target");
    const Tensor absent;
    const bool swap = !grad_pred.present && grad_target.present;
    image_i = Channels<const T>(swap ? target : pred);
    image_j = Channels<const T>(swap ? pred : target);
    const Tensor& first = swap ? grad_target : grad_pred;
    const Tensor& second = swap ? absent : grad_target;
    grad_i = Channels<T>(first);
    grad_j = Channels<T>(second);
    sum_i = first.present && first.shape[1] != checked.batch.items;
    sum_j = second.present && second.shape[1] != checked.batch.items;
    gradients = first.present + second.present;
  }

  int64_t count() const { return checked.map.count(1); }  // correlations in a group
  bool items_together() const { return sum_i || sum_j; }
};

// Calls run(lncc) with the operands in the call's type.
template <class Run>
void with_lncc_loss(const Call& call, const Run& run) {
  dispatch_dtype(call.checked<LnccCall>().dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    LnccOperands<T> lncc(call);
    if (lncc.checked.reduction == Reduction::kNone) lncc.map = Channels<T>(call.output("output"));
    run(lncc);
  });
}

template <class Run>
void with_lncc_loss_share(const Call& call, const Run& run) {
  dispatch_dtype(call.checked<LnccCall>().dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    LnccOperands<T> lncc(call);
    lncc.given_sum = call.input("mask_sum").as<const T>();
    run(lncc);
  });
}

template <class Run>
void with_lncc_loss_grad(const Call& call, const Run& run) {
  dispatch_dtype(call.checked<LnccCall>().dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    LnccOperands<T> lncc(call);
    lncc.cotangent = Channels<const T>(call.input("grad_output"));
    if (lncc.gradients > 0) run(lncc);
  });
}

}  // namespace regkernels

// What both devices need to know of a call.
#pragma once

#include "core/dispatch.h"
#include "ops/lncc_loss/geometry.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/losses/compared.h"

namespace regkernels {

// A call of either op. With one gradient asked for, I is the image that it belongs to.
template <class T>
struct LnccCall {
  LnccGeometry geometry;
  Window<T> window;
  Channels<const T> image_i, image_j, mask;
  Channels<const T> cotangent;  // of a map of correlations
  Channels<T> grad_i, grad_j;
  bool sum_i, sum_j;  // the gradient is shared by all items
  Channels<T> map;    // the result, where it is one
  int gradients;

  int64_t count() const { return geometry.map.count(1); }  // correlations in a group
  bool items_together() const { return sum_i || sum_j; }
};

template <class T>
LnccCall<T> lncc_call(const Call& call) {
  LnccCall<T> result;
  const Tensor& grad_pred = call.output("grad_pred");
  const Tensor& grad_target = call.output("grad_target");
  result.geometry = lncc_geometry(call);
  result.window = lncc_window<T>(call, result.geometry);
  const bool swap = !grad_pred.present && grad_target.present;
  const Tensor& pred = call.input("pred");
  const Tensor& target = call.input("target");
  const int64_t items = result.geometry.batch.items;
  result.image_i = Channels<const T>(swap ? target : pred);
  result.image_j = Channels<const T>(swap ? pred : target);
  result.mask = Channels<const T>(call.input("mask"));
  const Tensor& first = swap ? grad_target : grad_pred;
  const Tensor absent;
  const Tensor& second = swap ? absent : grad_target;
  result.grad_i = Channels<T>(first);
  result.grad_j = Channels<T>(second);
  result.sum_i = first.present && first.shape[1] != items;
  result.sum_j = second.present && second.shape[1] != items;
  result.gradients = first.present + second.present;
  return result;
}

// Calls run(lncc) with the call's concrete type.
template <class Run>
void with_lncc_loss(const Call& call, const Run& run) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    LnccCall<T> lncc = lncc_call<T>(call);
    if (lncc.geometry.reduction == Reduction::kNone) {
      lncc.map = Channels<T>(call.output("output"));
    }
    run(lncc);
  });
}

template <class Run>
void with_lncc_loss_grad(const Call& call, const Run& run) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    LnccCall<T> lncc = lncc_call<T>(call);
    lncc.cotangent = Channels<const T>(call.input("grad_output"));
    if (lncc.gradients > 0) run(lncc);
  });
}

}  // namespace regkernels

// What both devices share: which types a call is about, and the weights.
#pragma once

#include <cmath>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/host_device.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/gaussian_smooth/geometry.h"

namespace regkernels {

template <class T>
REGKERNELS_HD T gaussian_weight(const SmoothingPass& pass, int64_t distance) {
  const double ratio = static_cast<double>(distance) / pass.sigma;
  return static_cast<T>(exp(-0.5 * ratio * ratio) * pass.normalisation);
}

// Calls body(plan, in, out, weights, scratch) with pointers of the types for this call, unless it
// is about nothing at all.
template <class Body>
void with_smoothing(const Call& call, const char* input_name, const char* output_name,
                    const Body& body) {
  const Tensor& input = call.input(input_name);
  const SmoothingPlan plan = smoothing_plan(call, input_name);
  if (input.shape.count() == 0) return;
  dispatch_storage<true>(plan.storage, [&](auto type) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    body(plan, input.as<const S>(), call.output(output_name).template as<S>(),
         call.output("weights").template as<T>(), call.output("scratch").template as<T>());
  });
}

template <class Body>
void with_gaussian_smooth(const Call& call, const Body& body) {
  with_smoothing(call, "x", "output", body);
}

// The filter is symmetric and zero outside: it is its own adjoint.
template <class Body>
void with_gaussian_smooth_grad(const Call& call, const Body& body) {
  with_smoothing(call, "grad_output", "grad_x", body);
}

}  // namespace regkernels

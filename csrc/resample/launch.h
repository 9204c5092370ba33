// `interpolate` (images, channels first) and `compose` (fields, channels last) are both this:
// samples and all gradients that a call asks for.
#pragma once

#include <type_traits>

#include "core/for_each.h"
#include "core/operand.h"
#include "core/reduce.h"
#include "resample/affine_gradient.h"
#include "resample/call.h"
#include "resample/field_gradient.h"
#include "resample/forward.h"
#include "resample/round_image.h"
#include "resample/scatter_cpu.h"
#include "resample/scatter_cuda.h"
#include "resample/with_resampling.h"

namespace regkernels {

// In cubic.h, which only who samples cubically has to include, and scatter_cubic.h with it.
template <class Plain>
struct CubicResampling;
template <class R>
struct CubicForward;

// Calls body(resampling) with the concrete type for a call that samples linearly, or to the nearest
// voxel, or cubically. One of the two is compiled where this is called.
template <bool kChannelsLast, bool kCubic, class Body>
void with_sampler(const ResampleCall& call, const Body& body) {
  with_resampling<kChannelsLast>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    if constexpr (kCubic) {
      body(CubicResampling<R>{resampling});
    } else {
      body(resampling);
    }
  });
}

// How samples are computed where nothing better is known: see cubic_tiles.h.
template <class Device, class Forward>
void sample_voxels(const Device& device, const VoxelSpace& space, const Forward& body) {
  for_each_voxel(device, space, body);
}

template <bool kChannelsLast, bool kCubic = false, class Device>
void resample_forward(const Device& device, const ResampleCall& call, const Tensor& output) {
  if (output.shape.count() == 0) return;
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_sampler<kChannelsLast, kCubic>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    using Forward = std::conditional_t<kCubic, CubicForward<R>, ResampleForward<R>>;
    sample_voxels(device, space,
                  Forward{resampling, Operand<typename R::S>(output), call.add_field});
  });
}

template <bool kChannelsLast, bool kCubic = false, class Device>
void resample_backward(const Device& device, const ResampleCall& call) {
  if (call.grad_output->shape.count() == 0) {
    for (const Tensor* gradient : {call.grad_input, call.grad_affine, call.grad_field}) {
      if (gradient->present) clear(device, *gradient);
    }
    return;
  }
  const VoxelSpace space = voxel_space(call.groups, call.items, call.out_sizes);
  with_sampler<kChannelsLast, kCubic>(call, [&](const auto& resampling) {
    using R = std::decay_t<decltype(resampling)>;
    using S = typename R::S;
    using T = typename R::T;
    const Operand<const S> grad_output(*call.grad_output);
    if (call.grad_field->present) {
      const bool shared = call.grad_field->shape[1] != call.items;
      VoxelSpace outer = space;
      if (shared) outer.items = 1;
      for_each_voxel(device, outer,
                     FieldGradient<R>{resampling, grad_output, Operand<T>(*call.grad_field),
                                      call.add_field, shared ? space.items : 1});
    }
    if (call.grad_input->present) {
      constexpr bool kRounds = !std::is_same_v<S, T>;
      const Tensor& sums = kRounds ? *call.scatter.sums : *call.grad_input;
      scatter(device, space, resampling, *call.grad_output, sums, call.scatter);
      if constexpr (kRounds) round_image<S>(device, sums, *call.grad_input);
    }
    if constexpr (R::kAffine) {
      if (call.grad_affine->present) {
        const AffineMoments<R> body{resampling, grad_output};
        reduce_voxels(device, space, body, *call.partial_sums, *call.grad_affine);
      }
    } else if (call.grad_affine->present) {
      clear(device, *call.grad_affine);  // the field is the whole warp and the affine is ignored
    }
  });
}

}  // namespace regkernels

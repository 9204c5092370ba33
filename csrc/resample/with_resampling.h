// From a call to the concrete type that samples for it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "core/dispatch.h"
#include "core/half.h"
#include "core/operand.h"
#include "maths/coordinates.h"
#include "maths/sampling.h"
#include "resample/call.h"
#include "resample/layout.h"
#include "resample/resampling.h"

namespace regkernels {

template <class S, class T, int D, bool kAffine, bool kField, bool kSlab = false, class Layout>
Resampling<S, T, D, kAffine, kField, Layout, kSlab> make_resampling(const ResampleCall& call,
                                                                    Layout in_layout,
                                                                    Layout out_layout) {
  Resampling<S, T, D, kAffine, kField, Layout, kSlab> r;
  // Positions are those in the whole volumes.
  int64_t in[3] = {call.in_sizes.x, call.in_sizes.y, call.in_sizes.z};
  int64_t out[3] = {call.out_sizes.x, call.out_sizes.y, call.out_sizes.z};
  if constexpr (kSlab) {
    r.slab = {call.slab.first, static_cast<int>(in[D - 1]), static_cast<int>(call.slab.answering)};
    in[D - 1] = call.slab.sampled_planes;
    out[D - 1] = call.slab.planes;
  }
  r.map.placement = call.placement;
  r.map.in = make_frame<T, D>(in, call.sampling.align_corners);
  r.map.out = make_frame<T, D>(out, call.sampling.align_corners);
  for (int k = 0; k < D; ++k) {
    r.map.ratio[k] = in[k] == out[k] ? T(1) : r.map.in.half[k] * r.map.out.inverse[k];
    // An absent affine is the identity. In A (x + u) it is the output point that u displaces, which
    // has nowhere to go along an axis without extent; without a matrix only this factor meets u.
    const bool stuck = !kAffine && call.placement == Placement::kAffineLast;
    if (stuck && r.map.out.half[k] == 0) r.map.in.half[k] = 0;
  }
  r.boundary = make_boundary<T, D>(in, call.sampling);
  for (int k = 0; k < D; ++k) {
    r.stride[k] = k == 0 ? 1 : r.stride[k - 1] * in[k - 1];
    r.step[k] = r.stride[k] * Layout::kPixel * static_cast<int64_t>(sizeof(S));
  }
  r.in_layout = in_layout;
  r.out_layout = out_layout;
  r.input = Operand<const S>(*call.input);
  if (kAffine) r.affine = Operand<const T>(*call.affine);
  r.field = Operand<const T>(*call.field);
  r.field_layout = FieldLayout<T, D>(call.field_format, out, call.out_sizes.voxels(),
                                     call.sampling.align_corners);
  return r;
}

// Calls body(resampling) with the concrete type for this call, whose array is stored as S and whose
// arithmetic is in T.
template <bool kChannelsLast, class S, class T, class Body>
void with_stored(const ResampleCall& call, const Body& body) {
  dispatch_dimensions(call.dimensions, [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    const bool affine = call.affine->present && call.placement != Placement::kFull;
    const auto with_slab = [&](auto is_slab) {
      constexpr bool kSlab = decltype(is_slab)::value;
      dispatch_bool(affine, [&](auto has_affine) {
        constexpr bool kAffine = decltype(has_affine)::value;
        const auto resample = [&](auto has_field, auto in, auto out) {
          constexpr bool kField = decltype(has_field)::value;
          body(make_resampling<S, T, D, kAffine, kField, kSlab>(call, in, out));
        };
        if constexpr (kChannelsLast) {
          resample(std::true_type{}, ChannelsLast<D>{}, ChannelsLast<D>{});
        } else {
          const int channels = static_cast<int>(call.input->shape[2]);
          const ChannelsFirst in{channels, call.in_sizes.voxels()};
          const ChannelsFirst out{channels, call.out_sizes.voxels()};
          if constexpr (kAffine) {
            if (!call.field->present) return resample(std::false_type{}, in, out);
          }
          resample(std::true_type{}, in, out);
        }
      });
    };
    if constexpr (D == 3) {
      if (call.slab.present()) return with_slab(std::true_type{});
    } else if (call.slab.present()) {
      throw std::logic_error("slabs have three dimensions");
    }
    with_slab(std::false_type{});
  });
}

// Calls body(resampling) likewise, with S and T from the dtype of the input, which is one of
// floating-point numbers.
template <bool kChannelsLast, class Body>
void with_resampling(const ResampleCall& call, const Body& body) {
  // Fields are never stored in half precision.
  dispatch_storage<!kChannelsLast>(call.input->dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    with_stored<kChannelsLast, S, Arithmetic<S>>(call, body);
  });
}

}  // namespace regkernels

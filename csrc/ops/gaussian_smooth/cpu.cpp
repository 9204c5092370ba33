#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "ops/gaussian_smooth/call.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/gaussian_smooth/smooth.h"

namespace regkernels {

namespace {

// out[e] = Σ_d weights[|d|] in[e + d * stride], where that is inside.
template <class T>
void smooth_lines(const T* weights, int64_t radius, int64_t stride, int64_t count,
                  const T* __restrict__ in, T* __restrict__ out) {
  // The taps are added one after the other over a run of elements that is short enough to stay in
  // the first-level cache, so that the inner loop is contiguous whichever axis is being smoothed.
  constexpr int64_t kRun = 1024;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(first + kRun, count);
    for (int64_t e = first; e < last; ++e) out[e] = weights[0] * in[e];
    for (int64_t d = 1; d <= radius; ++d) {
      const int64_t reach = d * stride;
      const T weight = weights[d];
      for (int64_t e = std::max(first, reach); e < last; ++e) out[e] += weight * in[e - reach];
      for (int64_t e = first; e < std::min(last, count - reach); ++e) {
        out[e] += weight * in[e + reach];
      }
    }
  }
}

// Smooths along one axis. `in` and `out` may be the same: whole lines along the axis are taken out,
// some side by side, and put back smooth.
template <class T, class In, class Out>
void smooth_axis(const SmoothingPass& pass, const T* weights, const In* in, Out* out) {
  constexpr int64_t kBuffer = 16384;  // elements, for the second-level cache
  const int64_t lines = std::clamp<int64_t>(kBuffer / pass.size, 1, pass.stride);
  const int64_t pieces = (pass.stride + lines - 1) / lines;
  const int64_t grain = std::max<int64_t>(1, 4096 / (lines * pass.size));
  parallel_for(pass.outer * pieces, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* const before = scratch.take<T>(lines * pass.size);
    T* const after = scratch.take<T>(lines * pass.size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * lines;
      const int64_t width = std::min(lines, pass.stride - first);
      const int64_t start = i / pieces * pass.size * pass.stride + first;
      // All lines of a slab lie in memory as they do in the buffer.
      const bool whole = width == pass.stride;
      const int64_t runs = whole ? 1 : pass.size, length = whole ? pass.size * width : width;
      for (int64_t k = 0; k < runs; ++k) {
        const In* from = in + start + k * pass.stride;
        for (int64_t e = 0; e < length; ++e) before[k * length + e] = to_arithmetic(from[e]);
      }
      smooth_lines(weights, pass.radius, width, width * pass.size, before, after);
      for (int64_t k = 0; k < runs; ++k) {
        Out* to = out + start + k * pass.stride;
        for (int64_t e = 0; e < length; ++e) to[e] = to_storage<Out>(after[k * length + e]);
      }
    }
  });
}

// Makes one pass after the other, each in the place of the one before: in the output, or in the
// scratch memory where the output's dtype would round what is still to be added up.
template <class S, class T>
void smooth(const GaussianSmoothCall& call, const S* in, S* out, T* weights, T* scratch) {
  if (call.passes.empty()) {
    std::memcpy(out, in, call.volumes * call.sizes.voxels() * call.channels * sizeof(S));
  }
  T* between = scratch;
  if constexpr (std::is_same_v<S, T>) between = out;
  for (const SmoothingPass& pass : call.passes) {
    T* pass_weights = weights + pass.first_weight;
    for (int64_t d = 0; d <= pass.radius; ++d) pass_weights[d] = gaussian_weight<T>(pass, d);
    const auto smooth_from = [&](const auto* from) {
      if (&pass == &call.passes.back()) return smooth_axis(pass, pass_weights, from, out);
      smooth_axis(pass, pass_weights, from, between);
    };
    if (&pass == &call.passes.front()) {
      smooth_from(in);
    } else {
      smooth_from(between);
    }
  }
}

}  // namespace

template <class T>
void smooth_array(const Cpu&, const GaussianSmoothCall& call, const T* in, T* out, T* weights,
                  T* scratch) {
  smooth(call, in, out, weights, scratch);
}
template void smooth_array(const Cpu&, const GaussianSmoothCall&, const float*, float*, float*,
                           float*);
template void smooth_array(const Cpu&, const GaussianSmoothCall&, const double*, double*, double*,
                           double*);

void gaussian_smooth_cpu(const Context&, const Call& call) {
  with_gaussian_smooth(call, [](const auto&... arguments) { smooth(arguments...); });
}
void gaussian_smooth_grad_cpu(const Context&, const Call& call) {
  with_gaussian_smooth_grad(call, [](const auto&... arguments) { smooth(arguments...); });
}

}  // namespace regkernels

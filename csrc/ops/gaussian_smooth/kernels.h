#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "core/host_device.h"
#include "core/reduce.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/gaussian_smooth/geometry.h"

namespace reg {

template <class T>
REG_HD T gaussian_weight(const SmoothingPass& pass, int64_t distance) {
  const double ratio = static_cast<double>(distance) / pass.sigma;
  return static_cast<T>(exp(-0.5 * ratio * ratio) * pass.normalisation);
}

// Both devices look at a slab as one row of size * stride elements: the neighbour at distance d of
// element e is element e + d * stride, and it lies inside exactly when that is inside the row.

template <class T>
void fill_weights(const Cpu&, const SmoothingPass& pass, T* weights) {
  for (int64_t d = 0; d <= pass.radius; ++d) weights[d] = gaussian_weight<T>(pass, d);
}

template <class T, class In, class Out>
void smooth_axis(const Cpu&, const SmoothingPass& pass, const T* weights, const In* in, Out* out) {
  // Tap by tap over a run of elements short enough to stay in the first-level cache, so that the
  // inner loop is contiguous whichever axis is being smoothed.
  constexpr int64_t kRun = 1024;
  const int64_t row = pass.size * pass.stride;
  const int64_t runs = (row + kRun - 1) / kRun;
  parallel_for(pass.outer * runs, 4, [&](int64_t begin, int64_t end) {
    T buffer[kRun];
    for (int64_t i = begin; i < end; ++i) {
      const In* source = in + i / runs * row;
      Out* target = out + i / runs * row;
      const int64_t first = i % runs * kRun;
      const int64_t last = std::min(first + kRun, row);
      T* sums = buffer;
      if constexpr (std::is_same_v<T, Out>) sums = target + first;
      for (int64_t e = first; e < last; ++e) {
        sums[e - first] = weights[0] * to_arithmetic(source[e]);
      }
      for (int64_t d = 1; d <= pass.radius; ++d) {
        const int64_t reach = d * pass.stride;
        const T weight = weights[d];
        for (int64_t e = std::max(first, reach); e < last; ++e) {
          sums[e - first] += weight * to_arithmetic(source[e - reach]);
        }
        for (int64_t e = first; e < std::min(last, row - reach); ++e) {
          sums[e - first] += weight * to_arithmetic(source[e + reach]);
        }
      }
      if constexpr (!std::is_same_v<T, Out>) {
        for (int64_t e = first; e < last; ++e) target[e] = to_storage<Out>(sums[e - first]);
      }
    }
  });
}

template <class T>
void copy(const Cpu&, const T* in, T* out, int64_t count) {
  if (count > 0) std::memcpy(out, in, count * sizeof(T));
}

#ifdef __CUDACC__

template <class T>
__global__ void fill_weights_kernel(const __grid_constant__ SmoothingPass pass, T* weights) {
  for (int64_t d = threadIdx.x; d <= pass.radius; d += blockDim.x) {
    weights[d] = gaussian_weight<T>(pass, d);
  }
}

template <class T>
void fill_weights(const Cuda& device, const SmoothingPass& pass, T* weights) {
  fill_weights_kernel<<<1, 256, 0, device.stream>>>(pass, weights);
  check_launch();
}

template <class T, class In, class Out>
__global__ void __launch_bounds__(256)
    smooth_axis_kernel(const __grid_constant__ SmoothingPass pass, const T* __restrict__ weights,
                       const In* __restrict__ in, Out* __restrict__ out) {
  const int64_t row = pass.size * pass.stride;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= row) return;
  const int radius = static_cast<int>(pass.radius);
  const bool inside = e >= radius * pass.stride && e + radius * pass.stride < row;
  for (int64_t slab = blockIdx.y; slab < pass.outer; slab += gridDim.y) {
    const In* low = in + slab * row + e;
    const In* high = low;
    T sum = weights[0] * to_arithmetic(*low);
    if (inside) {
#pragma unroll 4
      for (int d = 1; d <= radius; ++d) {
        low -= pass.stride;
        high += pass.stride;
        sum += weights[d] * (to_arithmetic(*low) + to_arithmetic(*high));
      }
    } else {
      int64_t reach = 0;
      for (int d = 1; d <= radius; ++d) {
        low -= pass.stride;
        high += pass.stride;
        reach += pass.stride;
        T pair = 0;
        if (e >= reach) pair = to_arithmetic(*low);
        if (e + reach < row) pair += to_arithmetic(*high);
        sum += weights[d] * pair;
      }
    }
    out[slab * row + e] = to_storage<Out>(sum);
  }
}

template <class T, class In, class Out>
void smooth_axis(const Cuda& device, const SmoothingPass& pass, const T* weights, const In* in,
                 Out* out) {
  if (pass.outer == 0) return;
  const dim3 grid(static_cast<unsigned>((pass.size * pass.stride + 255) / 256),
                  static_cast<unsigned>(std::min<int64_t>(pass.outer, 65535)));
  smooth_axis_kernel<<<grid, 256, 0, device.stream>>>(pass, weights, in, out);
  check_launch();
}

template <class T>
void copy(const Cuda& device, const T* in, T* out, int64_t count) {
  if (count == 0) return;
  check_cuda(cudaMemcpyAsync(out, in, count * sizeof(T), cudaMemcpyDeviceToDevice, device.stream));
}

#endif

template <class Device>
void smooth(const Device& device, const Call& call, const char* input_name,
            const char* output_name) {
  const Tensor& input = call.input(input_name);
  const Tensor& output = call.output(output_name);
  const SmoothingPlan plan = smoothing_plan(call, input_name);
  dispatch_storage<true>(plan.storage, [&](auto type) {
    using S = typename decltype(type)::type;
    using T = Arithmetic<S>;
    const S* source = input.as<S>();
    S* target = output.as<S>();
    const int64_t count = input.shape.count();
    const size_t last = plan.passes.size() - 1;
    if (plan.passes.empty()) return copy(device, source, target, count);
    T* weights = call.output("weights").template as<T>();
    T* scratch = call.output("scratch").template as<T>();
    // Where pass i puts what is not yet the result: back and forth, so that the last pass ends in
    // the output.
    const auto between = [&](size_t i) {
      if constexpr (std::is_same_v<S, T>) {
        return (last - i) % 2 == 0 ? target : scratch;
      } else {
        return scratch + i % 2 * count;
      }
    };
    for (size_t i = 0; i <= last; ++i) {
      const SmoothingPass& pass = plan.passes[i];
      T* pass_weights = weights + pass.first_weight;
      fill_weights(device, pass, pass_weights);
      const auto smooth_from = [&](const auto* from) {
        if (i == last) return smooth_axis(device, pass, pass_weights, from, target);
        smooth_axis(device, pass, pass_weights, from, between(i));
      };
      if (i == 0) {
        smooth_from(source);
      } else {
        smooth_from(between(i - 1));
      }
    }
  });
}

template <class Device>
void gaussian_smooth(const Device& device, const Call& call) {
  smooth(device, call, "x", "output");
}

// The filter is symmetric and zero outside: it is its own adjoint.
template <class Device>
void gaussian_smooth_grad(const Device& device, const Call& call) {
  smooth(device, call, "grad_output", "grad_x");
}

}  // namespace reg

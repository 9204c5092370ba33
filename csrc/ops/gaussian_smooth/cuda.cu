// Gaussians that are too wide for the fused kernel, and voxels of many channels, take one pass
// through memory for each axis.
#include <algorithm>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "ops/gaussian_smooth/call.h"
#include "ops/gaussian_smooth/fused.h"
#include "ops/gaussian_smooth/gaussian_smooth.h"
#include "ops/gaussian_smooth/smooth.h"

namespace regkernels {

namespace {

template <class S>
void smooth_fused(const Cuda& device, const GaussianSmoothCall& call, const S* in, S* out) {
  auto smoothing = make_smoothing<Arithmetic<S>>(call);
  const int64_t plane_size = static_cast<int64_t>(smoothing.rows) * smoothing.columns;
  const int64_t volume_size = smoothing.depth * plane_size;
  const PackedSource<S> source{in, smoothing.columns, plane_size, volume_size};
  const ArraySink<S> sink{out, volume_size};
  const int64_t limit = shared_memory_limit();
  if constexpr (std::is_same_v<S, float>) {
    const auto launch_radius = [&](auto radius) {
      constexpr int kRadius = decltype(radius)::value;
      return launch_exact<kRadius, 1, ExactShape>(device, source, sink, smoothing, call.volumes,
                                                  limit) ||
             launch_exact<kRadius, 3, ExactShape>(device, source, sink, smoothing, call.volumes,
                                                  limit);
    };
    if (launch_radius(IntTag<2>{}) || launch_radius(IntTag<3>{}) || launch_radius(IntTag<4>{}) ||
        launch_radius(IntTag<5>{}) || launch_radius(IntTag<6>{}) || launch_radius(IntTag<8>{})) {
      return;
    }
  }
  launch_general(device, source, sink, smoothing, call.volumes, limit);
}

template <class T>
__global__ void fill_weights_kernel(const __grid_constant__ SmoothingPass pass, T* weights) {
  for (int64_t d = threadIdx.x; d <= pass.radius; d += blockDim.x) {
    weights[d] = gaussian_weight<T>(pass, d);
  }
}

// A slab is taken for one row of size * stride elements: the neighbour at distance d of element e
// is element e + d * stride, and it lies inside exactly when that is inside the row.
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
        sum += weights[d] * to_arithmetic(*low);
        sum += weights[d] * to_arithmetic(*high);
      }
    } else {
      int64_t reach = 0;
      for (int d = 1; d <= radius; ++d) {
        low -= pass.stride;
        high += pass.stride;
        reach += pass.stride;
        if (e >= reach) sum += weights[d] * to_arithmetic(*low);
        if (e + reach < row) sum += weights[d] * to_arithmetic(*high);
      }
    }
    out[slab * row + e] = to_storage<Out>(sum);
  }
}

template <class T, class In, class Out>
void smooth_axis(const Cuda& device, const SmoothingPass& pass, T* weights, const In* in,
                 Out* out) {
  fill_weights_kernel<<<1, 256, 0, device.stream>>>(pass, weights);
  check_launch();
  const dim3 grid(static_cast<unsigned>((pass.size * pass.stride + 255) / 256),
                  static_cast<unsigned>(std::min<int64_t>(pass.outer, 65535)));
  smooth_axis_kernel<T><<<grid, 256, 0, device.stream>>>(pass, weights, in, out);
  check_launch();
}

template <class S, class T>
void smooth(const Cuda& device, const GaussianSmoothCall& call, const S* in, S* out, T* weights,
            T* scratch) {
  const int64_t count = call.volumes * call.sizes.voxels() * call.channels;
  if (call.passes.empty()) {
    return check_cuda(
        cudaMemcpyAsync(out, in, count * sizeof(S), cudaMemcpyDeviceToDevice, device.stream));
  }
  if (call.fused) return smooth_fused(device, call, in, out);
  const size_t last = call.passes.size() - 1;
  // Where pass i puts what is not yet the result: back and forth, so that the last pass ends in the
  // output.
  const auto between = [&](size_t i) {
    if constexpr (std::is_same_v<S, T>) {
      return (last - i) % 2 == 0 ? out : scratch;
    } else {
      return scratch + i % 2 * count;
    }
  };
  for (size_t i = 0; i <= last; ++i) {
    const SmoothingPass& pass = call.passes[i];
    T* pass_weights = weights + pass.first_weight;
    const auto smooth_from = [&](const auto* from) {
      if (i == last) return smooth_axis(device, pass, pass_weights, from, out);
      smooth_axis(device, pass, pass_weights, from, between(i));
    };
    if (i == 0) {
      smooth_from(in);
    } else {
      smooth_from(between(i - 1));
    }
  }
}

}  // namespace

template <class T>
void smooth_array(const Cuda& device, const GaussianSmoothCall& call, const T* in, T* out,
                  T* weights, T* scratch) {
  smooth(device, call, in, out, weights, scratch);
}
template void smooth_array(const Cuda&, const GaussianSmoothCall&, const float*, float*, float*,
                           float*);
template void smooth_array(const Cuda&, const GaussianSmoothCall&, const double*, double*, double*,
                           double*);

void gaussian_smooth_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  with_gaussian_smooth(call, [&](const auto&... arguments) { smooth(device, arguments...); });
}
void gaussian_smooth_grad_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  with_gaussian_smooth_grad(call, [&](const auto&... arguments) { smooth(device, arguments...); });
}

}  // namespace regkernels

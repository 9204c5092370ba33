#include <algorithm>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/gaussian_smooth/smooth.h"
#include "ops/riemannian_adam_step/moments_cuda.h"
#include "ops/riemannian_adam_step/riemannian_adam_step.h"

namespace regkernels {

namespace {

// In both passes a warp takes 32 voxels as a row of numbers: lane l has those at l, l + 32 and so
// on, so that loads and stores are of whole cache lines.
template <int D>
__device__ __forceinline__ int component_of(int k) {
  return (k * kWarp + static_cast<int>(threadIdx.x)) % D;
}

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, 4)
    adam_moments_kernel(const __grid_constant__ Moments<T, M, D> moments) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kUnroll = 2;
  __shared__ T squares[kRowsPerBlock][kUnroll][kWarp * D];
  __shared__ Bits by_warp[kRowsPerBlock];
  const int lane = threadIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const int64_t size = moments.voxels * D;
  const int64_t before = moments.first_number();
  const int64_t first_counted = moments.first_counted() * moments.plane_voxels;
  const int64_t counted = moments.end_of_counted() * moments.plane_voxels;
  for (int64_t b = blockIdx.y; b < moments.batch; b += gridDim.y) {
    const int64_t group = b / moments.items, item = b - group * moments.items;
    const AdamRule<T> rule = moments.rules.of(group, item);
    const T* const gradient = moments.gradient.at(group, item);
    const M *const mu = moments.mu.at(group, item), *const nu = moments.nu.at(group, item);
    M* const next_mu = moments.next_mu.at(group, item);
    M* const next_nu = moments.next_nu.at(group, item);
    T epsilon[D];
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      epsilon[k] = moments.rules.epsilon.at(group, item)[component_of<D>(k)];
    }
    Bits greatest = 0;
    const int64_t tiles = (moments.voxels + kWarp * kUnroll - 1) / (kWarp * kUnroll);
    for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
         tile < tiles; tile += warps) {
      const int64_t first = tile * (kWarp * kUnroll);  // voxel
      const int64_t start = first * D + lane;
      T g[kUnroll][D], m[kUnroll][D], n[kUnroll][D];
      REGKERNELS_UNROLL
      for (int part = 0; part < kUnroll; ++part) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          const int64_t e = start + (part * D + k) * kWarp;
          const bool inside = e < size;
          g[part][k] = inside ? gradient[e] : T(0);
          m[part][k] = inside ? to_arithmetic(mu[e]) : T(0);
          n[part][k] = inside ? to_arithmetic(nu[e]) : T(0);
        }
      }
      __syncwarp();  // the squares of the tile before have been read
      REGKERNELS_UNROLL
      for (int part = 0; part < kUnroll; ++part) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          const int64_t e = start + (part * D + k) * kWarp;
          const MomentsOfNumber<T, M> found(rule, g[part][k], m[part][k], n[part][k], epsilon[k],
                                            before + e);
          if (e < size) {
            next_mu[e] = found.mu;
            next_nu[e] = found.nu;
          }
          squares[threadIdx.y][part][k * kWarp + lane] = found.direction * found.direction;
        }
      }
      __syncwarp();
      REGKERNELS_UNROLL
      for (int part = 0; part < kUnroll; ++part) {
        T sum = squares[threadIdx.y][part][lane * D];
        REGKERNELS_UNROLL
        for (int k = 1; k < D; ++k) sum += squares[threadIdx.y][part][lane * D + k];
        const int64_t voxel = first + part * kWarp + lane;
        if (voxel >= first_counted && voxel < counted) {
          greatest = max(greatest, magnitude_bits(sum));
        }
      }
    }
    greatest = greatest_of_warp(greatest);
    __syncthreads();
    if (lane == 0) by_warp[threadIdx.y] = greatest;
    __syncthreads();
    if (lane == 0 && threadIdx.y == 0) {
      for (const Bits other : by_warp) greatest = max(greatest, other);
      lengthen(moments.longest + b, greatest);
    }
  }
}

// Smooths the gradient of each item where no kernel does so on the way. Returns where it is.
template <class T, int D>
Tensor smoothed_gradient(const Cuda& device, const Call& call, const AdamCall& checked) {
  const Operand<const T> gradient(call.input("gradient"));
  T* const output = call.output("output").as<T>();
  T* const scratch = call.output("scratch").as<T>();
  T* const rough = first_pass_writes_output(checked.smoothing) ? scratch : output;
  const int64_t size = checked.sizes.voxels() * D;
  for (int64_t b = 0; b < checked.batch.groups * checked.batch.items; ++b) {
    const int64_t group = b / checked.batch.items;
    check_cuda(cudaMemcpyAsync(rough + b * size,
                               gradient.at(group, b - group * checked.batch.items),
                               size * sizeof(T), cudaMemcpyDeviceToDevice, device.stream));
  }
  smooth_array(device, checked.smoothing, static_cast<const T*>(rough), output,
               call.output("weights").as<T>(), scratch);
  return call.output("output");
}

template <class T, class M, int D>
void find_moments(const Cuda& device, const Call& call, const AdamCall& checked,
                  const Tensor& longest) {
  clear(device, longest);
  const int64_t batch = checked.batch.groups * checked.batch.items;
  if (batch == 0) return;
  const bool smooth = !checked.smoothing.passes.empty();
  if (smooth && checked.smoothing.fused) {
    const Moments<T, M, D> moments(call, checked, call.input("gradient"), longest);
    return find_smooth_moments(device, moments, checked.smoothing);
  }
  const Moments<T, M, D> moments(
      call, checked,
      smooth ? smoothed_gradient<T, D>(device, call, checked) : call.input("gradient"), longest);
  const int64_t most = multiprocessors() * int64_t{8};
  const int64_t needed = (moments.voxels + 511) / 512;
  const dim3 grid(static_cast<unsigned>(std::min(needed, most)),
                  static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
  adam_moments_kernel<<<grid, dim3(kWarp, kRowsPerBlock), 0, device.stream>>>(moments);
  check_launch();
}

template <class T, class M, int D>
struct Step {
  AdamRules<T> rules;
  StepScale<T, D> scale;
  Operand<const M> mu, nu;
  Operand<const T> longest;
  Operand<T> output;
  int64_t items, batch;
  int64_t voxels;  // of an item
  int size[3];     // x, y, z; in 2-D there is one plane
  int64_t planes;  // of the whole volume
  bool confined;
  FirstPlane first_plane;
};

template <class T, class M, int D>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, 4)
    adam_step_kernel(const __grid_constant__ Step<T, M, D> step) {
  constexpr int kUnroll = 2;
  const int lane = threadIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const int64_t numbers = step.voxels * D;
  const int first_plane = step.first_plane();
  const int last[3] = {step.size[0] - 1, step.size[1] - 1, static_cast<int>(step.planes) - 1};
  for (int64_t b = blockIdx.y; b < step.batch; b += gridDim.y) {
    const int64_t group = b / step.items, item = b - group * step.items;
    const AdamRule<T> rule = step.rules.of(group, item);
    const M *const mu = step.mu.at(group, item), *const nu = step.nu.at(group, item);
    T* const output = step.output.at(group, item);
    const T length = step.scale.length(*step.longest.at(group, item));
    T epsilon[D], factor[D];  // of the lane's numbers
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      const int component = component_of<D>(k);
      epsilon[k] = step.rules.epsilon.at(group, item)[component];
      factor[k] = length * step.scale.voxel[component];
    }
    const int64_t tiles = (step.voxels + kWarp * kUnroll - 1) / (kWarp * kUnroll);
    for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
         tile < tiles; tile += warps) {
      const int64_t first = tile * (kWarp * kUnroll);  // voxel
      const int64_t start = first * D + lane;
      T m[kUnroll * D], n[kUnroll * D];
      REGKERNELS_UNROLL
      for (int i = 0; i < kUnroll * D; ++i) {
        const int64_t e = start + i * kWarp;
        m[i] = e < numbers ? to_arithmetic(mu[e]) : T(0);
        n[i] = e < numbers ? to_arithmetic(nu[e]) : T(0);
      }
      // Where the tile begins.
      const int64_t row = first / step.size[0];
      const int first_x = static_cast<int>(first - row * step.size[0]);
      const int first_z = static_cast<int>(row / step.size[1]);
      const int first_y = static_cast<int>(row - static_cast<int64_t>(first_z) * step.size[1]);
      REGKERNELS_UNROLL
      for (int i = 0; i < kUnroll * D; ++i) {
        const int k = i % D;
        T value = factor[k] * rule.direction(m[i], n[i], epsilon[k]);
        if (step.confined) {
          int at[3] = {first_x + (i * kWarp + lane) / D, first_y, first_z};
          while (at[0] >= step.size[0]) {
            at[0] -= step.size[0];
            if (++at[1] == step.size[1]) {
              at[1] = 0;
              ++at[2];
            }
          }
          at[2] += first_plane;
          const int component = component_of<D>(k);
          const int here = component == 0 ? at[0] : component == 1 ? at[1] : at[2];
          const int end = component == 0 ? last[0] : component == 1 ? last[1] : last[2];
          if (here == 0 || here == end) value = 0;
        }
        const int64_t e = start + i * kWarp;
        if (e < numbers) output[e] = value;
      }
    }
  }
}

template <class T, class M, int D>
void write_step(const Cuda& device, const Call& call, const AdamCall& checked, const Tensor& mu,
                const Tensor& nu, const Tensor& longest) {
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  if (space.empty()) return;
  const Step<T, M, D> step{AdamRules<T>(call, checked, Tensor()),
                           StepScale<T, D>(checked),
                           Operand<const M>(mu),
                           Operand<const M>(nu),
                           Operand<const T>(longest),
                           Operand<T>(call.output("output")),
                           checked.batch.items,
                           space.batch(),
                           checked.sizes.voxels(),
                           {space.x, space.y, space.z},
                           checked.planes,
                           checked.confined,
                           FirstPlane(call.slab)};
  const int64_t most = multiprocessors() * int64_t{8};
  const int64_t needed = (step.voxels + 511) / 512;
  const dim3 grid(static_cast<unsigned>(std::min(needed, most)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  adam_step_kernel<<<grid, dim3(kWarp, kRowsPerBlock), 0, device.stream>>>(step);
  check_launch();
}

void find_moments(const Cuda& device, const Call& call, const Tensor& longest) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto stored, auto dimensions) {
    find_moments<typename decltype(type)::type, typename decltype(stored)::type,
                 decltype(dimensions)::value>(device, call, checked, longest);
  });
}

void find_step(const Cuda& device, const Call& call, const Tensor& mu, const Tensor& nu,
               const Tensor& longest) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto stored, auto dimensions) {
    write_step<typename decltype(type)::type, typename decltype(stored)::type,
               decltype(dimensions)::value>(device, call, checked, mu, nu, longest);
  });
}

}  // namespace

void riemannian_adam_step_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  find_moments(device, call, call.output("longest"));
  find_step(device, call, call.output("next_mu"), call.output("next_nu"), call.output("longest"));
}
void adam_moments_cuda(const Context& context, const Call& call) {
  find_moments(Cuda(context), call, call.output("output"));
}
void adam_step_of_longest_cuda(const Context& context, const Call& call) {
  find_step(Cuda(context), call, call.input("mu"), call.input("nu"), call.input("longest"));
}

}  // namespace regkernels

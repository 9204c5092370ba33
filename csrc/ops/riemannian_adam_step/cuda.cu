#include <algorithm>

#include "core/for_each.h"
#include "core/reduce.h"
#include "ops/riemannian_adam_step/maths.h"
#include "ops/riemannian_adam_step/riemannian_adam_step.h"

namespace regkernels {

namespace {

// In both passes a warp takes 32 voxels as a row of numbers: lane l has those at l, l + 32 and so
// on, so that loads and stores are of whole cache lines.
template <int D>
__device__ __forceinline__ int component_of(int k) {
  return (k * kWarp + static_cast<int>(threadIdx.x)) % D;
}

template <class T, int D>
struct Moments {
  AdamRules<T> rules;
  Operand<const T> gradient, mu, nu;
  Operand<T> next_mu, next_nu;
  T* longest;
  int64_t items, batch;
  int64_t voxels;  // of an item
  int64_t plane_voxels;
  int64_t planes;  // of the whole volume
  FirstPlane first_plane;
};

// The result is a maximum, so that its bits depend neither on the number of blocks nor on their
// order.
template <class T, int D>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, 4)
    adam_moments_kernel(const __grid_constant__ Moments<T, D> moments) {
  using Bits = typename BitsOf<T>::type;
  constexpr int kUnroll = 2;
  __shared__ T squares[kRowsPerBlock][kUnroll][kWarp * D];
  __shared__ Bits by_warp[kRowsPerBlock];
  const int lane = threadIdx.x;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  const int64_t size = moments.voxels * D;
  const int64_t counted =
      min(moments.voxels, (moments.planes - moments.first_plane()) * moments.plane_voxels);
  for (int64_t b = blockIdx.y; b < moments.batch; b += gridDim.y) {
    const int64_t group = b / moments.items, item = b - group * moments.items;
    const AdamRule<T> rule = moments.rules.of(group, item);
    const T* const gradient = moments.gradient.at(group, item);
    const T *const mu = moments.mu.at(group, item), *const nu = moments.nu.at(group, item);
    T* const next_mu = moments.next_mu.at(group, item);
    T* const next_nu = moments.next_nu.at(group, item);
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
          m[part][k] = inside ? mu[e] : T(0);
          n[part][k] = inside ? nu[e] : T(0);
        }
      }
      __syncwarp();  // the squares of the tile before have been read
      REGKERNELS_UNROLL
      for (int part = 0; part < kUnroll; ++part) {
        REGKERNELS_UNROLL
        for (int k = 0; k < D; ++k) {
          const int64_t e = start + (part * D + k) * kWarp;
          const T first_moment = rule.mean(g[part][k], m[part][k]);
          const T second_moment = rule.mean_square(g[part][k], n[part][k]);
          if (e < size) {
            next_mu[e] = first_moment;
            next_nu[e] = second_moment;
          }
          const T direction = rule.direction(first_moment, second_moment, epsilon[k]);
          squares[threadIdx.y][part][k * kWarp + lane] = direction * direction;
        }
      }
      __syncwarp();
      REGKERNELS_UNROLL
      for (int part = 0; part < kUnroll; ++part) {
        T sum = squares[threadIdx.y][part][lane * D];
        REGKERNELS_UNROLL
        for (int k = 1; k < D; ++k) sum += squares[threadIdx.y][part][lane * D + k];
        if (first + part * kWarp + lane < counted) {
          greatest = max(greatest, magnitude_bits(sum));
        }
      }
    }
    REGKERNELS_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      greatest = max(greatest, __shfl_xor_sync(0xffffffffu, greatest, step));
    }
    __syncthreads();
    if (lane == 0) by_warp[threadIdx.y] = greatest;
    __syncthreads();
    if (lane == 0 && threadIdx.y == 0) {
      for (const Bits other : by_warp) greatest = max(greatest, other);
      const T length = sqrt(value_of_bits<T>(greatest));
      atomicMax(reinterpret_cast<Bits*>(moments.longest) + b, magnitude_bits(length));
    }
  }
}

template <class T, int D>
void find_moments(const Cuda& device, const Call& call, const AdamCall& checked,
                  const Tensor& longest) {
  clear(device, longest);
  const int64_t batch = checked.batch.groups * checked.batch.items;
  if (batch == 0) return;
  Moments<T, D> moments{AdamRules<T>(call, checked, call.input("scale")),
                        Operand<const T>(call.input("gradient")),
                        Operand<const T>(call.input("mu")),
                        Operand<const T>(call.input("nu")),
                        Operand<T>(call.output("next_mu")),
                        Operand<T>(call.output("next_nu")),
                        longest.as<T>(),
                        checked.batch.items,
                        batch,
                        checked.sizes.voxels(),
                        checked.sizes.y * checked.sizes.x,
                        checked.planes,
                        FirstPlane(call.slab)};
  const int64_t most = multiprocessors() * int64_t{8};
  const int64_t needed = (moments.voxels + 511) / 512;
  const dim3 grid(static_cast<unsigned>(std::min(needed, most)),
                  static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
  adam_moments_kernel<<<grid, dim3(kWarp, kRowsPerBlock), 0, device.stream>>>(moments);
  check_launch();
}

template <class Scalar, int D>
struct Step {
  using T = Scalar;
  // A thread takes some voxels along z, as it has to prepare what is the same for all of them.
  static constexpr int kDepth = 8, kUnroll = 4, kMinBlocks = 4;

  AdamRules<T> rules;
  StepScale<T, D> scale;
  Operand<const T> mu, nu, longest;
  Operand<T> output;
  int size[3];     // x, y, z
  int64_t planes;  // of the whole volume
  bool confined;
  FirstPlane first_plane;

  struct Element {
    const Step* self;
    const T* mu;
    const T* nu;
    T* output;
    AdamRule<T> rule;
    T epsilon[D], factor[D];  // of the lane's numbers
    int first_plane;

    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      const int64_t row = voxel.row(self->size);
      const int64_t start = (row + voxel.tile_x) * D + threadIdx.x;
      const int numbers = (voxel.row_size - voxel.tile_x) * D;
      const int z = voxel.z + first_plane;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const int in_tile = k * kWarp + static_cast<int>(threadIdx.x);
        if (in_tile >= numbers) continue;
        T value =
            factor[k] * rule.direction(mu[start + k * kWarp], nu[start + k * kWarp], epsilon[k]);
        if (self->confined) {
          const int component = component_of<D>(k);
          const int x = voxel.tile_x + in_tile / D;
          const int at = component == 0 ? x : component == 1 ? voxel.y : z;
          const int last = component == 0   ? voxel.row_size - 1
                           : component == 1 ? self->size[1] - 1
                                            : static_cast<int>(self->planes) - 1;
          if (at == 0 || at == last) value = 0;
        }
        output[start + k * kWarp] = value;
      }
    }
  };

  __device__ __forceinline__ Element element(int64_t group, int64_t item) const {
    Element result;
    result.self = this;
    result.mu = mu.at(group, item);
    result.nu = nu.at(group, item);
    result.output = output.at(group, item);
    result.rule = rules.of(group, item);
    const T length = scale.length(*longest.at(group, item));
    REGKERNELS_UNROLL
    for (int k = 0; k < D; ++k) {
      const int component = component_of<D>(k);
      result.epsilon[k] = rules.epsilon.at(group, item)[component];
      result.factor[k] = length * scale.voxel[component];
    }
    result.first_plane = first_plane();
    return result;
  }
};

template <class T, int D>
void write_step(const Cuda& device, const Call& call, const AdamCall& checked, const Tensor& mu,
                const Tensor& nu, const Tensor& longest) {
  const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
  for_each_voxel(device, space,
                 Step<T, D>{AdamRules<T>(call, checked, Tensor()),
                            StepScale<T, D>(checked),
                            Operand<const T>(mu),
                            Operand<const T>(nu),
                            Operand<const T>(longest),
                            Operand<T>(call.output("output")),
                            {space.x, space.y, space.z},
                            checked.planes,
                            checked.confined,
                            FirstPlane(call.slab)});
}

void find_moments(const Cuda& device, const Call& call, const Tensor& longest) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto dimensions) {
    find_moments<typename decltype(type)::type, decltype(dimensions)::value>(device, call, checked,
                                                                             longest);
  });
}

void find_step(const Cuda& device, const Call& call, const Tensor& mu, const Tensor& nu,
               const Tensor& longest) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto dimensions) {
    write_step<typename decltype(type)::type, decltype(dimensions)::value>(device, call, checked,
                                                                           mu, nu, longest);
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

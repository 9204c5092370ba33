// The loop over the voxels of a batch, written once for each device.
//
//   for_each_voxel(device, space, body)
//
// calls, for each batch element (group g, item n), `auto element = body.element(g, n)` and then
// `element(voxel)` for each of its voxels. `element` is where per-item values (an affine, base
// pointers) are computed once and kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/check.h"
#include "core/host_device.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#ifdef __CUDACC__
#include "core/cuda_runtime.h"
#endif

namespace regkernels {

struct VoxelSpace {
  int64_t groups;
  int64_t items;
  int z, y, x;

  REGKERNELS_HD int64_t batch() const { return groups * items; }
  REGKERNELS_HD int64_t rows() const { return static_cast<int64_t>(z) * y; }
  // Nothing may be launched over no voxels: CUDA refuses a grid without blocks.
  bool empty() const { return batch() == 0 || rows() == 0 || x == 0; }
};

inline VoxelSpace voxel_space(int64_t groups, int64_t items, const Sizes& sizes) {
  return {groups, items, static_cast<int>(sizes.z), static_cast<int>(sizes.y),
          static_cast<int>(sizes.x)};
}

// One voxel, with what its neighbours in the warp are doing: on CUDA a warp works on 32 voxels of a
// row together, and a lane past the end of the row repeats the last voxel with `active` unset, so
// that it can help to move the row's data.
struct Voxel {
  int z, y, x;
  bool active;
  int tile_x;    // x of the warp's first voxel
  int row_size;  // voxels in the row

  // The offset of the row in a volume of the given sizes (x, y, z), in voxels.
  template <int D>
  REGKERNELS_HD int64_t row(const int (&size)[D]) const {
    return static_cast<int64_t>(z * size[1] + y) * size[0];
  }
};

inline constexpr int kWarp = 32;
inline constexpr int kRowsPerBlock = 8;

struct Cpu {
  explicit Cpu(const Context&) {}
};

// On the CPU an element may also have `row(z, y, size)`, which computes a whole row of voxels and
// is compiled to vector code. It says so by `kComputesRows`. One that sums over voxels gets the
// sums behind these, as it gets them behind a voxel.
template <class Element, class = void>
struct ComputesRows : std::false_type {};
template <class Element>
struct ComputesRows<Element, std::void_t<decltype(Element::kComputesRows)>>
    : std::bool_constant<Element::kComputesRows> {};

// `row` calls this for voxels that it computes one by one. It is a function of its own, so that the
// versions of `row` for different instruction sets share it.
template <class Element, class... Sums>
__attribute__((noinline)) void compute_voxel(const Element& element, const Voxel& voxel,
                                             Sums&... sums) {
  element(voxel, sums...);
}

// Has for_each_row(compute_row) call compute_row(z, y) for rows of an element's voxels. Sums that
// it hands over are handed on.
template <class Element, class ForEachRow>
void compute_rows(const Element& element, int size, const ForEachRow& for_each_row) {
  if constexpr (ComputesRows<Element>::value) {
    with_vector_code([&] {
      for_each_row([&](int z, int y, auto&... sums) { element.row(z, y, size, sums...); });
    });
  } else {
    for_each_row([&](int z, int y, auto&... sums) {
      for (int x = 0; x < size; ++x) element(Voxel{z, y, x, true, x, size}, sums...);
    });
  }
}

template <class Body>
void for_each_voxel(const Cpu&, const VoxelSpace& space, const Body& body) {
  if (space.empty()) return;
  // Pieces of at least some 4,000 voxels are worth a thread's attention.
  const int64_t grain = std::max<int64_t>(1, 4096 / space.x);
  parallel_for(space.batch() * space.rows(), grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin;
    while (row < end) {
      const int64_t b = row / space.rows();
      const int64_t last = std::min(end, (b + 1) * space.rows());
      auto element = body.element(b / space.items, b % space.items);
      compute_rows(element, space.x, [&](const auto& compute_row) {
        for (; row < last; ++row) {
          const int in_batch = static_cast<int>(row - b * space.rows());
          compute_row(in_batch / space.y, in_batch % space.y);
        }
      });
    }
  });
}

#ifdef __CUDACC__

// The thread's number in a block of one dimension. It is read anew each time: what follows from it
// is cheaper to compute in each phase of a long kernel than to keep in registers through all of
// them, as the compiler would.
template <int kThreads>
__device__ __forceinline__ int thread_number() {
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  __builtin_assume(number >= 0 && number < kThreads);
  return number;
}

struct Cuda {
  DeviceGuard guard;
  cudaStream_t stream;
  explicit Cuda(const Context& context)
      : guard(context.device), stream(static_cast<cudaStream_t>(context.stream)) {}
};

// What a body may say about how it likes to run; the defaults suit cheap ones.
//   kDepth: how many voxels along z one thread takes, to spread the cost of `element`
//   kUnroll: how many of them it takes at a time
//   kMinBlocks: for how many blocks per multiprocessor the compiler must leave registers
template <class Body, class = void>
struct Tuning {
  static constexpr int kDepth = 1, kUnroll = 1, kMinBlocks = 4;
};
template <class Body>
struct Tuning<Body, std::void_t<decltype(Body::kDepth)>> {
  static constexpr int kDepth = Body::kDepth, kUnroll = Body::kUnroll,
                       kMinBlocks = Body::kMinBlocks;
};

template <class Body>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, Tuning<Body>::kMinBlocks)
    for_each_voxel_kernel(const __grid_constant__ Body body,
                          const __grid_constant__ VoxelSpace space, int tiles_x) {
  constexpr int kDepth = Tuning<Body>::kDepth;
  const int tile_y = blockIdx.x / tiles_x;
  const int tile_x = (blockIdx.x - tile_y * tiles_x) * kWarp;
  const int y = tile_y * kRowsPerBlock + threadIdx.y;
  if (y >= space.y) return;  // a whole warp at a time
  const int lane_x = tile_x + threadIdx.x;
  const bool active = lane_x < space.x;
  const int x = active ? lane_x : space.x - 1;
  const int64_t batch = space.batch();
  for (int64_t b = blockIdx.z; b < batch; b += gridDim.z) {
    const int64_t group = space.items == 1 ? b : b / space.items;
    const int64_t item = space.items == 1 ? 0 : b - group * space.items;
    auto element = body.element(group, item);
    for (int z0 = blockIdx.y * kDepth; z0 < space.z; z0 += gridDim.y * kDepth) {
      const int last = min(z0 + kDepth, space.z);
#pragma unroll(Tuning<Body>::kUnroll)
      for (int z = z0; z < last; ++z) element(Voxel{z, y, x, active, tile_x, space.x});
    }
  }
}

template <class Body>
void for_each_voxel(const Cuda& device, const VoxelSpace& space, const Body& body) {
  if (space.empty()) return;
  const int64_t tiles_x = (space.x + kWarp - 1) / kWarp;
  const int64_t tiles_y = (space.y + kRowsPerBlock - 1) / kRowsPerBlock;
  constexpr int kDepth = Tuning<Body>::kDepth;
  const int64_t tiles_z = (space.z + kDepth - 1) / kDepth;
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>(std::min<int64_t>(tiles_z, 65535)),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const dim3 block(kWarp, kRowsPerBlock);
  for_each_voxel_kernel<<<grid, block, 0, device.stream>>>(body, space, static_cast<int>(tiles_x));
  check_launch();
}

#endif

}  // namespace regkernels

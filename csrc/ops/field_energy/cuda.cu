#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "core/fetch_tile.h"
#include "core/reduce.h"
#include "ops/field_energy/field_energy.h"
#include "ops/field_energy/kernels.h"
#include "ops/losses/finish.h"

namespace regkernels {

namespace {

// Where a block works: 32 elements of each of 8 rows, a warp to a row, through some planes.
struct Tile {
  int first;     // element of the warp
  int y;         // of the warp's row
  int z, end_z;  // planes, by their numbers in the whole volume
  int first_plane;
  int planes;  // of the whole volume

  static __device__ __forceinline__ Tile of(int64_t part, int planes_of_part,
                                            const VoxelSpace& space) {
    const int tiles_x = (space.x + kWarp - 1) / kWarp;
    const int tiles_y = (space.y + kRowsPerBlock - 1) / kRowsPerBlock;
    const int64_t row_of_tiles = part / tiles_x;
    const int chunk = static_cast<int>(row_of_tiles / tiles_y);
    const int tile_y = static_cast<int>(row_of_tiles - static_cast<int64_t>(chunk) * tiles_y);
    const int z = chunk * planes_of_part;
    return {static_cast<int>(part - row_of_tiles * tiles_x) * kWarp,
            tile_y * kRowsPerBlock + static_cast<int>(threadIdx.y),
            z,
            min(z + planes_of_part, space.z),
            0,
            space.z};
  }
  // The tile where the space is a slab.
  __device__ __forceinline__ Tile in(const OwnPlanes& own) const {
    const int before = own.first();
    return {first, y, z + before, min(end_z + before, own.in_volume), before, own.in_volume};
  }
};

// One component of a field about a voxel, in a walk through the planes: of the planes before and
// after, what has been read already is at hand.
template <class Scalar>
struct PassingComponent {
  using T = Scalar;
  static constexpr int kAxes = 3;
  Component<T, 3, false> around;
  const T* per_step;
  T before, own, after;

  __device__ __forceinline__ bool has(int axis, int first, int last) const {
    return around.has(axis, first, last);
  }
  __device__ __forceinline__ T value() const { return own; }
  __device__ __forceinline__ T value(int axis, int steps) const {
    if (axis == 2) return steps < 0 ? before : after;
    return around.value(axis, steps);
  }
};

template <class Body>
struct WalksThroughPlanes : std::false_type {};
template <class T>
struct WalksThroughPlanes<ComponentEnergy<T, 3, DiffusionEnergy>> : std::true_type {};

// The energy of one number of a row, through the planes of a tile, and the gradient.
template <bool kGradient, class T, int D, class Kind>
__device__ __forceinline__ T sum_of_tile(const ComponentEnergy<T, D, Kind>& body,
                                         const VoxelSpace& space, int64_t group, int64_t item,
                                         const Tile& tile) {
  using Body = ComponentEnergy<T, D, Kind>;
  const int e = tile.first + static_cast<int>(threadIdx.x);
  if (tile.y >= space.y || e >= space.x) return 0;
  const T unit = body.squared_unit[e % D];
  const int64_t plane = D == 3 ? body.stride[D - 1] : 0;
  typename Body::Row row = body.row(group, item, tile.z - tile.first_plane, tile.y);
  const T factor = row.scale * unit;
  T sum = 0;
  const auto next_plane = [&] {
    row.displacement += plane;
    if (kGradient) row.gradient += plane;
  };
  if (unit == 0) {  // a product would let through a displacement that is not finite
    for (int z = tile.z; z < tile.end_z; ++z, next_plane()) {
      if (kGradient) row.gradient[e] = 0;
    }
    return 0;
  }
  if constexpr (WalksThroughPlanes<Body>::value) {
    T before = tile.z > 0 ? row.displacement[e - plane] : T(0);
    T own = row.displacement[e];
#pragma unroll 4
    for (int z = tile.z; z < tile.end_z; ++z, next_plane()) {
      const T after = z + 1 < tile.planes ? row.displacement[e + plane] : T(0);
      T energy = 0, pull = 0;
      Kind::add(PassingComponent<T>{body.template component<false>(row, z, tile.y, e),
                                    body.per_step, before, own, after},
                energy, pull);
      sum += energy;
      if (kGradient) row.gradient[e] = factor * pull;
      before = own;
      own = after;
    }
  } else {
    constexpr int kReach = Kind::kReach;
    const bool row_inside = tile.y >= kReach && tile.y + kReach < space.y && e >= kReach * D &&
                            e + kReach * D < space.x;
#pragma unroll 1
    for (int z = tile.z; z < tile.end_z; ++z, next_plane()) {
      T energy = 0, pull = 0;
      if (row_inside && (D == 2 || (z >= kReach && z + kReach < tile.planes))) {
        Kind::add(body.template component<true>(row, z, tile.y, e), energy, pull);
      } else {
        Kind::add(body.template component<false>(row, z, tile.y, e), energy, pull);
      }
      sum += energy;
      if (kGradient) row.gradient[e] = factor * pull;
    }
  }
  return unit * sum;
}

// Stores the gradient at the ends of a tile's rows. Threads take these voxels together: beside the
// voxels of their rows each would make its warp wait, which has a formula.
template <class Element, int D>
__device__ __forceinline__ void store_row_ends(const Element& element, const VoxelSpace& space,
                                               const Tile& tile, IntTag<D>) {
  static_assert(2 * kRowsPerBlock * kEnergyPlanes == kWarp * kRowsPerBlock,
                "one for each thread, of a part of as many planes as there are at most");
  const int thread = threadIdx.y * kWarp + threadIdx.x;
  const int column = thread / (kRowsPerBlock * kEnergyPlanes);
  const int y = tile.y - static_cast<int>(threadIdx.y) + thread % kRowsPerBlock;
  const int z = tile.z + thread / kRowsPerBlock % kEnergyPlanes;
  if (y >= space.y || z >= tile.end_z) return;
  REGKERNELS_NO_UNROLL
  for (int end = 0; end < 2; ++end) {
    const int x = end == 0 ? column : space.x - 2 + column;
    if (x < tile.first || x >= min(tile.first + kWarp, space.x)) continue;
    const Vec<int, D> i = voxel_index<D>(Voxel{z, y, x, true, tile.first, space.x});
    if (element.at_row_end(i)) element.store_gathered(i);
  }
}

// The energy of the voxels that a thread visits in a tile, and the gradient.
template <bool kGradient, class T, int D, class Kind>
__device__ __forceinline__ T sum_of_tile(const SlopeEnergy<T, D, Kind>& body,
                                         const VoxelSpace& space, int64_t group, int64_t item,
                                         const Tile& tile) {
  constexpr bool kRowEndsLast = kGradient && Kind::kHasPull;
  const int lane_x = tile.first + static_cast<int>(threadIdx.x);
  const bool active = lane_x < space.x;
  const int x = active ? lane_x : space.x - 1;
  auto element = body.element(group, item);
  const int64_t before = D == 3 ? tile.first_plane * body.stride[D - 1] : 0;
  element.displacement -= before;
  element.gradient = kGradient ? element.gradient - before : nullptr;
  T sum = 0;
  const int end_z = tile.y < space.y ? tile.end_z : tile.z;  // for a whole warp at a time
#pragma unroll 1
  for (int z = tile.z; z < end_z; ++z) {
    const T energy = element(Voxel{z, tile.y, x, active, tile.first, space.x}, !kRowEndsLast);
    if (active) sum += energy;
  }
  if constexpr (kRowEndsLast) {
    __syncthreads();
    store_row_ends(element, space, tile, IntTag<D>{});
  }
  return sum;
}

// The elasticity of a tile in 3-D, in single precision. From the first-level cache, each load of a
// row of packed vectors takes three times as long as of a row of numbers; from shared memory it
// takes no longer. Most differences along x and y that a voxel's neighbours along z need are the
// voxel's own, which wait in registers while the tile walks through the planes. What binds then are
// instructions.
using Elasticity = SlopeEnergy<float, 3, ElasticEnergy<float, 3>>;

// A plane of a tile in shared memory: rows of packed vectors. Before the tile's own part of a row
// there are more voxels than anybody looks at, so that it begins at a multiple of four numbers.
struct ElasticPlane {
  static constexpr int kHalo = 2, kBefore = 4;
  static constexpr int kRowSize = ((kBefore + kWarp + kHalo) * 3 + 3) / 4 * 4;
  static constexpr int kRows = kRowsPerBlock + 2 * kHalo;
  static constexpr int kSize = kRows * kRowSize;
  // That of the voxel with the two on either side, one more of those before it, for the ends of
  // rows, and two on their way.
  static constexpr int kCount = 8;
  using Fetch = TileFetch<kRows, kRowSize, kWarp * kRowsPerBlock>;
};

// The planes of a tile that are at hand.
struct ElasticPlanes {
  using Plane = ElasticPlane;
  float (*memory)[Plane::kSize];
  int first_x, first_row;  // of the tile's own part

  __device__ __forceinline__ float* plane(int z) const {
    return memory[static_cast<unsigned>(z) % Plane::kCount];
  }
  __device__ __forceinline__ const float* operator()(const Vec<int, 3>& i) const {
    return plane(i[2]) + (i[1] - first_row + Plane::kHalo) * Plane::kRowSize +
           (i[0] - first_x + Plane::kBefore) * 3;
  }
};

// Differences of a voxel's neighbours along x and y, two voxels apart, of all components.
struct PlaneDifferences {
  float along[2][3];

  // `at` is the voxel in shared memory.
  static __device__ __forceinline__ PlaneDifferences of(const float* at) {
    PlaneDifferences result;
    REGKERNELS_UNROLL
    for (int k = 0; k < 3; ++k) {
      result.along[0][k] = at[k + 3] - at[k - 3];
      result.along[1][k] = at[k + ElasticPlane::kRowSize] - at[k - ElasticPlane::kRowSize];
    }
    return result;
  }
};

template <>
__device__ __forceinline__ float sum_of_tile<true>(const Elasticity& body, const VoxelSpace& space,
                                                   int64_t group, int64_t item, const Tile& tile) {
  using Plane = ElasticPlane;
  __shared__ __align__(16) float memory[Plane::kCount][Plane::kSize];
  const int row_of_tile = static_cast<int>(threadIdx.y), lane = static_cast<int>(threadIdx.x);
  const int lane_x = tile.first + lane;
  const bool active = lane_x < space.x;
  const int x = active ? lane_x : space.x - 1;
  const bool row_there = tile.y < space.y;  // for a whole warp at a time
  auto element = body.element(group, item);
  element.displacement -= tile.first_plane * body.stride[2];
  element.gradient -= tile.first_plane * body.stride[2];
  const auto& size = body.differences.frame.size;
  const auto& half = body.differences.frame.half;
  const ElasticEnergy<float, 3>& kind = body.kind;

  const int first_row = tile.y - row_of_tile;
  const Plane::Fetch fetch_tile(element.displacement, row_of_tile * kWarp + lane,
                                first_row - Plane::kHalo, (tile.first - Plane::kBefore) * 3,
                                size[1], size[0] * 3);
  const ElasticPlanes planes{memory, tile.first, first_row};
  // Of what is not in the volume, or beyond what the tile looks at, nothing is fetched or used.
  const auto fetch = [&](int z) {
    if (z >= 0 && z < size[2] && z < tile.end_z + Plane::kHalo) {
      fetch_tile(planes.plane(z), element.displacement + z * body.stride[2]);
    }
    __pipeline_commit();
  };
  // The voxel in a plane that has been fetched.
  const auto here = [&](int z) {
    return planes.plane(z) + (row_of_tile + Plane::kHalo) * Plane::kRowSize +
           (lane + Plane::kBefore) * 3;
  };
  float sum = 0;
  // Takes the ends of the tile's rows in one plane. One warp takes these voxels together: each of
  // them would make the warp of its row wait, which has a formula.
  const bool has_ends = tile.first < 2 || tile.first + kWarp > space.x - 2;
  const auto take_row_ends = [&](int z) {
    if (!has_ends || row_of_tile != z % kRowsPerBlock) return;
    static_assert(4 * kRowsPerBlock == kWarp, "a lane for each of them");
    const int column = lane % 4;
    const Vec<int, 3> i{column < 2 ? column : space.x - 4 + column, first_row + lane / 4, z};
    if (i[0] < tile.first || i[0] >= min(tile.first + kWarp, space.x) || i[1] >= space.y) return;
    if (!element.at_row_end(i) || (column >= 2 && i[0] < 2)) return;
    const Vec<float, 3> pull = element.gathered_from(planes, i);
    float* const to = element.gradient + body.differences.offset(i) * 3;
    REGKERNELS_UNROLL
    for (int k = 0; k < 3; ++k) to[k] = pull[k] * element.scale;
    sum += kind.energy(body.differences.slopes_from(planes, i));
  };

  PlaneDifferences before{}, own{}, after{};
  __syncthreads();  // what an item before has left in shared memory has been read
  fetch(tile.z - 2);
  fetch(tile.z - 1);
#pragma unroll 1
  for (int newest = tile.z - 2; newest <= tile.end_z + 2; ++newest) {
    const int z = newest - 2;
    __pipeline_wait_prior(1);
    __syncthreads();
    fetch(newest + 2);
    // The rows of the plane before have been stored, with nothing at their ends.
    if (z > tile.z) take_row_ends(z - 1);
    if (z == tile.end_z) break;
    before = own;
    own = after;
    after = PlaneDifferences::of(here(z + 1));
    if (z < tile.z || !row_there) continue;
    const Voxel voxel{z, tile.y, x, active, tile.first, space.x};
    const Vec<int, 3> i = voxel_index<3>(voxel);
    Vec<float, 3> pull{};
    float energy;
    if (element.far_from_border(i, 1)) {
      const float *const at = here(z), *const last = here(z - 1), *const next = here(z + 1);
      Matrix<float, 3> slopes;
      REGKERNELS_UNROLL
      for (int k = 0; k < 3; ++k) {
        const float factor = 0.5f * half[k];
        slopes.m[k][0] = factor * own.along[0][k];
        slopes.m[k][1] = factor * own.along[1][k];
        slopes.m[k][2] = factor * (next[k] - last[k]);
      }
      energy = kind.energy(slopes);
      // The formula of ElasticEnergy::pull.
      constexpr int kRow = Plane::kRowSize;
      const float twist[3][3] = {
          {0, (at[1 - kRow + 3] - at[1 - kRow - 3]) - (at[1 + kRow + 3] - at[1 + kRow - 3]),
           before.along[0][2] - after.along[0][2]},
          {(at[kRow - 3] - at[-kRow - 3]) - (at[kRow + 3] - at[-kRow + 3]), 0,
           before.along[1][2] - after.along[1][2]},
          {before.along[0][0] - after.along[0][0], before.along[1][1] - after.along[1][1], 0}};
      const float *const before_last = here(z - 2), *const after_next = here(z + 2);
      REGKERNELS_UNROLL
      for (int k = 0; k < 3; ++k) {
        const float u = at[k];
        const float low[3] = {at[k - 6], at[k - 2 * kRow], before_last[k]};
        const float high[3] = {at[k + 6], at[k + 2 * kRow], after_next[k]};
        REGKERNELS_UNROLL
        for (int a = 0; a < 3; ++a) {
          pull[k] += kind.second[k][a] * ((u - low[a]) + (u - high[a]));
          if (a != k) pull[k] += kind.mixed[k][a] * twist[k][a];
        }
        pull[k] *= element.scale;
      }
      if (element.at_row_end(i)) {
        pull = {};
        energy = 0;
      }
    } else {
      energy = kind.energy(body.differences.slopes_from(planes, i));
      pull = element.gathered_from(planes, i);
      REGKERNELS_UNROLL
      for (int k = 0; k < 3; ++k) pull[k] *= element.scale;
    }
    store_packed(element.gradient + voxel.row(size) * 3, voxel, pull);
    if (active) sum += energy;
  }
  __pipeline_wait_prior(0);
  return sum;
}

// For how many blocks per multiprocessor the compiler must leave registers.
template <bool kGradient, class Body>
inline constexpr int kMinBlocks = 1;
template <class T, int D, class Kind>
inline constexpr int kMinBlocks<true, SlopeEnergy<T, D, Kind>> =
    Kind::kHasPull && sizeof(T) == sizeof(float) ? 3 : 2;

// Each block leaves the sum of one part of an item in `partial`, unless that is null.
template <bool kGradient, bool kSlab, class Body>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, (kMinBlocks<kGradient, Body>))
    sum_parts_kernel(const __grid_constant__ Body body, const __grid_constant__ VoxelSpace space,
                     int64_t parts, int planes_of_part, typename Body::T* partial,
                     const OwnPlanes own) {
  using T = typename Body::T;
  __shared__ T shared[kRowsPerBlock];
  const int64_t part = blockIdx.x;
  // Whole volumes need no registers for where they begin.
  const Tile whole = Tile::of(part, planes_of_part, space);
  const Tile tile = kSlab ? whole.in(own) : whole;
  for (int64_t b = blockIdx.y; b < space.batch(); b += gridDim.y) {
    const int64_t group = b / space.items;
    T sum = sum_of_tile<kGradient>(body, space, group, b - group * space.items, tile);
    if (partial == nullptr) continue;
    __syncwarp();
    sum = warp_sum(sum);
    if (threadIdx.x == 0) shared[threadIdx.y] = sum;
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
      T total = 0;
      REGKERNELS_UNROLL
      for (int warp = 0; warp < kRowsPerBlock; ++warp) total += shared[warp];
      partial[b * parts + part] = total;
    }
    __syncthreads();
  }
}

template <bool kSlab, class Body>
void launch_sum_parts(const Cuda& device, const Body& body, const VoxelSpace& space,
                      const OwnPlanes& own, const FieldEnergyCall& checked,
                      typename Body::T* partial) {
  const int64_t parts = checked.parts;
  if (space.batch() == 0) return;
  const dim3 grid(static_cast<unsigned>(parts),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const dim3 block(kWarp, kRowsPerBlock);
  if (body.gradient.data == nullptr) {
    sum_parts_kernel<false, kSlab><<<grid, block, 0, device.stream>>>(
        body, space, parts, checked.planes_of_part, partial, own);
  } else {
    sum_parts_kernel<true, kSlab><<<grid, block, 0, device.stream>>>(
        body, space, parts, checked.planes_of_part, partial, own);
  }
  check_launch();
}

template <class Body>
void sum_parts(const Cuda& device, const Call& call, const Body& body, const VoxelSpace& space,
               typename Body::T* partial) {
  const auto& checked = call.checked<FieldEnergyCall>();
  const OwnPlanes own(call);
  if constexpr (Body::kAxes == 3) {
    if (call.slab.present()) {
      return launch_sum_parts<true>(device, body, space, own, checked, partial);
    }
  }
  launch_sum_parts<false>(device, body, space, own, checked, partial);
}

}  // namespace

void field_energy_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  const auto& checked = call.checked<FieldEnergyCall>();
  with_field_energy(call, [&](const auto& body, const VoxelSpace& space) {
    using T = typename std::decay_t<decltype(body)>::T;
    T* const partial = call.output("partial_sums").template as<T>();
    sum_parts(device, call, body, space, partial);
    const int64_t terms = checked.output.rank() == 1 ? space.items * checked.parts : checked.parts;
    sum_groups(device, checked.output.count(), partial, terms, terms, checked.scale(),
               static_cast<const T*>(nullptr), call.output("output").template as<T>());
  });
}

void field_energy_grad_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  with_field_energy(call, [&](const auto& body, const VoxelSpace& space) {
    using T = typename std::decay_t<decltype(body)>::T;
    sum_parts(device, call, body, space, static_cast<T*>(nullptr));
  });
}

}  // namespace regkernels

#include <algorithm>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/fetch_row.h"
#include "core/for_each.h"
#include "maths/voxel_vectors.h"
#include "ops/gaussian_smooth/fused.h"
#include "ops/gaussian_smooth/smooth.h"
#include "ops/step_gradient/maths.h"
#include "ops/step_gradient/step_gradient.h"

namespace regkernels {

namespace {

// Writes the product as it is.
template <class Product>
struct WriteProduct {
  using T = typename Product::T;
  static constexpr int D = Product::D;
  Product product;
  T* output;
  int64_t items;

  struct Element {
    const WriteProduct* self;
    typename Product::Item item;
    T* output;
    __device__ __forceinline__ void operator()(const Voxel& voxel) const {
      const Product& product = self->product;
      const int64_t row = voxel.row(product.frame.size);
      Vec<T, D> value;
      REGKERNELS_UNROLL
      for (int k = 0; k < D; ++k) {
        const auto along = product.difference(k, voxel.x, voxel.y, voxel.z);
        value[k] = product.component(item, row + voxel.x, k, along);
      }
      store_packed(output + row * D, voxel, value);
    }
  };
  __device__ __forceinline__ Element element(int64_t group, int64_t item) const {
    return {this, product.item(group, item), output + (group * items + item) * product.volume * D};
  }
};

// Writes the product with a pull that is taken through a warp, of images of one channel in 3-D.
// Every voxel looks at six neighbours' displacements. Of rows of packed vectors in memory each load
// would take three times as long as of rows of numbers; so the displacement and the pull wait in
// shared memory, and of the neighbours along z the voxel's own column in registers.
struct WarpedProduct {
  using T = float;
  GradientProduct<T, 3> product;
  T* output;
  VoxelSpace space;
  int tiles_x;
  int depth;  // planes that a block walks through

  // On each side of a row there are more voxels than anybody looks at, so that it begins at a
  // multiple of four numbers.
  static constexpr int kHalo = 1, kHaloX = 4;
  static constexpr int kRowSize = (kWarp + 2 * kHaloX) * 3, kRows = kRowsPerBlock + 2 * kHalo;
  // A plane in shared memory: the tile of the displacement, and that of the pull.
  static constexpr int kPull = kRows * kRowSize, kSize = kPull + kRowsPerBlock * kWarp * 3;
  static constexpr int kPlanes = 4;  // the voxel's, the next one, and two on their way
};

__global__ void __launch_bounds__(kWarp* kRowsPerBlock, 4)
    warped_product_kernel(const __grid_constant__ WarpedProduct arguments) {
  using W = WarpedProduct;
  using T = W::T;
  __shared__ __align__(16) T memory[W::kPlanes][W::kSize];
  const auto& product = arguments.product;
  const VoxelSpace& space = arguments.space;
  const int tile_y = blockIdx.x / arguments.tiles_x;
  const int tile_x = (blockIdx.x - tile_y * arguments.tiles_x) * kWarp;
  const int y = tile_y * kRowsPerBlock + static_cast<int>(threadIdx.y);
  const int lane_x = tile_x + static_cast<int>(threadIdx.x);
  const bool active = lane_x < space.x;
  const int x = active ? lane_x : space.x - 1;
  const int64_t plane_size = static_cast<int64_t>(space.x) * space.y;
  const int z_begin = blockIdx.y * arguments.depth, z_end = min(z_begin + arguments.depth, space.z);
  for (int64_t b = blockIdx.z; b < space.batch(); b += gridDim.z) {
    const int64_t group = b / space.items;
    const auto item = product.item(group, b - group * space.items);
    T* const output = arguments.output + b * product.volume * 3;
    const auto place = [&](int z) { return memory[static_cast<unsigned>(z + 1) % W::kPlanes]; };
    const bool by_four =
        rows_of_four(item.displacement, 3 * space.x) && rows_of_four(item.pull, 3 * space.x);
    // Of what is not there nothing is fetched or used.
    const auto fetch = [&](int z) {
      if (z >= 0 && z < space.z && z <= z_end) {
        const T* const plane = item.displacement + z * plane_size * 3;
        REGKERNELS_NO_UNROLL
        for (int row = threadIdx.y; row < W::kRows; row += kRowsPerBlock) {
          const int from_y = tile_y * kRowsPerBlock + row - W::kHalo;
          if (from_y < 0 || from_y >= space.y) continue;
          fetch_row<W::kRowSize>(place(z) + row * W::kRowSize,
                                 plane + static_cast<int64_t>(from_y) * space.x * 3,
                                 (tile_x - W::kHaloX) * 3, 3 * space.x, by_four);
        }
        // What other blocks have of the pull may be overwritten already.
        if (y < space.y && z >= z_begin && z < z_end) {
          fetch_row<kWarp * 3>(place(z) + W::kPull + threadIdx.y * (kWarp * 3),
                               item.pull + (z * plane_size + static_cast<int64_t>(y) * space.x) * 3,
                               tile_x * 3, 3 * space.x, by_four);
        }
      }
      __pipeline_commit();
    };
    const auto displacement_at = [&](int z) {
      return place(z) + (threadIdx.y + W::kHalo) * W::kRowSize + (threadIdx.x + W::kHaloX) * 3;
    };
    const int64_t in_plane = static_cast<int64_t>(min(y, space.y - 1)) * space.x + x;
    const auto moved_at = [&](int z) {
      return z >= 0 && z < space.z ? item.moved[z * plane_size + in_plane] : T(0);
    };
    // The voxel's column: the planes before it, its own, and after it.
    T column[3][3] = {}, moved[3] = {0, moved_at(z_begin - 1), moved_at(z_begin)};
    __syncthreads();  // what an item before has left in shared memory has been read
    fetch(z_begin - 1);
    fetch(z_begin);
#pragma unroll 1
    for (int newest = z_begin - 1; newest <= z_end; ++newest) {
      const int z = newest - 1;
      __pipeline_wait_prior(1);
      __syncthreads();
      fetch(newest + 2);
      REGKERNELS_UNROLL
      for (int k = 0; k < 3; ++k) {
        column[0][k] = column[1][k];
        column[1][k] = column[2][k];
        column[2][k] = displacement_at(newest)[k];
      }
      if (z < z_begin || y >= space.y) continue;
      moved[0] = moved[1];
      moved[1] = moved[2];
      moved[2] = moved_at(z + 1);
      const T* const at = displacement_at(z);
      const T* const image = item.moved + z * plane_size + in_plane;
      const T slope = item.slope_scale * item.slope[z * plane_size + in_plane];
      // A lane past the end of the row has no pull of its own; nobody stores what it computes.
      const T* const in_stage = place(z) + W::kPull + (threadIdx.y * kWarp + threadIdx.x) * 3;
      const T pull[3] = {item.pull_scale * in_stage[0], item.pull_scale * in_stage[1],
                         item.pull_scale * in_stage[2]};
      Vec<T, 3> value;
      REGKERNELS_UNROLL
      for (int k = 0; k < 3; ++k) {
        const auto along = product.neighbours(k, x, y, z);
        T sum = 0;
        if (along.below || along.above) {
          const int step = k == 0 ? 3 : W::kRowSize;
          const int64_t image_step = k == 0 ? 1 : space.x;
          const T high = !along.above ? moved[1] : k == 2 ? moved[2] : image[image_step];
          const T low = !along.below ? moved[1] : k == 2 ? moved[0] : image[-image_step];
          sum = slope * ((high - low) * along.factor);
          REGKERNELS_UNROLL
          for (int j = 0; j < 3; ++j) {
            const T own = column[1][j];
            const T above = !along.above ? own : k == 2 ? column[2][j] : at[j + step];
            const T below = !along.below ? own : k == 2 ? column[0][j] : at[j - step];
            sum += pull[j] * ((above - below) * along.factor);
          }
        }
        value[k] = sum + pull[k];
      }
      const Voxel voxel{z, y, x, active, tile_x, space.x};
      store_packed(output + voxel.row(product.frame.size) * 3, voxel, value);
    }
    __pipeline_wait_prior(0);
  }
}

void write_warped_product(const Cuda& device, const GradientProduct<float, 3>& product,
                          const VoxelSpace& space, float* output) {
  if (space.empty()) return;
  const int tiles_x = (space.x + kWarp - 1) / kWarp;
  const int tiles_y = (space.y + kRowsPerBlock - 1) / kRowsPerBlock;
  // A long walk fetches few planes twice; there have to be some blocks for each multiprocessor.
  const int64_t tiles = static_cast<int64_t>(tiles_x) * tiles_y * space.batch();
  const int64_t walks = (8 * multiprocessors() + tiles - 1) / tiles;
  const int depth = static_cast<int>(std::clamp<int64_t>((space.z + walks - 1) / walks, 4, 64));
  const dim3 grid(static_cast<unsigned>(tiles_x * tiles_y),
                  static_cast<unsigned>((space.z + depth - 1) / depth),
                  static_cast<unsigned>(std::min<int64_t>(space.batch(), 65535)));
  const dim3 block(kWarp, kRowsPerBlock);
  const WarpedProduct arguments{product, output, space, tiles_x, depth};
  warped_product_kernel<<<grid, block, 0, device.stream>>>(arguments);
  check_launch();
}

// The product as what is smoothed: it is computed when a tile is loaded, and never in memory.
template <class Product>
struct ProductSource {
  using T = typename Product::T;
  using Stage = NoStage;
  static constexpr int D = Product::D;
  Product product;
  int64_t items;

  struct Column {
    const Product* product;
    typename Product::Item item;
    int64_t plane;  // the number of its first voxel
    int x, y, z, k;
    __device__ __forceinline__ void fetch(T* to, int row, bool inside) const {
      T value = 0;
      if (inside) {
        const int64_t voxel = plane + ((y + row) * product->frame.size[0] + x);
        value = product->component(item, voxel, k, product->difference(k, x, y + row, z));
      }
      *to = value;
    }
  };
  __device__ __forceinline__ Column column(int64_t volume, int z, int y, int x) const {
    const int64_t group = items == 1 ? volume : volume / items;
    // A column before the first is not inside, whichever voxel it is taken for.
    const int in_row = x / D;
    const int64_t plane_size = static_cast<int64_t>(product.frame.size[0]) * product.frame.size[1];
    return {
        &product,      product.item(group, volume - group * items), z * plane_size, in_row, y, z,
        x - in_row * D};
  }
};

// The same for images of one channel, where what is multiplied can wait in shared memory: loads
// then arrive while other planes are smoothed. The stage holds tiles of five planes of the moved
// image, which have one voxel more on each side, and of three of the slope; the pull arrives where
// it is added to.
template <class Product>
struct StagedProductSource {
  using T = typename Product::T;
  static constexpr int D = Product::D;
  Product product;
  int64_t items;

  __device__ __forceinline__ bool adds() const { return product.pull.data != nullptr; }
  __device__ __forceinline__ typename Product::Item item(int64_t volume) const {
    const int64_t group = items == 1 ? volume : volume / items;
    return product.item(group, volume - group * items);
  }
  __device__ __forceinline__ int64_t plane_size() const {
    return static_cast<int64_t>(product.frame.size[0]) * product.frame.size[1];
  }
  __device__ __forceinline__ PackedColumn<T> column(int64_t volume, int z, int y, int x) const {
    const int row = product.frame.size[0] * D;
    return {item(volume).pull + z * plane_size() * D + (y * row + x), row};
  }

  class Stage {
   public:
    static constexpr bool kPresent = true;
    static constexpr int kMoved = 5, kSlopes = 3;
    static constexpr REGKERNELS_HD int size(const SmoothingTile& tile) {
      return kMoved * moved_size(tile) + kSlopes * slope_size(tile);
    }

    // The tile begins at the column x0, counted in numbers, and the row y0. Planes are counted from
    // the first that is smoothed.
    __device__ __forceinline__ Stage(const StagedProductSource& source, const SmoothingTile& tile,
                                     T* memory, int64_t volume, int x0, int y0, int first_plane)
        : source_(source),
          item_(source.item(volume)),
          tile_(tile),
          memory_(memory),
          x_(x0 / D - tile.halo_x / D),
          y_(y0 - tile.halo_y),
          first_(first_plane) {}

    // Fetches what the first of all planes needs besides.
    __device__ __forceinline__ void begin() const {
      fetch_moved(-1);
      fetch_moved(0);
    }
    // Fetches what a plane needs that those before it did not.
    __device__ __forceinline__ void fetch(int plane) const {
      fetch_part<kThreads>(part(0), kThreads, slope(plane),
                           [&](int y, int x) { return column(item_.slope, first_ + plane, y, x); });
      fetch_moved(plane + 1);
    }
    // Computes a plane, or adds it to the pull.
    __device__ __forceinline__ void complete(int plane, T* to) const {
      const Product& product = source_.product;
      const int width = voxels(tile_), stride = width + 2 | 1;
      const T *const here = moved(plane) + stride + 1,
                     *const before = moved(plane - 1) + stride + 1,
                     *const after = moved(plane + 1) + stride + 1, *const slopes = slope(plane);
      const bool adds = source_.adds();
      const int z = first_ + plane;
      const auto along_z = product.neighbours(2, 0, 0, z);
      for (int i = thread_number<kThreads>(); i < width * tile_.in_rows(); i += kThreads) {
        const int row = i / width, k = i - row * width, at = row * stride + k;
        const int x = x_ + k, y = y_ + row;
        T* const value = to + row * tile_.in_stride() + k * D;
        const bool inside =
            x >= 0 && x < product.frame.size[0] && y >= 0 && y < product.frame.size[1];
        const auto along_x = product.neighbours(0, x, y, z),
                   along_y = product.neighbours(1, x, y, z);
        const T weight = item_.slope_scale * slopes[row * (width | 1) + k];
        const T own = here[at];
        const auto component = [&](const auto& along, T low, T high) {
          // A product with 0 would let through what is not finite.
          if (!inside || (!along.below && !along.above)) return T(0);
          return weight * (((along.above ? high : own) - (along.below ? low : own)) * along.factor);
        };
        const T gradient[D] = {component(along_x, here[at - 1], here[at + 1]),
                               component(along_y, here[at - stride], here[at + stride]),
                               component(along_z, before[at], after[at])};
        REGKERNELS_UNROLL
        for (int c = 0; c < D; ++c) {
          value[c] = adds ? gradient[c] + item_.pull_scale * value[c] : gradient[c];
        }
      }
    }

   private:
    static constexpr int kThreads = ExactShape::kThreads;
    static constexpr REGKERNELS_HD int voxels(const SmoothingTile& tile) {
      return tile.in_columns() / D;
    }
    static constexpr REGKERNELS_HD int moved_size(const SmoothingTile& tile) {
      return (tile.in_rows() + 2) * (voxels(tile) + 2 | 1);
    }
    static constexpr REGKERNELS_HD int slope_size(const SmoothingTile& tile) {
      return tile.in_rows() * (voxels(tile) | 1);
    }

    __device__ __forceinline__ T* moved(int plane) const {
      return memory_ + static_cast<unsigned>(plane + 1) % kMoved * moved_size(tile_);
    }
    __device__ __forceinline__ T* slope(int plane) const {
      return memory_ + kMoved * moved_size(tile_) +
             static_cast<unsigned>(plane) % kSlopes * slope_size(tile_);
    }
    // The tile of an image, with so many voxels more on each side.
    __device__ __forceinline__ TilePart part(int more) const {
      const int width = voxels(tile_) + 2 * more;
      return {width,
              tile_.in_rows() + 2 * more,
              width | 1,
              x_ - more,
              y_ - more,
              source_.product.frame.size[0],
              source_.product.frame.size[1]};
    }
    __device__ __forceinline__ PackedColumn<T> column(const T* image, int z, int y, int x) const {
      const int row = source_.product.frame.size[0];
      return {image + z * source_.plane_size() + (y * row + x), row};
    }
    __device__ __forceinline__ void fetch_moved(int plane) const {
      const int z = first_ + plane;
      if (z < 0 || z >= source_.product.planes) return;
      fetch_part<kThreads>(part(1), kThreads, moved(plane),
                           [&](int y, int x) { return column(item_.moved, z, y, x); });
    }

    const StagedProductSource& source_;
    const typename Product::Item item_;
    const SmoothingTile& tile_;
    T* const memory_;
    const int x_, y_;  // the first voxel of the tile, with its halo
    const int first_;
  };
};

template <class Product>
void smooth_product(const Cuda& device, const Product& product, const StepGradientCall& call,
                    typename Product::T* output) {
  using T = typename Product::T;
  auto smoothing = make_smoothing<T>(call.smoothing);
  const ArraySink<T> sink{output, product.volume * Product::D};
  const int64_t volumes = call.smoothing.volumes, limit = shared_memory_limit();
  if constexpr (std::is_same_v<T, float> && Product::D == 3) {
    const StagedProductSource<Product> staged{product, call.batch.items};
    const auto launch_radius = [&](auto radius) {
      return call.channels == 1 && launch_exact<decltype(radius)::value, 3, ExactShape>(
                                       device, staged, sink, smoothing, volumes, limit);
    };
    if (launch_radius(IntTag<4>{}) || launch_radius(IntTag<5>{}) || launch_radius(IntTag<6>{}) ||
        launch_radius(IntTag<8>{})) {
      return;
    }
  }
  const ProductSource<Product> source{product, call.batch.items};
  launch_general(device, source, sink, smoothing, volumes, limit);
}

}  // namespace

void step_gradient_cuda(const Context& context, const Call& call) {
  const Cuda device(context);
  with_gradient_product(call, [&](const auto& product) {
    using Product = std::decay_t<decltype(product)>;
    using T = typename Product::T;
    const auto& checked = call.checked<StepGradientCall>();
    const GaussianSmoothCall& smoothing = checked.smoothing;
    T* const output = call.output("output").template as<T>();
    const bool alone = product.displacement.data == nullptr;
    if (!smoothing.passes.empty() && smoothing.fused && alone) {
      return smooth_product(device, product, checked, output);
    }
    T* const scratch = call.output("scratch").template as<T>();
    const bool in_output =
        smoothing.passes.empty() || (!smoothing.fused && !first_pass_writes_output(smoothing));
    T* const unsmoothed = in_output ? output : scratch;
    const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
    const auto write_product = [&] {
      if constexpr (std::is_same_v<T, float> && Product::D == 3) {
        if (checked.channels == 1 && product.displacement.data != nullptr) {
          return write_warped_product(device, product, space, unsmoothed);
        }
      }
      for_each_voxel(device, space, WriteProduct<Product>{product, unsmoothed, space.items});
    };
    write_product();
    if (smoothing.passes.empty()) return;
    smooth_array(device, smoothing, static_cast<const T*>(unsmoothed), output,
                 call.output("weights").template as<T>(), scratch);
  });
}

}  // namespace regkernels

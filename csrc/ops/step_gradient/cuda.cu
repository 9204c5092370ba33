#include <algorithm>
#include <type_traits>

#include "core/cuda_runtime.h"
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

// The product as what is smoothed: it is computed when a tile is loaded, and never in memory.
template <class Product>
struct ProductSource {
  using T = typename Product::T;
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

template <class Product>
void smooth_product(const Cuda& device, const Product& product, const StepGradientCall& call,
                    typename Product::T* output) {
  using T = typename Product::T;
  const ProductSource<Product> source{product, call.batch.items};
  Smoothing<T> smoothing = make_smoothing(call.smoothing, output);
  const int64_t volumes = call.smoothing.volumes, limit = shared_memory_limit();
  if constexpr (std::is_same_v<T, float> && Product::D == 3) {
    const auto launch_radius = [&](auto radius) {
      return launch_exact<decltype(radius)::value, 3, ExactShape>(device, source, smoothing,
                                                                  volumes, limit);
    };
    if (launch_radius(IntTag<4>{}) || launch_radius(IntTag<5>{}) || launch_radius(IntTag<6>{}) ||
        launch_radius(IntTag<8>{})) {
      return;
    }
  }
  launch_general(device, source, smoothing, volumes, limit);
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
    if (!smoothing.passes.empty() && smoothing.fused) {
      return smooth_product(device, product, checked, output);
    }
    T* const scratch = call.output("scratch").template as<T>();
    const bool in_output = smoothing.passes.empty() || !first_pass_writes_output(smoothing);
    T* const unsmoothed = in_output ? output : scratch;
    const VoxelSpace space = voxel_space(checked.batch.groups, checked.batch.items, checked.sizes);
    for_each_voxel(device, space, WriteProduct<Product>{product, unsmoothed, space.items});
    if (smoothing.passes.empty()) return;
    smooth_array(device, smoothing, static_cast<const T*>(unsmoothed), output,
                 call.output("weights").template as<T>(), scratch);
  });
}

}  // namespace regkernels

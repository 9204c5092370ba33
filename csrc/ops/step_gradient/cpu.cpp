#include <algorithm>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "ops/gaussian_smooth/smooth.h"
#include "ops/step_gradient/maths.h"
#include "ops/step_gradient/step_gradient.h"

namespace regkernels {

namespace {

// Adds scale * slope * (high - low) * factor to a row of sums.
template <class T>
inline __attribute__((always_inline)) void add_products(T scale, const T* slope, const T* high,
                                                        const T* low, T factor, int64_t first,
                                                        int64_t last, T* __restrict__ sums) {
  for (int64_t x = first; x < last; ++x) {
    sums[x] += scale * slope[x] * ((high[x] - low[x]) * factor);
  }
}

// Adds scale times the pull times the slope of the displacement, (high - low) * factor, to a row of
// sums.
template <int D, class T>
inline __attribute__((always_inline)) void add_turned(T scale, const T* pull, const T* high,
                                                      const T* low, T factor, int64_t first,
                                                      int64_t last, T* __restrict__ products,
                                                      T* __restrict__ sums) {
  for (int64_t e = first * D; e < last * D; ++e) {
    products[e] = scale * pull[e] * ((high[e] - low[e]) * factor);
  }
  for (int64_t x = first; x < last; ++x) {
    for (int j = 0; j < D; ++j) sums[x] += products[x * D + j];
  }
}

// Writes a row of the product, one component after the other.
template <class Product>
inline __attribute__((always_inline)) void write_row(const Product& product,
                                                     const typename Product::Item& item, int z,
                                                     int y, typename Product::T* sums,
                                                     typename Product::T* output) {
  using T = typename Product::T;
  constexpr int D = Product::D;
  const int size = product.frame.size[0];
  const int64_t row = (static_cast<int64_t>(z) * product.frame.size[1] + y) * size;
  T* const products = sums + D * size;
  for (int k = 0; k < D; ++k) {
    T* const own = sums + k * size;
    std::fill_n(own, size, T(0));
    // Along a row neighbours differ at its ends alone.
    const int ends[4] = {0, std::min(1, size), std::max(1, size - 1), size};
    const int runs = k == 0 ? 3 : 1;
    for (int run = 0; run < runs; ++run) {
      const int first = ends[run], last = runs == 1 ? size : ends[run + 1];
      const auto along = product.difference(k, first, y, z);
      if (first >= last || along.low == along.high) continue;
      for (int64_t c = 0; c < product.channels; ++c) {
        const T* const slope = item.slope + (c * product.volume + row);
        const T* const image = item.moved + (c * product.volume + row);
        add_products(item.slope_scale, slope, image + along.high, image + along.low, along.factor,
                     first, last, own);
      }
      if (item.displacement == nullptr) continue;
      const T* const at = item.displacement + row * D;
      add_turned<D>(item.pull_scale, item.pull + row * D, at + along.high * D, at + along.low * D,
                    along.factor, first, last, products, own);
    }
  }
  T* const to = output + row * D;
  const T* const pull = item.pull == nullptr ? nullptr : item.pull + row * D;
  if (pull == nullptr) {
    for (int x = 0; x < size; ++x) {
      for (int k = 0; k < D; ++k) to[x * D + k] = sums[k * size + x];
    }
  } else {
    for (int x = 0; x < size; ++x) {
      for (int k = 0; k < D; ++k) {
        to[x * D + k] = sums[k * size + x] + item.pull_scale * pull[x * D + k];
      }
    }
  }
}

}  // namespace

void step_gradient_cpu(const Context& context, const Call& call) {
  with_gradient_product(call, [&](const auto& product) {
    using T = typename std::decay_t<decltype(product)>::T;
    constexpr int D = std::decay_t<decltype(product)>::D;
    const auto& checked = call.checked<StepGradientCall>();
    T* const output = call.output("output").template as<T>();
    const int64_t rows = checked.sizes.rows(), items = checked.batch.items;
    const int64_t grain = std::max<int64_t>(1, 4096 / checked.sizes.x);
    parallel_for(checked.batch.groups * items * rows, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      T* const sums = scratch.take<T>(checked.sizes.x * D * 2);
      with_vector_code([&] {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / rows, row = i - b * rows;
          write_row(product, product.item(b / items, b % items),
                    static_cast<int>(row / checked.sizes.y),
                    static_cast<int>(row % checked.sizes.y), sums, output + b * product.volume * D);
        }
      });
    });
    if (checked.smoothing.passes.empty()) return;
    smooth_array(Cpu(context), checked.smoothing, static_cast<const T*>(output), output,
                 call.output("weights").template as<T>(), static_cast<T*>(nullptr));
  });
}

}  // namespace regkernels

// The gradient is smoothed by the kernel of gaussian_smooth, which makes moments of it where it
// would write it: what is smooth is never in memory.
#include "ops/gaussian_smooth/fused.h"
#include "ops/riemannian_adam_step/moments_cuda.h"

namespace regkernels {

namespace {

template <class T, class M, int D>
struct GradientSource {
  using Stage = NoStage;
  Operand<const T> gradient;
  int64_t items;
  int columns;
  int64_t plane_size;

  __device__ __forceinline__ PackedColumn<T> column(int64_t volume, int z, int y, int x) const {
    const int64_t group = volume / items;
    return {gradient.at(group, volume - group * items) + (z * plane_size + (y * columns + x)),
            columns};
  }
};

template <class T, class M, int D>
struct MomentsSink {
  Moments<T, M, D> moments;

  // What all threads have to know of a volume, where it takes no registers.
  struct OfVolume {
    AdamRule<T> rule;
    int volume, group, item;
  };
  static_assert(alignof(OfVolume) <= sizeof(T) && sizeof(OfVolume) % sizeof(T) == 0);

  // Beside it there are the squared numbers of two planes: of that which leaves, and of the one
  // before, which are added up.
  static constexpr REGKERNELS_HD int shared_size(int columns, int rows) {
    return sizeof(OfVolume) / sizeof(T) + 2 * columns * rows;
  }

  template <int kColumns, int kDown>
  struct Writer {
    using Bits = typename BitsOf<T>::type;
    static_assert(kColumns % D == 0, "the numbers of a vector are in one tile");

    const MomentsSink& sink;
    T* const shared;
    M mu[kDown], nu[kDown];
    Bits greatest = 0;

    __device__ __forceinline__ Writer(const MomentsSink& all, int64_t volume, T* memory)
        : sink(all), shared(memory) {
      if (threadIdx.x != 0) return;
      const int64_t items = sink.moments.items, group = volume / items;
      const int64_t item = volume - group * items;
      *reinterpret_cast<OfVolume*>(shared) = {sink.moments.rules.of(group, item),
                                              static_cast<int>(volume), static_cast<int>(group),
                                              static_cast<int>(item)};
    }

    __device__ __forceinline__ void expect(const OwnedColumn& own, int z) {
      const int64_t first = z * own.plane_size + own.first;
      const OfVolume& of = of_volume();
      const M* const from_mu = sink.moments.mu.at(of.group, of.item) + first;
      const M* const from_nu = sink.moments.nu.at(of.group, of.item) + first;
      REGKERNELS_UNROLL
      for (int k = 0; k < kDown; ++k) {
        if (k >= own.rows) continue;
        mu[k] = from_mu[k * own.apart];
        nu[k] = from_nu[k * own.apart];
      }
    }
    __device__ __forceinline__ void leave(const OwnedColumn& own, int z, const T (&sum)[kDown]) {
      const int64_t first = z * own.plane_size + own.first;
      const OfVolume& of = of_volume();
      M* const to_mu = sink.moments.next_mu.at(of.group, of.item) + first;
      M* const to_nu = sink.moments.next_nu.at(of.group, of.item) + first;
      T* const to_squares = squares_of(z) + own.row_of_tile * kColumns + own.column_of_tile;
      const int64_t before = sink.moments.first_number() + first;
      // The first column of a tile is the first number of a vector.
      const T epsilon = sink.moments.rules.epsilon.at(of.group, of.item)[own.column_of_tile % D];
      REGKERNELS_UNROLL
      for (int k = 0; k < kDown; ++k) {
        T square = 0;
        if (k < own.rows) {
          const MomentsOfNumber<T, M> found(of.rule, sum[k], to_arithmetic(mu[k]),
                                            to_arithmetic(nu[k]), epsilon, before + k * own.apart);
          to_mu[k * own.apart] = found.mu;
          to_nu[k * own.apart] = found.nu;
          square = found.direction * found.direction;
        }
        to_squares[k * kColumns] = square;
      }
    }
    __device__ __forceinline__ void left(int z) {
      if (z < sink.moments.first_counted() || z >= sink.moments.end_of_counted()) return;
      const T* const from = squares_of(z);
      for (int i = threadIdx.x; i < size() / D; i += blockDim.x) {
        T sum = from[i * D];
        REGKERNELS_UNROLL
        for (int k = 1; k < D; ++k) sum += from[i * D + k];
        greatest = max(greatest, magnitude_bits(sum));
      }
    }
    __device__ __forceinline__ void end() {
      greatest = greatest_of_warp(greatest);
      if (threadIdx.x % kWarp == 0) lengthen(sink.moments.longest + of_volume().volume, greatest);
      __syncthreads();  // what is known of the next volume comes in its place
    }

    __device__ __forceinline__ const OfVolume& of_volume() const {
      return *reinterpret_cast<const OfVolume*>(shared);
    }
    __device__ __forceinline__ int size() const { return blockDim.x * kDown; }
    __device__ __forceinline__ T* squares_of(int z) const {
      return shared + sizeof(OfVolume) / sizeof(T) + (z & 1) * size();
    }
  };
};

}  // namespace

template <class T, class M, int D>
void find_smooth_moments(const Cuda& device, const Moments<T, M, D>& moments,
                         const GaussianSmoothCall& call) {
  auto smoothing = make_smoothing<T>(call);
  const GradientSource<T, M, D> source{moments.gradient, moments.items, smoothing.columns,
                                       moments.plane_voxels * D};
  const MomentsSink<T, M, D> sink{moments};
  const int64_t limit = shared_memory_limit();
  if constexpr (std::is_same_v<T, float> && D == 3) {
    const auto launch_radius = [&](auto radius) {
      return launch_exact<decltype(radius)::value, D, ExactShape>(device, source, sink, smoothing,
                                                                  moments.batch, limit);
    };
    if (launch_radius(IntTag<4>{}) || launch_radius(IntTag<5>{}) || launch_radius(IntTag<6>{}) ||
        launch_radius(IntTag<8>{})) {
      return;
    }
  }
  launch_general(device, source, sink, smoothing, moments.batch, limit);
}

#define REGKERNELS_FIND_SMOOTH_MOMENTS(T, M, D) \
  template void find_smooth_moments(const Cuda&, const Moments<T, M, D>&, const GaussianSmoothCall&)
REGKERNELS_FIND_SMOOTH_MOMENTS(float, float, 2);
REGKERNELS_FIND_SMOOTH_MOMENTS(float, float, 3);
REGKERNELS_FIND_SMOOTH_MOMENTS(float, BFloat16, 2);
REGKERNELS_FIND_SMOOTH_MOMENTS(float, BFloat16, 3);
REGKERNELS_FIND_SMOOTH_MOMENTS(double, double, 2);
REGKERNELS_FIND_SMOOTH_MOMENTS(double, double, 3);
#undef REGKERNELS_FIND_SMOOTH_MOMENTS

}  // namespace regkernels

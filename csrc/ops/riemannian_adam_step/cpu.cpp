#include <algorithm>
#include <mutex>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "ops/gaussian_smooth/smooth.h"
#include "ops/riemannian_adam_step/maths.h"
#include "ops/riemannian_adam_step/riemannian_adam_step.h"

namespace regkernels {

namespace {

// Calls body(scratch, group, item, first, last) for runs of rows of each item, in tasks.
template <class Body>
void for_each_run_of_rows(const AdamCall& checked, const Body& body) {
  const int64_t rows = checked.sizes.rows(), items = checked.batch.items;
  const int64_t all = checked.batch.groups * items * rows;
  const int64_t grain = std::max<int64_t>(1, 4096 / checked.sizes.x);
  parallel_for(all, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / rows, last = std::min(end, (b + 1) * rows);
      Scratch scratch;
      body(scratch, b / items, b % items, begin - b * rows, last - b * rows);
      begin = last;
    }
  });
}

// A row of numbers in which those of a vector recur.
template <class T>
T* repeated(Scratch& scratch, const T* vector, int count, int64_t size) {
  T* const result = scratch.take<T>(size);
  for (int64_t e = 0; e < size; ++e) result[e] = vector[e % count];
  return result;
}

template <class T, class M, int D>
class Moments {
 public:
  using Bits = typename BitsOf<T>::type;

  Moments(const Call& call, const AdamCall& checked, const Tensor& gradient, const Tensor& longest)
      : checked_(checked),
        rules_(call, checked, call.input("scale")),
        gradient_(gradient),
        mu_(call.input("mu")),
        nu_(call.input("nu")),
        next_mu_(call.output("next_mu")),
        next_nu_(call.output("next_nu")),
        longest_(longest.as<T>()),
        first_plane_(call.slab) {}

  void run() {
    std::fill_n(longest_, checked_.batch.groups * checked_.batch.items, T(0));
    for_each_run_of_rows(
        checked_, [&](Scratch& scratch, int64_t group, int64_t item, int64_t first, int64_t last) {
          const AdamRule<T> rule = rules_.of(group, item);
          const int64_t size = checked_.sizes.x * D;
          const T* const epsilon = repeated(scratch, rules_.epsilon.at(group, item), D, size);
          const Bits of_first[3] = {~Bits(0), 0, 0};
          const Bits* const counts = repeated(scratch, of_first, D, size);
          T* const squares = scratch.take<T>(size + D);
          std::fill_n(squares + size, D, T(0));
          Bits greatest = 0;
          with_vector_code([&] {
            for (int64_t row = first; row < last; ++row) {
              const int64_t at = row * size;
              const int64_t in_volume = at + first_plane_() * checked_.sizes.y * size;
              update(rule, in_volume, size, epsilon, gradient_.at(group, item) + at,
                     mu_.at(group, item) + at, nu_.at(group, item) + at,
                     next_mu_.at(group, item) + at, next_nu_.at(group, item) + at, squares);
              // The planes beyond the end of a volume do not count.
              const int64_t z = row / checked_.sizes.y;
              if (z + first_plane_() >= checked_.planes || z < checked_.uncounted ||
                  z >= checked_.sizes.z - checked_.uncounted) {
                continue;
              }
              greatest = std::max(greatest, greatest_of(squares, counts, size));
            }
          });
          const T length = std::sqrt(value_of_bits<T>(greatest));
          T& longest = longest_[group * checked_.batch.items + item];
          const std::lock_guard<std::mutex> lock(mutex_);
          longest = value_of_bits<T>(std::max(magnitude_bits(longest), magnitude_bits(length)));
        });
  }

 private:
  static inline __attribute__((always_inline)) void update(const AdamRule<T> rule,
                                                           int64_t in_volume, int64_t size,
                                                           const T* epsilon, const T* gradient,
                                                           const M* mu, const M* nu, M* next_mu,
                                                           M* next_nu, T* squares) {
    // What is written in place is read first.
#pragma GCC ivdep
    for (int64_t e = 0; e < size; ++e) {
      const MomentsOfNumber<T, M> found(rule, gradient[e], to_arithmetic(mu[e]),
                                        to_arithmetic(nu[e]), epsilon[e], in_volume + e);
      next_mu[e] = found.mu;
      next_nu[e] = found.nu;
      squares[e] = found.direction * found.direction;
    }
  }

  // The squared length of the longest vector of a row. For vector code, the sums of all D numbers
  // that follow each other are taken, of which those count that begin with an x.
  static inline __attribute__((always_inline)) Bits greatest_of(const T* squares,
                                                                const Bits* counts, int64_t size) {
    Bits greatest = 0;
    for (int64_t e = 0; e < size; ++e) {
      T sum = squares[e] + squares[e + 1];
      if (D == 3) sum += squares[e + 2];
      greatest = std::max(greatest, magnitude_bits(sum) & counts[e]);
    }
    return greatest;
  }

  const AdamCall& checked_;
  const AdamRules<T> rules_;
  const Operand<const T> gradient_;
  const Operand<const M> mu_, nu_;
  const Operand<M> next_mu_, next_nu_;
  T* const longest_;
  const FirstPlane first_plane_;
  std::mutex mutex_;
};

template <class T, class M, int D>
void write_step(const Call& call, const AdamCall& checked, const Tensor& mu, const Tensor& nu,
                const Tensor& longest) {
  const AdamRules<T> rules(call, checked, Tensor());
  const StepScale<T, D> scale(checked);
  const Operand<const M> of_mu(mu), of_nu(nu);
  const Operand<const T> of_longest(longest);
  const Operand<T> output(call.output("output"));
  const FirstPlane first_plane(call.slab);
  const int64_t voxels = checked.sizes.x, size = voxels * D;
  for_each_run_of_rows(checked, [&](Scratch& scratch, int64_t group, int64_t item, int64_t first,
                                    int64_t last) {
    const AdamRule<T> rule = rules.of(group, item);
    const T* const epsilon = repeated(scratch, rules.epsilon.at(group, item), D, size);
    const T length = scale.length(*of_longest.at(group, item));
    const T* const voxel = repeated(scratch, scale.voxel, D, size);
    with_vector_code([&] {
      for (int64_t row = first; row < last; ++row) {
        const M* const from_mu = of_mu.at(group, item) + row * size;
        const M* const from_nu = of_nu.at(group, item) + row * size;
        T* const to = output.at(group, item) + row * size;
        const AdamRule<T> local = rule;  // nobody changes what is local
#pragma GCC ivdep
        for (int64_t e = 0; e < size; ++e) {
          to[e] = length * voxel[e] *
                  local.direction(to_arithmetic(from_mu[e]), to_arithmetic(from_nu[e]), epsilon[e]);
        }
        if (!checked.confined) continue;
        to[0] = to[size - D] = 0;
        const int64_t y = row % checked.sizes.y, z = row / checked.sizes.y + first_plane();
        const bool on_face[3] = {false, y == 0 || y == checked.sizes.y - 1,
                                 z == 0 || z == checked.planes - 1};
        for (int k = 1; k < D; ++k) {
          for (int64_t x = 0; on_face[k] && x < voxels; ++x) to[x * D + k] = 0;
        }
      }
    });
  });
}

// Smooths the gradient of a call into memory that has room for all of the batch.
template <class T, int D>
void smooth_gradient(const Context& context, const Call& call, const AdamCall& checked, T* smooth) {
  const Tensor& gradient = call.input("gradient");
  const int64_t size = checked.sizes.voxels() * D;
  const T* in = gradient.as<const T>();
  if (gradient.shape.count() != checked.batch.groups * checked.batch.items * size) {
    in = smooth;
    const Operand<const T> from(gradient);
    for (int64_t b = 0; b < checked.batch.groups * checked.batch.items; ++b) {
      const int64_t group = b / checked.batch.items;
      std::copy_n(from.at(group, b - group * checked.batch.items), size, smooth + b * size);
    }
  }
  smooth_array(Cpu(context), checked.smoothing, in, smooth, call.output("weights").as<T>(),
               static_cast<T*>(nullptr));
}

// A smooth gradient is in the place of the step, which is written later, if there is one.
void find_moments(const Context& context, const Call& call, const Tensor& longest,
                  const Tensor& step) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto stored, auto dimensions) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(dimensions)::value;
    Tensor gradient = call.input("gradient");
    const int64_t count = checked.batch.groups * checked.batch.items * checked.sizes.voxels() * D;
    Scratch scratch;
    if (!checked.smoothing.passes.empty() && count > 0) {
      T* const smooth = step.present ? step.as<T>() : scratch.take<T>(count);
      smooth_gradient<T, D>(context, call, checked, smooth);
      gradient = call.output("next_mu");  // in its shape
      gradient.dtype = checked.dtype;
      gradient.data = smooth;
    }
    Moments<T, typename decltype(stored)::type, D>(call, checked, gradient, longest).run();
  });
}

void find_step(const Call& call, const Tensor& mu, const Tensor& nu, const Tensor& longest) {
  with_adam(call, [&](const AdamCall& checked, auto type, auto stored, auto dimensions) {
    write_step<typename decltype(type)::type, typename decltype(stored)::type,
               decltype(dimensions)::value>(call, checked, mu, nu, longest);
  });
}

}  // namespace

void riemannian_adam_step_cpu(const Context& context, const Call& call) {
  find_moments(context, call, call.output("longest"), call.output("output"));
  find_step(call, call.output("next_mu"), call.output("next_nu"), call.output("longest"));
}
void adam_moments_cpu(const Context& context, const Call& call) {
  find_moments(context, call, call.output("output"), Tensor());
}
void adam_step_of_longest_cpu(const Context&, const Call& call) {
  find_step(call, call.input("mu"), call.input("nu"), call.input("longest"));
}

}  // namespace regkernels

#include <algorithm>
#include <cmath>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "ops/mind_ssc/kernels.h"

namespace regkernels {

namespace {

// out[i] = Σ_j in[i + j * stride], for j from 0 to 2 radius.
template <class T>
void sum_runs(const T* in, int radius, int64_t stride, int64_t count, T* __restrict__ out) {
  std::copy(in, in + count, out);
  for (int j = 1; j <= 2 * radius; ++j) {
    const T* const next = in + j * stride;
    for (int64_t i = 0; i < count; ++i) out[i] += next[i];
  }
}

}  // namespace

// Averages each family of a source over the patches around all voxels in and around each volume.
// The sums of planes wait until all planes of a patch are there.
template <class Source, class T>
void average_patches(const Cpu&, const Source& source, int64_t volumes, int radius, T* out) {
  constexpr int D = Source::D;
  // Tasks do not depend on the number of threads; nor would the sums, which add planes in order.
  constexpr int kPlanes = 16;
  const auto& around = source.around;
  const int columns = around.extent(0), rows = around.extent(1), depth = around.extent(2);
  const int radius_z = D == 3 ? radius : 0, waiting = 2 * radius_z + 1;
  const int64_t plane = static_cast<int64_t>(rows) * columns;
  const int pieces = (depth + kPlanes - 1) / kPlanes;
  const T scale = static_cast<T>(1 / std::pow(2 * radius + 1, D));
  parallel_for(volumes * pair_families(D) * pieces, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* const line = scratch.take<T>(columns + 2 * radius);
    T* const along = scratch.take<T>((rows + 2 * radius) * static_cast<int64_t>(columns));
    T* const planes = scratch.take<T>(waiting * plane);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t array = task / pieces;
      const auto view = source.view(array / pair_families(D), array % pair_families(D));
      const int first = static_cast<int>(task % pieces) * kPlanes;
      const int last = std::min(first + kPlanes, depth);
      T* const target = out + array * depth * plane;
      with_vector_code([&] {
        for (int z = first - radius_z; z < last + radius_z; ++z) {
          for (int y = -radius; y < rows + radius; ++y) {
            view.row(-around.margin[0] - radius, columns + 2 * radius, y - around.margin[1],
                     z - around.margin[2], line);
            sum_runs(line, radius, 1, columns,
                     along + (y + radius) * static_cast<int64_t>(columns));
          }
          const int slot = (z - first + radius_z) % waiting;
          sum_runs(along, radius, columns, plane, planes + slot * plane);
          const int done = z - radius_z;
          if (done < first) continue;
          T* __restrict__ const result = target + done * plane;
          for (int j = 0; j < waiting; ++j) {
            const T* const sums = planes + (slot + 1 + j) % waiting * plane;
            const T factor = j == waiting - 1 ? scale : T(1);
            if (j == 0) {
              for (int64_t i = 0; i < plane; ++i) result[i] = sums[i] * factor;
            } else {
              for (int64_t i = 0; i < plane; ++i) result[i] = (result[i] + sums[i]) * factor;
            }
          }
        }
      });
    }
  });
}

void mind_ssc_cpu(const Context& context, const Call& call) { mind_ssc(Cpu(context), call); }
void mind_ssc_grad_cpu(const Context& context, const Call& call) {
  mind_ssc_grad(Cpu(context), call);
}
void mind_ssc_variances_cpu(const Context& context, const Call& call) {
  mind_ssc_variances(Cpu(context), call);
}
void mind_ssc_of_variance_cpu(const Context& context, const Call& call) {
  mind_ssc_of_variance(Cpu(context), call);
}

}  // namespace regkernels

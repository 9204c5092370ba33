#include <algorithm>

#include "core/dispatch.h"
#include "core/scratch.h"
#include "core/thread_pool.h"
#include "core/vector_code.h"
#include "ops/spline_coefficients/call.h"
#include "ops/spline_coefficients/spline_coefficients.h"

namespace regkernels {

namespace {

// Solves for `width` lines side by side, in place; from one element of a line to the next it is
// `step`.
template <class T>
void solve_lines(const SplinePass& pass, const T (&pivot)[kPivots], T last_pivot, int64_t width,
                 int64_t step, T* data) {
  const int64_t n = pass.size;
  const auto pivot_of = [&](int64_t k) {
    return k == n - 1 ? last_pivot : pivot[std::min<int64_t>(k, kPivots - 1)];
  };
  for (int64_t k = 0; k < n; ++k) {
    T* const row = data + k * step;
    const T scale = pivot_of(k);
    if (k == 0) {
      for (int64_t e = 0; e < width; ++e) row[e] = 6 * row[e] * scale;
    } else {
      const T* const previous = row - step;
      const T before = static_cast<T>(pass.system.before(k, n));
      for (int64_t e = 0; e < width; ++e) row[e] = (6 * row[e] - before * previous[e]) * scale;
    }
  }
  for (int64_t k = n - 2; k >= 0; --k) {
    T* const row = data + k * step;
    const T* const next = row + step;
    const T factor = static_cast<T>(pass.system.behind(k, n)) * pivot_of(k);
    for (int64_t e = 0; e < width; ++e) row[e] -= factor * next[e];
  }
}

// Solves along one axis. Lines that are contiguous, or nearly so, are taken out to lie side by
// side.
template <class T>
void solve_axis(const SplinePass& pass, const T* in, T* out) {
  T pivot[kPivots];
  pass.find_pivots(pivot);
  const T last_pivot = pass.last_pivot(pivot);
  constexpr int64_t kBuffer = 16384;  // elements, for the second-level cache
  const int64_t wanted = std::clamp<int64_t>(kBuffer / pass.size, 16, 1024);
  const int64_t lines = pass.outer * pass.stride;
  const int64_t pieces_of_slab = (pass.stride + wanted - 1) / wanted;
  const bool side_by_side = pass.stride >= 16;
  const int64_t tasks = side_by_side ? pass.outer * pieces_of_slab : (lines + wanted - 1) / wanted;
  const int64_t grain = std::max<int64_t>(1, 4096 / (wanted * pass.size));
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* const buffer = scratch.take<T>(wanted * pass.size);
    // Where a line begins.
    const auto start_of = [&](int64_t line) {
      return line / pass.stride * pass.size * pass.stride + line % pass.stride;
    };
    with_vector_code([&] {
      for (int64_t task = begin; task < end; ++task) {
        if (side_by_side) {
          const int64_t first = task % pieces_of_slab * wanted;
          const int64_t width = std::min(wanted, pass.stride - first);
          const int64_t start = task / pieces_of_slab * pass.size * pass.stride + first;
          if (in != out) {
            for (int64_t k = 0; k < pass.size; ++k) {
              const int64_t row = start + k * pass.stride;
              std::copy_n(in + row, width, out + row);
            }
          }
          solve_lines(pass, pivot, last_pivot, width, pass.stride, out + start);
        } else {
          const int64_t first = task * wanted, width = std::min(wanted, lines - first);
          for (int64_t e = 0; e < width; ++e) {
            const T* const line = in + start_of(first + e);
            for (int64_t k = 0; k < pass.size; ++k) buffer[k * width + e] = line[k * pass.stride];
          }
          solve_lines(pass, pivot, last_pivot, width, width, buffer);
          for (int64_t e = 0; e < width; ++e) {
            T* const line = out + start_of(first + e);
            for (int64_t k = 0; k < pass.size; ++k) line[k * pass.stride] = buffer[k * width + e];
          }
        }
      }
    });
  });
}

void solve(const Call& call, const char* input, const char* output) {
  const auto& checked = call.checked<SplineCall>();
  if (checked.count == 0) return;
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = call.input(input).template as<const T>();
    T* const out = call.output(output).template as<T>();
    for (const SplinePass& pass : checked.passes) {
      solve_axis(pass, in, out);
      in = out;
    }
  });
}

}  // namespace

void spline_coefficients_cpu(const Context&, const Call& call) { solve(call, "image", "output"); }
void spline_coefficients_grad_cpu(const Context&, const Call& call) {
  solve(call, "grad_output", "grad_image");
}

}  // namespace regkernels

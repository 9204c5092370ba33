#include <algorithm>

#include "core/dispatch.h"
#include "core/for_each.h"
#include "ops/spline_coefficients/call.h"
#include "ops/spline_coefficients/spline_coefficients.h"

namespace regkernels {

namespace {

// The pivots of a pass, in shared memory.
template <class T>
struct SharedPivots {
  T pivot[kPivots];
  T last;

  // To be called by all threads of a block.
  __device__ void find(const SplinePass& pass) {
    if (threadIdx.x == 0 && threadIdx.y == 0) {
      pass.find_pivots(pivot);
      last = pass.last_pivot(pivot);
    }
    __syncthreads();
  }
  __device__ __forceinline__ T operator()(int64_t k, int64_t n) const {
    return k == n - 1 ? last : pivot[k < kPivots ? k : kPivots - 1];
  }
};

// One element of the way forwards, and of the way back, from the one before.
template <class T>
__device__ __forceinline__ T forwards(const SplinePass& pass, const SharedPivots<T>& pivots,
                                      int64_t k, T value, T previous) {
  const T eliminated = k == 0 ? T(0) : static_cast<T>(pass.system.before(k, pass.size)) * previous;
  return (6 * value - eliminated) * pivots(k, pass.size);
}
template <class T>
__device__ __forceinline__ T backwards(const SplinePass& pass, const SharedPivots<T>& pivots,
                                       int64_t k, T value, T next) {
  if (k == pass.size - 1) return value;
  return value - static_cast<T>(pass.system.behind(k, pass.size)) * pivots(k, pass.size) * next;
}

inline constexpr int kLineThreads = 64;
inline constexpr int kAhead = 8;  // elements of a line whose loads are under way together

// A thread solves for one line; its neighbours' lines lie beside it.
template <class T>
__global__ void __launch_bounds__(kLineThreads)
    solve_lines_kernel(const __grid_constant__ SplinePass pass, const T* in, T* out) {
  __shared__ SharedPivots<T> pivots;
  pivots.find(pass);
  const int64_t n = pass.size, stride = pass.stride, lines = pass.outer * stride;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kLineThreads;
  for (int64_t line = static_cast<int64_t>(blockIdx.x) * kLineThreads + threadIdx.x; line < lines;
       line += all) {
    const int64_t slab = line / stride;
    const int64_t start = slab * n * stride + (line - slab * stride);
    T last = 0, value[kAhead];
    for (int64_t begin = 0; begin < n; begin += kAhead) {
      REGKERNELS_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t k = begin + i;
        value[i] = k < n ? in[start + k * stride] : T(0);
      }
      REGKERNELS_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t k = begin + i;
        if (k >= n) break;
        last = forwards(pass, pivots, k, value[i], last);
        out[start + k * stride] = last;
      }
    }
    for (int64_t end = n; end > 0; end -= kAhead) {
      REGKERNELS_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t k = end - 1 - i;
        value[i] = k >= 0 ? out[start + k * stride] : T(0);
      }
      REGKERNELS_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t k = end - 1 - i;
        if (k < 0) break;
        last = backwards(pass, pivots, k, value[i], last);
        out[start + k * stride] = last;
      }
    }
  }
}

// The same for lines whose elements lie side by side, or nearly so: a warp solves for as many lines
// as it has lanes, and goes through them in tiles that it turns in shared memory.
template <class T>
__global__ void __launch_bounds__(kWarp)
    solve_rows_kernel(const __grid_constant__ SplinePass pass, const T* in, T* out) {
  __shared__ SharedPivots<T> pivots;
  __shared__ T tile[kWarp][kWarp + 1];
  pivots.find(pass);
  const int64_t n = pass.size, stride = pass.stride, lines = pass.outer * stride;
  const int lane = threadIdx.x;
  const auto start_of = [&](int64_t line) {
    const int64_t slab = line / stride;
    return slab * n * stride + (line - slab * stride);
  };
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp; first < lines;
       first += static_cast<int64_t>(gridDim.x) * kWarp) {
    const int count = static_cast<int>(lines - first < kWarp ? lines - first : kWarp);
    T last = 0;
    const auto through_tile = [&](const T* from, int64_t begin, const auto& solve) {
      const int64_t k = begin + lane;
      REGKERNELS_UNROLL
      for (int row = 0; row < kWarp; ++row) {
        const bool there = row < count && k < n;
        tile[row][lane] = there ? from[start_of(first + row) + k * stride] : T(0);
      }
      __syncwarp();
      solve(tile[lane], static_cast<int>(n - begin < kWarp ? n - begin : kWarp));
      __syncwarp();
      for (int row = 0; row < count; ++row) {
        if (k < n) out[start_of(first + row) + k * stride] = tile[row][lane];
      }
      __syncwarp();
    };
    for (int64_t begin = 0; begin < n; begin += kWarp) {
      through_tile(in, begin, [&](T* values, int size) {
        for (int i = 0; i < size; ++i) {
          values[i] = last = forwards(pass, pivots, begin + i, values[i], last);
        }
      });
    }
    for (int64_t begin = (n - 1) / kWarp * kWarp; begin >= 0; begin -= kWarp) {
      through_tile(out, begin, [&](T* values, int size) {
        for (int i = size - 1; i >= 0; --i) {
          values[i] = last = backwards(pass, pivots, begin + i, values[i], last);
        }
      });
    }
  }
}

template <class T>
void solve_axis(const Cuda& device, const SplinePass& pass, const T* in, T* out) {
  const int64_t lines = pass.outer * pass.stride;
  const bool side_by_side = pass.stride >= kWarp;
  const int threads = side_by_side ? kLineThreads : kWarp;
  const int64_t blocks = std::min<int64_t>((lines + threads - 1) / threads, 1 << 20);
  if (side_by_side) {
    solve_lines_kernel<<<static_cast<unsigned>(blocks), threads, 0, device.stream>>>(pass, in, out);
  } else {
    solve_rows_kernel<<<static_cast<unsigned>(blocks), threads, 0, device.stream>>>(pass, in, out);
  }
  check_launch();
}

void solve(const Cuda& device, const Call& call, const char* input, const char* output) {
  const auto& checked = call.checked<SplineCall>();
  if (checked.count == 0) return;
  dispatch_dtype(checked.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = call.input(input).template as<const T>();
    T* const out = call.output(output).template as<T>();
    for (const SplinePass& pass : checked.passes) {
      solve_axis(device, pass, in, out);
      in = out;
    }
  });
}

}  // namespace

void spline_coefficients_cuda(const Context& context, const Call& call) {
  solve(Cuda(context), call, "image", "output");
}
void spline_coefficients_grad_cuda(const Context& context, const Call& call) {
  solve(Cuda(context), call, "grad_output", "grad_image");
}

}  // namespace regkernels

// Parallel loops for the CPU. The pool is our own, because waiting on a framework's pool from one
// of its own threads can deadlock; the calling thread takes part in the work, so a loop makes
// progress even when every worker is busy or could not be started.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace regkernels {

// Number of threads a loop may use: the environment variable REGKERNELS_NUM_THREADS, else the CPUs
// that this process may run on.
int num_threads();

namespace detail {
void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* state);
}

// Calls body(begin, end) over pieces of [0, count), each at least `grain` long except the last.
// Which thread runs which piece is not defined: bodies must not depend on it.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  detail::parallel_for(
      count, grain,
      [](void* state, int64_t begin, int64_t end) { (*static_cast<Plain*>(state))(begin, end); },
      const_cast<std::remove_const_t<Plain>*>(std::addressof(body)));
}

}  // namespace regkernels

// Loops on the CPU, compiled for newer instruction sets as well.
//
//   with_vector_code([&] { ... });
//
// calls the body, and returns what it does, in the version for the newest set that this CPU has.
// All versions compute the same bits. Everything that the body calls becomes part of each version.
#pragma once

namespace regkernels {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

namespace detail {

template <class Body>
__attribute__((target("avx512f"), flatten, noinline)) auto run_with_avx512(const Body& body) {
  return body();
}

template <class Body>
__attribute__((target("avx2"), flatten, noinline)) auto run_with_avx2(const Body& body) {
  return body();
}

template <class Body>
__attribute__((flatten, noinline)) auto run_with_least(const Body& body) {
  return body();
}

}  // namespace detail

template <class Body>
auto with_vector_code(const Body& body) {
  if (__builtin_cpu_supports("avx512f")) return detail::run_with_avx512(body);
  if (__builtin_cpu_supports("avx2")) return detail::run_with_avx2(body);
  return detail::run_with_least(body);
}

#else

template <class Body>
auto with_vector_code(const Body& body) {
  return body();
}

#endif

}  // namespace regkernels

#include <algorithm>

#include "core/scratch.h"
#include "core/thread_pool.h"
#include "ops/compose/kernels.h"

namespace regkernels {

namespace {

// Makes a call whose `v` is not where the output is: neighbouring voxels are computed together,
// some of them twice, and so after their result may have been written.
template <class Body>
void with_separate_field(const Call& call, const Body& body) {
  const Tensor& v = call.input("v");
  if (v.data == nullptr || v.data != call.output("output").data) return body(call);
  const int64_t size = v.shape.count() * (v.dtype == DType::kFloat64 ? 8 : 4);
  Scratch scratch;
  char* const copy = scratch.take<char>(size);
  const char* const from = v.as<const char>();
  parallel_for(size, int64_t{1} << 18, [&](int64_t begin, int64_t end) {
    std::copy(from + begin, from + end, copy + begin);
  });
  Call separate = call;
  for (Tensor& input : separate.inputs) {
    if (input.data == v.data) input.data = copy;
  }
  body(separate);
}

}  // namespace

void compose_cpu(const Context& context, const Call& call) {
  with_separate_field(call, [&](const Call& separate) {
    if (is_cubic(composition_mode(call))) return compose_cubic_cpu(context, separate);
    compose<false>(Cpu(context), separate);
  });
}
void compose_grad_cpu(const Context& context, const Call& call) {
  if (is_cubic(composition_mode(call))) return compose_cubic_grad_cpu(context, call);
  compose_grad<false>(Cpu(context), call);
}

}  // namespace regkernels

#include <string>
#include <vector>

#include "core/check.h"
#include "ops/coverage/call.h"
#include "ops/coverage/coverage.h"
#include "ops/table.h"

namespace regkernels {

namespace {

std::string listed(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

// The sizes that an attribute has for D axes; `least` is the smallest that is one.
Sizes check_shape(const Call& call, const char* name, int dimensions, int64_t least) {
  const std::vector<int64_t>& shape = call.integers(name);
  const size_t count = shape.size();
  if (count < static_cast<size_t>(dimensions)) {
    fail_value(call, name, concat("at least ", dimensions, " sizes"), listed(shape));
  }
  Sizes sizes;
  sizes.x = shape[count - 1];
  sizes.y = shape[count - 2];
  if (dimensions == 3) sizes.z = shape[count - 3];
  if (sizes.x < least || sizes.y < least || sizes.z < least) {
    fail_value(call, name, concat("spatial sizes of at least ", least), listed(shape));
  }
  check_sizes(call, name, sizes);
  return sizes;
}

void infer(Call& call) {
  const Tensor &affine = call.input("affine"), &displacement = call.input("displacement");
  const Tensor &margin = call.input("margin"), &reach = call.input("reach");
  CoverageCall checked;
  checked.dtype = check_dtypes(call);
  const std::vector<int64_t>& source_shape = call.integers("source_shape");
  if (source_shape.size() != 2 && source_shape.size() != 3) {
    fail_value(call, "source_shape", "2 or 3 sizes", listed(source_shape));
  }
  const int D = checked.dimensions = static_cast<int>(source_shape.size());
  checked.source_sizes = checked.sizes = check_shape(call, "source_shape", D, 1);
  // It is they that say where the result is to be, and in which dtype.
  if (!affine.present && !displacement.present && !margin.present) {
    fail_type(call, "affine", "an array where neither displacement nor margin is one", "None");
  }
  if (affine.present) check_affine(call, "affine", D);
  if (displacement.present) {
    if (check_field(call, "displacement", EmptyField::kAllowed) != D) {
      fail_shape(call, "displacement",
                 concat(D == 3 ? "(N, Z, Y, X, 3)" : "(N, Y, X, 2)", ", as source_shape has ", D,
                        " sizes"));
    }
    checked.sizes = field_sizes(displacement);
  }
  if (!call.integers("out_shape").empty()) {
    const Sizes sizes = check_shape(call, "out_shape", D, 0);
    if (displacement.present && !(sizes == checked.sizes)) {
      fail_value(call, "out_shape", "the spatial sizes of displacement",
                 listed(call.integers("out_shape")));
    }
    checked.sizes = sizes;
  }
  if (margin.present && (margin.shape.rank() != 3 || margin.shape[2] != D)) {
    fail_shape(call, "margin", concat("(N, ", D, "): a number for each axis"));
  }
  if (reach.present && reach.shape.rank() != 2) {
    fail_shape(call, "reach", "(N,): a number for each item");
  }
  checked.batch = check_batch(call);
  Shape output = {checked.batch.groups, checked.batch.items, 1};
  append_sizes(output, checked.sizes, D);
  call.set("output", tensor_spec(checked.dtype, output));
  call.keep(checked);
}

}  // namespace

std::vector<Op> coverage_ops() {
  return {
      {"coverage",
       nullptr,
       {{"affine", true}, {"displacement", true}, {"margin", true}, {"reach", true}},
       {{"output"}},
       {{"source_shape", AttrKind::kInts}, {"out_shape", AttrKind::kInts}},
       infer,
       coverage_cpu,
       REGKERNELS_CUDA_LAUNCH(coverage_cuda),
       true},
  };
}

}  // namespace regkernels

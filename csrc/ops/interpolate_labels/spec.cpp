#include <limits>

#include "core/dispatch.h"
#include "ops/interpolate/call.h"
#include "ops/interpolate_labels/interpolate_labels.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// An attribute has 64 bits and a sign. The upper half of what a uint64 can hold is out of its
// reach.
void check_background(const Call& call) {
  const DType dtype = call.input("labels").dtype;
  dispatch_integer(dtype, [&](auto type) {
    using Limits = std::numeric_limits<typename decltype(type)::type>;
    constexpr uint64_t kLargest = static_cast<uint64_t>(Limits::max());
    const int64_t background = call.integer("background");
    const bool fits = background < 0 ? background >= static_cast<int64_t>(Limits::min())
                                     : static_cast<uint64_t>(background) <= kLargest;
    if (!fits) {
      fail_value(call, "background", concat("a label that ", dtype_name(dtype), " can hold"),
                 std::to_string(background));
    }
  });
}

void infer(Call& call) {
  const auto& checked = call.keep(check_interpolate(call, "labels"));
  check_background(call);
  call.set("output", tensor_spec(checked.storage, checked.output));
  if (call.wants("weight")) call.set("weight", tensor_spec(DType::kFloat32, checked.output));
}

}  // namespace

std::vector<Op> interpolate_labels_ops() {
  return {
      {"interpolate_labels",
       nullptr,
       {{"labels", false, InputKind::kLabels}, {"affine", true}, {"grid", true}},
       {{"output"}, {"weight"}},
       {{"affine_last", AttrKind::kBool},
        {"is_displacement", AttrKind::kBool},
        {"out_shape", AttrKind::kInts},
        {"padding_mode", AttrKind::kChoice, {"zeros", "border", "reflection"}},
        {"align_corners", AttrKind::kBool},
        {"background", AttrKind::kInt},
        {"grid_unit", AttrKind::kChoice, {"normalised", "voxel"}},
        {"grid_channels", AttrKind::kChoice, {"last", "first"}},
        {"grid_components", AttrKind::kChoice, {"xyz", "zyx"}}},
       infer,
       interpolate_labels_cpu,
       REGKERNELS_CUDA_LAUNCH(interpolate_labels_cuda),
       true},
  };
}

}  // namespace regkernels

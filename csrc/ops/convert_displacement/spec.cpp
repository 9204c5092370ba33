#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "maths/coordinates.h"
#include "ops/convert_displacement/call.h"
#include "ops/convert_displacement/convert_displacement.h"
#include "ops/table.h"

namespace regkernels {

namespace {

using Unit = LengthUnit;

double voxels_per_unit(Unit unit, int64_t size, double spacing, bool align_corners) {
  if (unit == Unit::kVoxel) return 1;
  if (unit == Unit::kMillimetre) return 1 / spacing;
  // An axis without voxels has no extent, and nothing that a factor would meet.
  return voxels_per_normalised(std::max<int64_t>(size, 1), align_corners);
}

FieldFormat format_of(const Call& call, const char* channels, const char* components) {
  return {call.choice<ComponentPlace>(channels) == ComponentPlace::kFirst,
          call.choice<ComponentOrder>(components) == ComponentOrder::kZyx};
}

// The adjoint has the same factors as the op itself, with source and target swapped in layout.
ConvertDisplacementCall check(const Call& call, const char* input, bool is_adjoint) {
  ConvertDisplacementCall checked;
  checked.dtype = check_dtypes(call);
  checked.source = format_of(call, "source_channels", "source_components");
  checked.target = format_of(call, "target_channels", "target_components");
  if (is_adjoint) std::swap(checked.source, checked.target);
  const bool first = checked.source.channels_first;
  const int D = checked.dimensions = check_field(call, input, EmptyField::kAllowed, first);
  checked.sizes = first ? image_sizes(call.input(input)) : field_sizes(call.input(input));
  int64_t size[3] = {checked.sizes.x, checked.sizes.y, checked.sizes.z};
  if (call.slab.present()) size[D - 1] = call.slab.planes;
  checked.batch = check_batch(call);

  const Unit source = call.choice<Unit>("source"), target = call.choice<Unit>("target");
  const std::vector<double>& spacing = call.numbers("spacing");
  if (spacing.empty() && (source == Unit::kMillimetre) != (target == Unit::kMillimetre)) {
    fail_value(call, "spacing", "mm per voxel, as a unit is 'mm'", "None");
  }
  if (!spacing.empty() && spacing.size() != static_cast<size_t>(D)) {
    fail_value(call, "spacing", concat(D, " numbers, in x, y, z order"),
               concat(spacing.size(), " of them"));
  }
  for (double value : spacing) {
    if (!std::isfinite(value) || value <= 0) {
      fail_value(call, "spacing", "finite numbers above 0", concat(value));
    }
  }
  const bool align_corners = call.flag("align_corners");
  for (int k = 0; k < D; ++k) {
    const double mm = spacing.empty() ? 1 : spacing[k];
    checked.factor[k] = source == target ? 1
                                         : voxels_per_unit(source, size[k], mm, align_corners) /
                                               voxels_per_unit(target, size[k], mm, align_corners);
    const bool wide = checked.dtype == DType::kFloat64;
    const double largest =
        wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
    if (!(checked.factor[k] <= largest && checked.factor[k] >= 1 / largest)) {
      fail_value(call, "spacing",
                 concat("numbers that keep factors in the range of ", dtype_name(checked.dtype)),
                 concat(mm));
    }
  }
  return checked;
}

void infer_converted(Call& call, const char* input, const char* output, bool is_adjoint) {
  const auto& checked = call.keep(check(call, input, is_adjoint));
  Shape shape = {checked.batch.groups, checked.batch.items};
  if (checked.target.channels_first) shape.append(checked.dimensions);
  append_sizes(shape, checked.sizes, checked.dimensions);
  if (!checked.target.channels_first) shape.append(checked.dimensions);
  call.set(output, tensor_spec(checked.dtype, shape));
}

void infer(Call& call) { infer_converted(call, "displacement", "output", false); }
void infer_grad(Call& call) { infer_converted(call, "grad_output", "grad_displacement", true); }

}  // namespace

std::vector<Op> convert_displacement_ops() {
  const std::vector<AttrSpec> attributes = {
      {"source", AttrKind::kChoice, {"normalised", "voxel", "mm"}},
      {"target", AttrKind::kChoice, {"normalised", "voxel", "mm"}},
      {"spacing", AttrKind::kFloats},
      {"align_corners", AttrKind::kBool},
      {"source_channels", AttrKind::kChoice, {"last", "first"}},
      {"target_channels", AttrKind::kChoice, {"last", "first"}},
      {"source_components", AttrKind::kChoice, {"xyz", "zyx"}},
      {"target_components", AttrKind::kChoice, {"xyz", "zyx"}},
  };
  return {
      {"convert_displacement",
       "convert_displacement_grad",
       {{"displacement"}},
       {{"output"}},
       attributes,
       infer,
       convert_displacement_cpu,
       REGKERNELS_CUDA_LAUNCH(convert_displacement_cuda),
       true},
      {"convert_displacement_grad",
       nullptr,
       {{"grad_output"}},
       {{"grad_displacement"}},
       attributes,
       infer_grad,
       convert_displacement_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(convert_displacement_grad_cuda),
       true},
  };
}

}  // namespace regkernels

#include <algorithm>
#include <cmath>
#include <limits>

#include "maths/coordinates.h"
#include "ops/convert_displacement/call.h"
#include "ops/convert_displacement/convert_displacement.h"
#include "ops/table.h"

namespace regkernels {

namespace {

enum Unit { kNormalised, kVoxel, kMillimetre };
enum Channels { kLast, kFirst };

double voxels_per_unit(Unit unit, int64_t size, double spacing, bool align_corners) {
  if (unit == kVoxel) return 1;
  if (unit == kMillimetre) return 1 / spacing;
  // An axis of one voxel has no extent with align_corners: the scale of two voxels keeps the
  // conversion invertible, and displacements along it have no effect anyway.
  return half_extent(align_corners ? std::max<int64_t>(size, 2) : size, align_corners);
}

// The adjoint has the same factors as the op itself, with source and target swapped in layout.
ConvertDisplacementCall check(const Call& call, const char* input, bool is_adjoint) {
  ConvertDisplacementCall checked;
  checked.dtype = check_dtypes(call);
  const bool last_in = call.choice<Channels>("source_channels") == kLast;
  const bool last_out = call.choice<Channels>("target_channels") == kLast;
  checked.source_last = is_adjoint ? last_out : last_in;
  checked.target_last = is_adjoint ? last_in : last_out;
  const Shape& shape = call.input(input).shape;
  const int D = checked.dimensions = shape.rank() - 3;
  const bool last = checked.source_last;
  if ((D != 2 && D != 3) || shape[last ? shape.rank() - 1 : 2] != D) {
    fail_shape(call, input,
               last ? "(N, Y, X, 2) or (N, Z, Y, X, 3)" : "(N, 2, Y, X) or (N, 3, Z, Y, X)");
  }
  checked.sizes = last ? field_sizes(call.input(input)) : image_sizes(call.input(input));
  const int64_t size[3] = {checked.sizes.x, checked.sizes.y, checked.sizes.z};
  for (int k = 0; k < D; ++k) {
    if (size[k] < 1) fail_shape(call, input, "with spatial axes of at least 1");
  }
  check_sizes(call, input, checked.sizes);
  checked.batch = check_batch(call);

  const Unit source = call.choice<Unit>("source"), target = call.choice<Unit>("target");
  const std::vector<double>& spacing = call.numbers("spacing");
  if (spacing.empty() && (source == kMillimetre) != (target == kMillimetre)) {
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
  if (!checked.target_last) shape.append(checked.dimensions);
  append_sizes(shape, checked.sizes, checked.dimensions);
  if (checked.target_last) shape.append(checked.dimensions);
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
  };
  return {
      {"convert_displacement",
       "convert_displacement_grad",
       {{"displacement"}},
       {{"output"}},
       attributes,
       infer,
       convert_displacement_cpu,
       REGKERNELS_CUDA_LAUNCH(convert_displacement_cuda)},
      {"convert_displacement_grad",
       nullptr,
       {{"grad_output"}},
       {{"grad_displacement"}},
       attributes,
       infer_grad,
       convert_displacement_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(convert_displacement_grad_cuda)},
  };
}

}  // namespace regkernels

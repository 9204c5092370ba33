#include "ops/field_energy/call.h"
#include "ops/field_energy/field_energy.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// Squares of these, and their products with the squares of a displacement in voxels, are far from
// the ends of float32.
constexpr double kLeastSpacing = 1e-6, kMostSpacing = 1e6, kMostFactor = 1e9;

double factor(const Call& call, const char* name) {
  const double value = call.number(name);
  if (!(value >= 0 && value <= kMostFactor)) {
    fail_value(call, name, concat("a number from 0 to ", kMostFactor), concat(value));
  }
  return value;
}

const FieldEnergyCall& check(Call& call, bool is_gradient) {
  FieldEnergyCall checked;
  checked.is_gradient = is_gradient;
  checked.dtype = check_dtypes(call);
  const int D = checked.dimensions = check_field(call, "displacement");
  checked.sizes = field_sizes(call.input("displacement"));
  checked.planes = checked.sizes.z;
  if (call.slab.present()) {
    checked.sizes.z -= 2 * kEnergyHalo;
    checked.planes = call.slab.planes;
    checked.gradient_has_halo = call.slab.answering > 0;
  }
  checked.kind = call.choice<EnergyKind>("kind");
  checked.reduction = call.choice<Reduction>("reduction");
  const std::vector<double>& spacing = call.numbers("spacing");
  if (!spacing.empty() && spacing.size() != static_cast<size_t>(D)) {
    fail_value(call, "spacing", concat(D, " numbers, in x, y, z order"),
               concat(spacing.size(), " of them"));
  }
  checked.spacing = {1, 1, 1};
  for (size_t k = 0; k < spacing.size(); ++k) {
    if (!(spacing[k] >= kLeastSpacing && spacing[k] <= kMostSpacing)) {
      fail_value(call, "spacing", concat("numbers from ", kLeastSpacing, " to ", kMostSpacing),
                 concat(spacing[k]));
    }
    checked.spacing[k] = spacing[k];
  }
  checked.mu = factor(call, "mu");
  checked.lam = factor(call, "lam");
  checked.weight = factor(call, "weight");
  checked.batch = check_batch(call);
  const int64_t row = checked.sizes.x * (by_component(checked.kind) ? D : 1);
  checked.planes_of_part = energy_planes(checked.sizes, row);
  checked.parts = energy_parts(checked.sizes, row, checked.planes_of_part);
  checked.output = {checked.batch.groups};
  if (checked.reduction == Reduction::kNone) checked.output.append(checked.batch.items);
  return call.keep(checked);
}

Tensor own_gradient_spec(const Call& call, const FieldEnergyCall& checked) {
  Tensor gradient = gradient_spec(call.input("displacement"), checked.batch);
  if (call.slab.present() && !checked.gradient_has_halo) gradient.shape[2] = checked.sizes.z;
  return gradient;
}

// The gradient of a single number comes with it.
void infer(Call& call) {
  const auto& checked = check(call, false);
  const Batch& batch = checked.batch;
  call.set("output", tensor_spec(checked.dtype, checked.output));
  call.set("partial_sums", tensor_spec(checked.dtype, {batch.groups, batch.items, checked.parts}));
  if (checked.reduction != Reduction::kNone && call.wants("grad_displacement")) {
    call.set("grad_displacement", own_gradient_spec(call, checked));
  }
}

void infer_grad(Call& call) {
  const auto& checked = check(call, true);
  if (checked.reduction != Reduction::kNone) {
    fail_value(call, "reduction", "'none': a single number's gradient comes with it", "another");
  }
  check_cotangent(call, "grad_output", checked.dtype, checked.output);
  call.set("grad_displacement", own_gradient_spec(call, checked));
}

}  // namespace

std::vector<Op> field_energy_ops() {
  const std::vector<AttrSpec> attributes = {
      {"kind",
       AttrKind::kChoice,
       {"diffusion", "bending", "curvature", "elasticity", "divergence", "jacobian"}},
      {"spacing", AttrKind::kFloats},  // none: displacements and steps are in voxels
      {"mu", AttrKind::kFloat},        // of elasticity, as is the next
      {"lam", AttrKind::kFloat},
      {"weight", AttrKind::kFloat},  // here, so that nobody has to multiply a gradient by it
      {"align_corners", AttrKind::kBool},
      {"reduction", AttrKind::kChoice, {"mean", "sum", "none"}},
  };
  const InputSpec displacement = {"displacement", false, InputKind::kCompared};
  return {
      {"field_energy",
       "field_energy_grad",
       {displacement},
       {{"output"},
        {"grad_displacement", OutputRole::kUnitGradient},
        {"partial_sums", OutputRole::kWorkspace}},
       attributes,
       infer,
       field_energy_cpu,
       REGKERNELS_CUDA_LAUNCH(field_energy_cuda),
       true},
      {"field_energy_grad",
       nullptr,
       {displacement, {"grad_output", false, InputKind::kCompared}},
       {{"grad_displacement"}},
       attributes,
       infer_grad,
       field_energy_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(field_energy_grad_cuda),
       true},
  };
}

}  // namespace regkernels

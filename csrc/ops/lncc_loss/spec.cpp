#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/lncc_loss/call.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/table.h"

namespace regkernels {

namespace {

LnccCall check(const Call& call) {
  LnccCall checked;
  checked.dtype = check_dtypes(call);
  checked.dimensions = check_compared(call);
  const Tensor& pred = call.input("pred");
  checked.sizes = image_sizes(pred);
  checked.channels = pred.shape[2];
  checked.reduction = call.choice<Reduction>("reduction");

  const int64_t kernel_size = call.integer("kernel_size");
  if (kernel_size < 3 || kernel_size > kMaxWindow || kernel_size % 2 == 0) {
    fail_value(call, "kernel_size", concat("an odd number from 3 to ", kMaxWindow),
               concat(kernel_size));
  }
  checked.kernel_size = static_cast<int>(kernel_size);
  const std::vector<double>& sigma = call.numbers("sigma");
  if (sigma.size() > 1) fail_value(call, "sigma", "one number", concat(sigma.size(), " numbers"));
  for (const double value : sigma) {
    if (!std::isfinite(value) || value <= 0) {
      fail_value(call, "sigma", "a finite number above 0", concat(value));
    }
  }
  const double smooth_nr = call.number("smooth_nr");
  if (!std::isfinite(smooth_nr) || smooth_nr < 0) {
    fail_value(call, "smooth_nr", "a finite number of at least 0", concat(smooth_nr));
  }
  // The reciprocal of smooth_dr, and that of a constant window's two variances, must be finite.
  const double smooth_dr = call.number("smooth_dr");
  if (!std::isfinite(smooth_dr) || smooth_dr < 1e-18) {
    fail_value(call, "smooth_dr", "a finite number of at least 1e-18", concat(smooth_dr));
  }

  const double common_variance = call.number("common_variance");
  if (!std::isfinite(common_variance) || common_variance < 0) {
    fail_value(call, "common_variance", "a finite number of at least 0", concat(common_variance));
  }

  const std::vector<double>& both_flat = call.numbers("both_flat");
  if (both_flat.size() > 1) {
    fail_value(call, "both_flat", "one number", concat(both_flat.size(), " numbers"));
  }
  for (const double value : both_flat) {
    if (!std::isfinite(value) || value < 0 || value > 1) {
      fail_value(call, "both_flat", "a number from 0 to 1", concat(value));
    }
  }

  checked.batch = check_batch(call);
  checked.map = {checked.batch.groups, checked.batch.items, checked.channels};
  append_sizes(checked.map, checked.sizes, checked.dimensions);
  checked.fused = checked.dtype == DType::kFloat32 && checked.kernel_size <= kLnccMaxFused &&
                  checked.sizes.x * checked.sizes.y < int64_t{1} << 31;
  return checked;
}

}  // namespace

template <class T>
Window<T> lncc_window(const Call& call, const LnccCall& checked) {
  enum class Weights { kRectangular, kGaussian };
  const bool gaussian = call.choice<Weights>("window") == Weights::kGaussian;
  const std::vector<double>& given = call.numbers("sigma");
  const double sigma = given.empty() ? checked.kernel_size / 3.0 : given[0];
  Window<T> window{};
  window.rectangular = !gaussian;
  window.radius = checked.kernel_size / 2;
  window.radius_z = checked.dimensions == 3 ? window.radius : 0;
  double sum = 0;
  for (int d = 0; d <= window.radius; ++d) {
    const double weight = gaussian ? std::exp(-0.5 * (d / sigma) * (d / sigma)) : 1.0;
    // A weight of 0 would make NaN of a sum beyond the range of T.
    window.weight[d] = std::max(static_cast<T>(weight), std::numeric_limits<T>::min());
    sum += (d == 0 ? 1 : 2) * static_cast<double>(window.weight[d]);
  }
  const double mass = std::pow(sum, checked.dimensions);
  window.inverse_mass = static_cast<T>(1 / mass);
  const auto filled = [&](int64_t size) {
    return std::min(1.0, static_cast<double>(size) / checked.kernel_size);
  };
  window.coverage = static_cast<T>(filled(checked.sizes.x) * filled(checked.sizes.y) *
                                   (checked.dimensions == 3 ? filled(checked.sizes.z) : 1.0));
  window.largest_pivot = std::numeric_limits<T>::max() * (std::numeric_limits<T>::epsilon() / 8);
  window.smooth_nr = static_cast<T>(call.number("smooth_nr"));
  window.smooth_dr = static_cast<T>(call.number("smooth_dr"));
  window.common = static_cast<T>(mass * call.number("common_variance"));
  const std::vector<double>& both_flat = call.numbers("both_flat");
  window.replaces_flat = !both_flat.empty();
  window.both_flat = both_flat.empty() ? T(0) : static_cast<T>(both_flat[0]);
  window.rounding = static_cast<T>(1.5 * checked.kernel_size * std::numeric_limits<T>::epsilon());
  return window;
}

template Window<float> lncc_window<float>(const Call&, const LnccCall&);
template Window<double> lncc_window<double>(const Call&, const LnccCall&);

namespace {

int infer_gradients(Call& call, const LnccCall& checked) {
  int gradients = 0;
  if (call.wants("grad_pred")) {
    call.set("grad_pred", gradient_spec(call.input("pred"), checked.batch));
    ++gradients;
  }
  if (call.wants("grad_target")) {
    call.set("grad_target", gradient_spec(call.input("target"), checked.batch));
    ++gradients;
  }
  return gradients;
}

// Asks for the adjoint fields, where they do not stay inside the kernel, and for the values that
// they are relative to.
void infer_adjoint(Call& call, const LnccCall& checked, int gradients) {
  if (gradients == 0 || checked.fused) return;
  const Batch& batch = checked.batch;
  call.set("pivots", tensor_spec(checked.dtype, {batch.groups, batch.items, checked.channels, 2}));
  Shape fields = {2 * gradients + 1};
  for (const int64_t size : checked.map) fields.append(size);
  call.set("adjoint", tensor_spec(checked.dtype, fields));
}

void infer(Call& call) {
  const auto& checked = call.keep(check(call));
  const int64_t groups = checked.batch.groups;
  if (checked.reduction == Reduction::kNone) {
    call.set("output", tensor_spec(checked.dtype, checked.map));
    return;
  }
  call.set("output", tensor_spec(checked.dtype, {groups}));
  call.set("partial_sums", tensor_spec(checked.dtype, {groups, kLnccMaxParts}));
  if (checked.reduction == Reduction::kMean && call.input("mask").present) {
    call.set("mask_sum", tensor_spec(checked.dtype, {groups}));
  }
  infer_adjoint(call, checked, infer_gradients(call, checked));
}

void infer_grad(Call& call) {
  const auto& checked = call.keep(check(call));
  if (checked.reduction != Reduction::kNone) {
    fail_value(call, "reduction", "'none': a single number's gradient comes with it", "another");
  }
  check_cotangent(call, "grad_output", checked.dtype, checked.map);
  infer_adjoint(call, checked, infer_gradients(call, checked));
}

}  // namespace

std::vector<Op> lncc_loss_ops() {
  const std::vector<AttrSpec> attributes = {
      {"kernel_size", AttrKind::kInt},
      {"window", AttrKind::kChoice, {"rectangular", "gaussian"}},
      {"sigma", AttrKind::kFloats},  // none: a third of kernel_size
      {"smooth_nr", AttrKind::kFloat},
      {"smooth_dr", AttrKind::kFloat},
      {"common_variance", AttrKind::kFloat},
      {"both_flat", AttrKind::kFloats},  // none: what the formula makes of constant windows
      {"reduction", AttrKind::kChoice, {"mean", "sum", "none"}},
  };
  const std::vector<InputSpec> inputs = {{"pred", false, InputKind::kCompared},
                                         {"target", false, InputKind::kCompared},
                                         {"mask", true, InputKind::kCompared}};
  std::vector<InputSpec> gradient_inputs = inputs;
  gradient_inputs.push_back({"grad_output", false, InputKind::kCompared});
  return {
      {"lncc_loss",
       "lncc_loss_grad",
       inputs,
       {{"output"},
        {"grad_pred", OutputRole::kUnitGradient},
        {"grad_target", OutputRole::kUnitGradient},
        {"partial_sums", OutputRole::kWorkspace},
        {"mask_sum", OutputRole::kWeight},
        {"pivots", OutputRole::kWorkspace},
        {"adjoint", OutputRole::kWorkspace}},
       attributes,
       infer,
       lncc_loss_cpu,
       REGKERNELS_CUDA_LAUNCH(lncc_loss_cuda)},
      {"lncc_loss_grad",
       nullptr,
       gradient_inputs,
       {{"grad_pred"},
        {"grad_target"},
        {"pivots", OutputRole::kWorkspace},
        {"adjoint", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       lncc_loss_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(lncc_loss_grad_cuda)},
  };
}

}  // namespace regkernels

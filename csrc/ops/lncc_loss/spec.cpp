#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "ops/lncc_loss/call.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/lncc_loss/tiles.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// Finds the size of the window along each axis. The sizes are one, or one for each axis in the
// order of the array's axes.
void check_kernel(const Call& call, LnccCall& checked) {
  const std::vector<int64_t>& sizes = call.integers("kernel_size");
  const size_t count = sizes.size(), dimensions = static_cast<size_t>(checked.dimensions);
  std::string got;
  for (const int64_t size : sizes) got += (got.empty() ? "" : ", ") + std::to_string(size);
  if (count != 1 && count != dimensions) {
    fail_value(call, "kernel_size", concat("one number, or one for each of ", dimensions, " axes"),
               concat("(", got, ")"));
  }
  const int64_t least = count == 1 ? 3 : 1;
  int64_t largest = 0;
  for (const int64_t size : sizes) {
    largest = std::max(largest, size);
    if (size < least || size > kMaxWindow || size % 2 == 0) {
      fail_value(call, "kernel_size", concat("an odd number from ", least, " to ", kMaxWindow),
                 concat(size));
    }
  }
  if (largest < 3) fail_value(call, "kernel_size", "3 or more along some axis", got);
  checked.kernel_size = static_cast<int>(largest);
  for (size_t k = 0; k < 3; ++k) {
    const bool exists = k < dimensions;
    const int64_t size = !exists ? 1 : count == 1 ? sizes[0] : sizes[dimensions - 1 - k];
    checked.kernel[k] = static_cast<int>(size);
  }
}

// How far a weight of a window reaches, by MONAI's definition of a triangle: it is what a box makes
// of a box of the same width, which is the largest odd number up to half of the window's and a
// half.
int triangle_width(int kernel_size) {
  const int half = (kernel_size + 1) / 2;
  return half % 2 == 0 ? half - 1 : half;
}

LnccCall check(const Call& call) {
  LnccCall checked;
  checked.dtype = check_dtypes(call);
  checked.dimensions = check_compared(call);
  const Tensor& pred = call.input("pred");
  checked.sizes = image_sizes(pred);
  checked.channels = pred.shape[2];
  checked.reduction = call.choice<Reduction>("reduction");

  check_kernel(call, checked);
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

  // Divided by the least variance it must be finite.
  const double smooth_product = call.number("smooth_product");
  if (!(smooth_product >= 0 && smooth_product <= 1e18)) {
    fail_value(call, "smooth_product", "a number from 0 to 1e18", concat(smooth_product));
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
  enum class Weights { kRectangular, kGaussian, kTriangular };
  const Weights weights = call.choice<Weights>("window");
  const std::vector<double>& given = call.numbers("sigma");
  Window<T> window{};
  window.rectangular = weights == Weights::kRectangular;
  window.radius = checked.kernel_size / 2;
  window.radius_z = checked.dimensions == 3 ? window.radius : 0;
  const int64_t volume[3] = {checked.sizes.x, checked.sizes.y, checked.sizes.z};
  double mass = 1, coverage = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int size = axis < checked.dimensions ? checked.kernel[axis] : 1;
    window.rectangular &= axis >= checked.dimensions || size == checked.kernel_size;
    const double sigma = given.empty() ? size / 3.0 : given[0];
    const double width = triangle_width(size);
    double sum = 0;
    for (int d = 0; d <= size / 2; ++d) {
      double weight = 1;
      if (weights == Weights::kGaussian) weight = std::exp(-0.5 * (d / sigma) * (d / sigma));
      if (weights == Weights::kTriangular) weight = std::max(width - d, 0.0) / (width * width);
      // A weight of 0 would make NaN of a sum beyond the range of T.
      window.weight[axis][d] = std::max(static_cast<T>(weight), std::numeric_limits<T>::min());
      sum += (d == 0 ? 1 : 2) * static_cast<double>(window.weight[axis][d]);
    }
    mass *= sum;
    coverage *= std::min(1.0, static_cast<double>(volume[axis]) / size);
  }
  window.inverse_mass = static_cast<T>(1 / mass);
  window.coverage = static_cast<T>(coverage);
  window.largest_pivot = std::numeric_limits<T>::max() * (std::numeric_limits<T>::epsilon() / 8);
  window.smooth_nr = static_cast<T>(call.number("smooth_nr"));
  window.smooth_dr = static_cast<T>(call.number("smooth_dr"));
  window.smooth_product = static_cast<T>(call.number("smooth_product"));
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

// Asks for what the passes of large windows leave in memory: the values that all sums are relative
// to, sums of some planes, and the adjoint fields.
void infer_passes(Call& call, const LnccCall& checked, int gradients) {
  if (checked.fused) return;
  const Batch& batch = checked.batch;
  const LnccPasses passes = lncc_passes(checked);
  call.set("pivots", tensor_spec(checked.dtype, {batch.groups, batch.items, checked.channels, 2}));
  call.set("window_sums",
           tensor_spec(DType::kFloat64, {batch.groups, passes.together, passes.planes, kWindowSums,
                                         checked.sizes.y, checked.sizes.x}));
  if (gradients == 0) return;
  Shape fields = {2 * gradients + 1};
  for (const int64_t size : checked.map) fields.append(size);
  call.set("adjoint", tensor_spec(checked.dtype, fields));
}

// Asks for a loss that is one number, and its gradients.
void infer_number(Call& call, const LnccCall& checked) {
  const int64_t groups = checked.batch.groups;
  call.set("output", tensor_spec(checked.dtype, {groups}));
  call.set("partial_sums",
           tensor_spec(checked.dtype, {groups, checked.fused ? kLnccMaxParts : kLnccPassParts}));
  infer_passes(call, checked, infer_gradients(call, checked));
}

void infer(Call& call) {
  const auto& checked = call.keep(check(call));
  if (checked.reduction == Reduction::kNone) {
    call.set("output", tensor_spec(checked.dtype, checked.map));
    infer_passes(call, checked, 0);
    return;
  }
  if (checked.reduction == Reduction::kMean && call.input("mask").present) {
    call.set("mask_sum", tensor_spec(checked.dtype, {checked.batch.groups}));
  }
  infer_number(call, checked);
}

void infer_share(Call& call) {
  const auto& checked = call.keep(check(call));
  if (checked.reduction != Reduction::kMean) {
    fail_value(call, "reduction", "'mean': of others there are no shares", "another");
  }
  const Shape& sums = call.input("mask_sum").shape;
  if (sums.rank() != 2 || sums[0] != checked.batch.groups || sums[1] != 1) {
    fail_shape(call, "mask_sum", "(1,): a number for all items");
  }
  infer_number(call, checked);
}

void infer_grad(Call& call) {
  const auto& checked = call.keep(check(call));
  if (checked.reduction != Reduction::kNone) {
    fail_value(call, "reduction", "'none': a single number's gradient comes with it", "another");
  }
  check_cotangent(call, "grad_output", checked.dtype, checked.map);
  infer_passes(call, checked, infer_gradients(call, checked));
}

}  // namespace

std::vector<Op> lncc_loss_ops() {
  const std::vector<AttrSpec> attributes = {
      {"kernel_size", AttrKind::kInts},  // one, or one for each axis, z, y, x
      {"window", AttrKind::kChoice, {"rectangular", "gaussian", "triangular"}},
      {"sigma", AttrKind::kFloats},  // none: a third of kernel_size
      {"smooth_nr", AttrKind::kFloat},
      {"smooth_dr", AttrKind::kFloat},
      {"smooth_product", AttrKind::kFloat},
      {"common_variance", AttrKind::kFloat},
      {"both_flat", AttrKind::kFloats},  // none: what the formula makes of constant windows
      {"reduction", AttrKind::kChoice, {"mean", "sum", "none"}},
  };
  const std::vector<InputSpec> inputs = {{"pred", false, InputKind::kCompared},
                                         {"target", false, InputKind::kCompared},
                                         {"mask", true, InputKind::kCompared}};
  std::vector<InputSpec> gradient_inputs = inputs;
  gradient_inputs.push_back({"grad_output", false, InputKind::kCompared});
  std::vector<InputSpec> share_inputs = inputs;
  share_inputs.push_back({"mask_sum"});
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
        {"window_sums", OutputRole::kWorkspace},
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
        {"window_sums", OutputRole::kWorkspace},
        {"adjoint", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       lncc_loss_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(lncc_loss_grad_cuda)},
      {"lncc_loss_share",
       nullptr,
       share_inputs,
       {{"output"},
        {"grad_pred"},
        {"grad_target"},
        {"partial_sums", OutputRole::kWorkspace},
        {"pivots", OutputRole::kWorkspace},
        {"window_sums", OutputRole::kWorkspace},
        {"adjoint", OutputRole::kWorkspace}},
       attributes,
       infer_share,
       lncc_loss_share_cpu,
       REGKERNELS_CUDA_LAUNCH(lncc_loss_share_cuda)},
  };
}

}  // namespace regkernels

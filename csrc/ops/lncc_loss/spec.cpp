#include <algorithm>
#include <cmath>
#include <limits>

#include "core/dispatch.h"
#include "ops/lncc_loss/geometry.h"
#include "ops/lncc_loss/lncc_loss.h"
#include "ops/table.h"

namespace regkernels {

LnccGeometry lncc_geometry(const Call& call) {
  LnccGeometry geometry;
  geometry.dtype = check_dtypes(call);
  geometry.dimensions = check_compared(call);
  const Tensor& pred = call.input("pred");
  geometry.sizes = image_sizes(pred);
  geometry.channels = pred.shape[2];
  geometry.reduction = call.choice<Reduction>("reduction");

  const int64_t kernel_size = call.integer("kernel_size");
  if (kernel_size < 3 || kernel_size > kMaxWindow || kernel_size % 2 == 0) {
    fail_value(call, "kernel_size", concat("an odd number from 3 to ", kMaxWindow),
               concat(kernel_size));
  }
  geometry.kernel_size = static_cast<int>(kernel_size);
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
  // Its reciprocal, and that of a constant window's two variances, must be finite.
  const double smooth_dr = call.number("smooth_dr");
  if (!std::isfinite(smooth_dr) || smooth_dr < 1e-18) {
    fail_value(call, "smooth_dr", "a finite number of at least 1e-18", concat(smooth_dr));
  }

  geometry.batch = check_batch(call);
  geometry.map = {geometry.batch.groups, geometry.batch.items, geometry.channels};
  append_sizes(geometry.map, geometry.sizes, geometry.dimensions);
  geometry.fused = geometry.dtype == DType::kFloat32 && geometry.kernel_size <= kLnccMaxFused &&
                   geometry.sizes.x * geometry.sizes.y < int64_t{1} << 31;
  return geometry;
}

template <class T>
Window<T> lncc_window(const Call& call, const LnccGeometry& geometry) {
  enum class Weights { kRectangular, kGaussian };
  const bool gaussian = call.choice<Weights>("window") == Weights::kGaussian;
  const std::vector<double>& given = call.numbers("sigma");
  const double sigma = given.empty() ? geometry.kernel_size / 3.0 : given[0];
  Window<T> window{};
  window.rectangular = !gaussian;
  window.radius = geometry.kernel_size / 2;
  window.radius_z = geometry.dimensions == 3 ? window.radius : 0;
  double sum = 0;
  for (int d = 0; d <= window.radius; ++d) {
    const double weight = gaussian ? std::exp(-0.5 * (d / sigma) * (d / sigma)) : 1.0;
    // Never 0, which makes something that is no number of a sum beyond the range of T.
    window.weight[d] = std::max(static_cast<T>(weight), std::numeric_limits<T>::min());
    sum += (d == 0 ? 1 : 2) * static_cast<double>(window.weight[d]);
  }
  window.inverse_mass = static_cast<T>(1 / std::pow(sum, geometry.dimensions));
  const auto filled = [&](int64_t size) {
    return std::min(1.0, static_cast<double>(size) / geometry.kernel_size);
  };
  window.coverage = static_cast<T>(filled(geometry.sizes.x) * filled(geometry.sizes.y) *
                                   (geometry.dimensions == 3 ? filled(geometry.sizes.z) : 1.0));
  window.largest_pivot = std::numeric_limits<T>::max() * (std::numeric_limits<T>::epsilon() / 8);
  window.smooth_nr = static_cast<T>(call.number("smooth_nr"));
  window.smooth_dr = static_cast<T>(call.number("smooth_dr"));
  window.rounding = static_cast<T>(1.5 * geometry.kernel_size * std::numeric_limits<T>::epsilon());
  return window;
}

template Window<float> lncc_window<float>(const Call&, const LnccGeometry&);
template Window<double> lncc_window<double>(const Call&, const LnccGeometry&);

namespace {

enum Output { kLoss, kUnitPred, kUnitTarget, kPartialSums, kMaskSum, kPivots, kAdjoint };

// The adjoint fields, where they do not stay inside the kernel, and the values that they are
// relative to.
void infer_adjoint(Call& call, const LnccGeometry& geometry, int pivots, int gradients) {
  if (gradients == 0 || geometry.fused) return;
  const Batch& batch = geometry.batch;
  call.outputs[pivots] =
      tensor_spec(geometry.dtype, {batch.groups, batch.items, geometry.channels, 2});
  Shape fields = {2 * gradients + 1};
  for (const int64_t size : geometry.map) fields.append(size);
  call.outputs[pivots + 1] = tensor_spec(geometry.dtype, fields);
}

int infer_gradients(Call& call, const LnccGeometry& geometry, int first) {
  int gradients = 0;
  for (const char* input : {"pred", "target"}) {
    if (call.wants(first)) {
      call.outputs[first] = gradient_spec(call.input(input), geometry.batch);
      ++gradients;
    }
    ++first;
  }
  return gradients;
}

void infer(Call& call) {
  const LnccGeometry geometry = lncc_geometry(call);
  const Batch& batch = geometry.batch;
  if (geometry.reduction == Reduction::kNone) {
    call.outputs[kLoss] = tensor_spec(geometry.dtype, geometry.map);
    return;
  }
  call.outputs[kLoss] = tensor_spec(geometry.dtype, {batch.groups});
  const int gradients = infer_gradients(call, geometry, kUnitPred);
  call.outputs[kPartialSums] = tensor_spec(geometry.dtype, {batch.groups, kLnccMaxParts});
  if (geometry.reduction == Reduction::kMean && call.input("mask").present) {
    call.outputs[kMaskSum] = tensor_spec(geometry.dtype, {batch.groups});
  }
  infer_adjoint(call, geometry, kPivots, gradients);
}

enum GradOutput { kGradPred, kGradTarget, kGradPivots, kGradAdjoint };

void infer_grad(Call& call) {
  const LnccGeometry geometry = lncc_geometry(call);
  if (geometry.reduction != Reduction::kNone) {
    fail_value(call, "reduction", "'none': a single number's gradient comes with it", "another");
  }
  check_cotangent(call, "grad_output", geometry.dtype, geometry.map);
  infer_adjoint(call, geometry, kGradPivots, infer_gradients(call, geometry, kGradPred));
}

}  // namespace

std::vector<Op> lncc_loss_ops() {
  const std::vector<AttrSpec> attributes = {
      {"kernel_size", AttrKind::kInt},
      {"window", AttrKind::kChoice, {"rectangular", "gaussian"}},
      {"sigma", AttrKind::kFloats},  // none: a third of kernel_size
      {"smooth_nr", AttrKind::kFloat},
      {"smooth_dr", AttrKind::kFloat},
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

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "ops/mutual_information/geometry.h"
#include "ops/mutual_information/mutual_information.h"
#include "ops/table.h"

namespace regkernels {

namespace {

// sigma = sigma_ratio / (2 num_bins) of the range.
double width_in_bins(const Call& call) { return call.number("sigma_ratio") / 2; }

void check_value_range(const Call& call) {
  const Tensor& range = call.input("value_range");
  if (!range.present) return;
  const Shape& shape = range.shape;
  if (shape.rank() != 4 || shape[2] != 2 || shape[3] != 2) {
    fail_shape(call, "value_range", "(N, 2, 2): low and high of pred and of target");
  }
  if (call.flag("joint_range")) {
    fail_value(call, "value_range", "one of its own or 'joint'", "both");
  }
}

// One divides by the other: within these limits every bin's term is finite.
constexpr double kLeastDivisor = 1e-30, kMostSmoothing = 1e30;

void check_smoothing(const Call& call, const char* name, double least) {
  const double value = call.number(name);
  if (!(value >= least && value <= kMostSmoothing)) {
    fail_value(call, name, concat("a number from ", least, " to ", kMostSmoothing), concat(value));
  }
}

}  // namespace

HistogramGeometry histogram_geometry(const Call& call) {
  HistogramGeometry geometry;
  geometry.dtype = check_dtypes(call);
  check_compared(call);
  const Tensor& pred = call.input("pred");
  geometry.channels = pred.shape[2];
  geometry.samples = pred.shape.count(3);
  const int64_t num_bins = call.integer("num_bins");
  if (num_bins < 2 || num_bins > 256) {
    fail_value(call, "num_bins", "a number from 2 to 256", concat(num_bins));
  }
  geometry.num_bins = static_cast<int>(num_bins);
  geometry.kernel = call.choice<ParzenKernel>("kernel");
  const double ratio = call.number("sigma_ratio");
  if (!(ratio >= 0.25 && ratio <= 4)) {
    fail_value(call, "sigma_ratio", "a number from 0.25 to 4", concat(ratio));
  }
  geometry.reach = 0;
  if (geometry.kernel == ParzenKernel::kGaussian) {
    const double width = width_in_bins(call);
    geometry.reach = geometry.dtype == DType::kFloat64 ? GaussianReach<double>::of(width)
                                                       : GaussianReach<float>::of(width);
  } else if (geometry.kernel == ParzenKernel::kBSpline) {
    geometry.reach = kBSplineReach;
  }
  geometry.joint_range = call.flag("joint_range");
  return geometry;
}

template <class T>
Parzen<T> parzen_window(const Call& call, const HistogramGeometry& geometry) {
  const double width = width_in_bins(call);
  Parzen<T> window{};
  window.num_bins = geometry.num_bins;
  window.sharpness = static_cast<T>(1 / (2 * std::log(2.0) * width * width));
  window.inverse_width = static_cast<T>(1 / (width * width));
  for (int j = 0; j <= GaussianReach<T>::kWide; ++j) {
    window.falloff[j] = static_cast<T>(std::exp(-0.5 * (j / width) * (j / width)));
  }
  return window;
}

template Parzen<float> parzen_window<float>(const Call&, const HistogramGeometry&);
template Parzen<double> parzen_window<double>(const Call&, const HistogramGeometry&);

namespace {

struct Workspaces {
  int extremes, counts;
};

// Checks what the loss and the histogram have in common, and asks for the memory to count in.
HistogramGeometry infer_histogram(Call& call, const Workspaces& outputs) {
  HistogramGeometry geometry = histogram_geometry(call);
  check_value_range(call);
  geometry.batch = check_batch(call);
  const Shape elements = {geometry.batch.groups, geometry.batch.items, geometry.channels};
  if (!call.input("value_range").present || call.input("mask").present) {
    Shape extremes = elements;
    extremes.append(extreme_parts(geometry.samples));
    extremes.append(kExtremes);
    call.outputs[outputs.extremes] = tensor_spec(geometry.dtype, extremes);
  }
  // One more, to tell that a sample was not a number.
  Shape counts = elements;
  counts.append(geometry.num_bins * geometry.num_bins + 1);
  call.outputs[outputs.counts] = tensor_spec(DType::kInt64, counts);
  return geometry;
}

Tensor loss_spec(const Call& call, const HistogramGeometry& geometry) {
  const Batch& batch = geometry.batch;
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    return tensor_spec(geometry.dtype, {batch.groups});
  }
  return tensor_spec(geometry.dtype, {batch.groups, batch.items, geometry.channels});
}

Tensor table_spec(const HistogramGeometry& geometry) {
  const int64_t size = table_size(geometry);
  return tensor_spec(geometry.dtype,
                     {geometry.batch.groups, geometry.batch.items, geometry.channels, size, size});
}

Tensor scaling_spec(const HistogramGeometry& geometry) {
  return tensor_spec(geometry.dtype,
                     {geometry.batch.groups, geometry.batch.items, geometry.channels, kScalings});
}

void check_differentiable(const Call& call, const HistogramGeometry& geometry) {
  if (geometry.kernel == ParzenKernel::kDelta) {
    fail_value(call, "kernel", "'gaussian' or 'b-spline' where a gradient is wanted", "'delta'");
  }
}

enum Output { kLoss, kTable, kScaling, kLossExtremes, kLossCounts, kValues };

void infer(Call& call) {
  const HistogramGeometry geometry = infer_histogram(call, {kLossExtremes, kLossCounts});
  check_smoothing(call, "smooth_nr", 0);
  check_smoothing(call, "smooth_dr", kLeastDivisor);
  call.outputs[kLoss] = loss_spec(call, geometry);
  if (call.wants(kTable) || call.wants(kScaling)) check_differentiable(call, geometry);
  if (call.wants(kTable)) call.outputs[kTable] = table_spec(geometry);
  if (call.wants(kScaling)) call.outputs[kScaling] = scaling_spec(geometry);
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    call.outputs[kValues] = tensor_spec(
        DType::kFloat64, {geometry.batch.groups, geometry.batch.items, geometry.channels});
  }
}

enum GradOutput { kGradPred, kGradTarget };

void check_saved(const Call& call, const char* name, Tensor expected) {
  const Tensor& saved = call.input(name);
  expected.shape[0] = saved.shape[0];
  if (saved.shape != expected.shape) fail_shape(call, name, describe(expected));
}

void infer_grad(Call& call) {
  HistogramGeometry geometry = histogram_geometry(call);
  check_differentiable(call, geometry);
  geometry.batch = check_batch(call);
  check_saved(call, "table", table_spec(geometry));
  check_saved(call, "scaling", scaling_spec(geometry));
  const Tensor loss = loss_spec(call, geometry);
  check_cotangent(call, "grad_output", loss.dtype, loss.shape);
  if (call.wants(kGradPred)) {
    call.outputs[kGradPred] = gradient_spec(call.input("pred"), geometry.batch);
  }
  if (call.wants(kGradTarget)) {
    call.outputs[kGradTarget] = gradient_spec(call.input("target"), geometry.batch);
  }
}

enum HistogramOutput { kHistogram, kHistogramExtremes, kHistogramCounts };

void infer_joint(Call& call) {
  const HistogramGeometry geometry = infer_histogram(call, {kHistogramExtremes, kHistogramCounts});
  call.outputs[kHistogram] =
      tensor_spec(geometry.dtype, {geometry.batch.groups, geometry.batch.items, geometry.channels,
                                   geometry.num_bins, geometry.num_bins});
}

}  // namespace

std::vector<Op> mutual_information_ops() {
  const std::vector<AttrSpec> binning = {
      {"num_bins", AttrKind::kInt},
      {"kernel", AttrKind::kChoice, {"gaussian", "b-spline", "delta"}},
      {"sigma_ratio", AttrKind::kFloat},
      {"joint_range", AttrKind::kBool},
  };
  std::vector<AttrSpec> attributes = binning;
  attributes.push_back({"smooth_nr", AttrKind::kFloat});
  attributes.push_back({"smooth_dr", AttrKind::kFloat});
  attributes.push_back({"reduction", AttrKind::kChoice, {"mean", "sum", "none"}});
  const std::vector<InputSpec> images = {{"pred", false, InputKind::kCompared},
                                         {"target", false, InputKind::kCompared},
                                         {"mask", true, InputKind::kCompared}};
  std::vector<InputSpec> inputs = images;
  inputs.push_back({"value_range", true, InputKind::kCompared});
  std::vector<InputSpec> gradient_inputs = images;
  for (const char* name : {"table", "scaling", "grad_output"}) {
    gradient_inputs.push_back({name, false, InputKind::kCompared});
  }
  return {
      {"mutual_information_loss",
       "mutual_information_loss_grad",
       inputs,
       {{"output"},
        {"table", OutputRole::kSaved},
        {"scaling", OutputRole::kSaved},
        {"extremes", OutputRole::kWorkspace},
        {"counts", OutputRole::kWorkspace},
        {"values", OutputRole::kWorkspace}},
       attributes,
       infer,
       mutual_information_loss_cpu,
       REGKERNELS_CUDA_LAUNCH(mutual_information_loss_cuda)},
      {"mutual_information_loss_grad",
       nullptr,
       gradient_inputs,
       {{"grad_pred"}, {"grad_target"}},
       attributes,
       infer_grad,
       mutual_information_loss_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(mutual_information_loss_grad_cuda)},
      {"joint_histogram",
       nullptr,
       inputs,
       {{"output"}, {"extremes", OutputRole::kWorkspace}, {"counts", OutputRole::kWorkspace}},
       binning,
       infer_joint,
       joint_histogram_cpu,
       REGKERNELS_CUDA_LAUNCH(joint_histogram_cuda)},
  };
}

}  // namespace regkernels

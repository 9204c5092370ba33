#include <algorithm>
#include <cmath>

#include "ops/mutual_information/call.h"
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

// One smoothing term divides the other: within these limits every bin's term is finite.
constexpr double kLeastDivisor = 1e-30, kMostSmoothing = 1e30;

void check_smoothing(const Call& call, const char* name, double least) {
  const double value = call.number(name);
  if (!(value >= least && value <= kMostSmoothing)) {
    fail_value(call, name, concat("a number from ", least, " to ", kMostSmoothing), concat(value));
  }
}

MutualInformationCall check(const Call& call) {
  MutualInformationCall checked;
  checked.dtype = check_dtypes(call);
  check_compared(call);
  const Tensor& pred = call.input("pred");
  checked.channels = pred.shape[2];
  checked.samples = pred.shape.count(3);
  const int64_t num_bins = call.integer("num_bins");
  if (num_bins < 2 || num_bins > 256) {
    fail_value(call, "num_bins", "a number from 2 to 256", concat(num_bins));
  }
  checked.num_bins = static_cast<int>(num_bins);
  checked.kernel = call.choice<ParzenKernel>("kernel");
  const double ratio = call.number("sigma_ratio");
  if (!(ratio >= 0.25 && ratio <= 4)) {
    fail_value(call, "sigma_ratio", "a number from 0.25 to 4", concat(ratio));
  }
  checked.reach = 0;
  if (checked.kernel == ParzenKernel::kGaussian) {
    const double width = width_in_bins(call);
    checked.reach = checked.dtype == DType::kFloat64 ? GaussianReach<double>::of(width)
                                                     : GaussianReach<float>::of(width);
  } else if (checked.kernel == ParzenKernel::kBSpline) {
    checked.reach = kBSplineReach;
  }
  checked.joint_range = call.flag("joint_range");
  return checked;
}

}  // namespace

template <class T>
Parzen<T> parzen_window(const Call& call, const MutualInformationCall& checked) {
  const double width = width_in_bins(call);
  Parzen<T> window{};
  window.num_bins = checked.num_bins;
  window.sharpness = static_cast<T>(1 / (2 * std::log(2.0) * width * width));
  window.inverse_width = static_cast<T>(1 / (width * width));
  for (int j = 0; j <= GaussianReach<T>::kWide; ++j) {
    window.falloff[j] = static_cast<T>(std::exp(-0.5 * (j / width) * (j / width)));
  }
  return window;
}

template Parzen<float> parzen_window<float>(const Call&, const MutualInformationCall&);
template Parzen<double> parzen_window<double>(const Call&, const MutualInformationCall&);

namespace {

// Checks what the loss and the histogram have in common, and asks for the memory to count in.
const MutualInformationCall& infer_histogram(Call& call) {
  MutualInformationCall found = check(call);
  check_value_range(call);
  found.batch = check_batch(call);
  const auto& checked = call.keep(found);
  const Shape elements = {checked.batch.groups, checked.batch.items, checked.channels};
  if (!call.input("value_range").present || call.input("mask").present) {
    Shape extremes = elements;
    extremes.append(extreme_parts(checked.samples));
    extremes.append(kExtremes);
    call.set("extremes", tensor_spec(checked.dtype, extremes));
  }
  // One count more than there are bins tells that a sample was not a number.
  Shape counts = elements;
  counts.append(checked.num_bins * checked.num_bins + 1);
  call.set("counts", tensor_spec(DType::kInt64, counts));
  return checked;
}

Tensor loss_spec(const Call& call, const MutualInformationCall& checked) {
  const Batch& batch = checked.batch;
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    return tensor_spec(checked.dtype, {batch.groups});
  }
  return tensor_spec(checked.dtype, {batch.groups, batch.items, checked.channels});
}

Tensor table_spec(const MutualInformationCall& checked) {
  const int64_t size = table_size(checked);
  return tensor_spec(checked.dtype,
                     {checked.batch.groups, checked.batch.items, checked.channels, size, size});
}

Tensor scaling_spec(const MutualInformationCall& checked) {
  return tensor_spec(checked.dtype,
                     {checked.batch.groups, checked.batch.items, checked.channels, kScalings});
}

void check_differentiable(const Call& call, const MutualInformationCall& checked) {
  if (checked.kernel == ParzenKernel::kDelta) {
    fail_value(call, "kernel", "'gaussian' or 'b-spline' where a gradient is wanted", "'delta'");
  }
}

void infer(Call& call) {
  const auto& checked = infer_histogram(call);
  check_smoothing(call, "smooth_nr", 0);
  check_smoothing(call, "smooth_dr", kLeastDivisor);
  call.set("output", loss_spec(call, checked));
  if (call.wants("table") || call.wants("scaling")) check_differentiable(call, checked);
  if (call.wants("table")) call.set("table", table_spec(checked));
  if (call.wants("scaling")) call.set("scaling", scaling_spec(checked));
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    call.set("values", tensor_spec(DType::kFloat64,
                                   {checked.batch.groups, checked.batch.items, checked.channels}));
  }
}

void check_saved(const Call& call, const char* name, Tensor expected) {
  const Tensor& saved = call.input(name);
  expected.shape[0] = saved.shape[0];
  if (saved.shape != expected.shape) fail_shape(call, name, describe(expected));
}

void infer_grad(Call& call) {
  MutualInformationCall found = check(call);
  check_differentiable(call, found);
  found.batch = check_batch(call);
  const auto& checked = call.keep(found);
  check_saved(call, "table", table_spec(checked));
  check_saved(call, "scaling", scaling_spec(checked));
  const Tensor loss = loss_spec(call, checked);
  check_cotangent(call, "grad_output", loss.dtype, loss.shape);
  if (call.wants("grad_pred")) {
    call.set("grad_pred", gradient_spec(call.input("pred"), checked.batch));
  }
  if (call.wants("grad_target")) {
    call.set("grad_target", gradient_spec(call.input("target"), checked.batch));
  }
}

void infer_joint(Call& call) {
  const auto& checked = infer_histogram(call);
  call.set("output",
           tensor_spec(checked.dtype, {checked.batch.groups, checked.batch.items, checked.channels,
                                       checked.num_bins, checked.num_bins}));
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
  attributes.push_back({"normalised", AttrKind::kBool});
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

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
}

void check_range_choice(const Call& call) {
  if (call.input("value_range").present && call.flag("joint_range")) {
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

// Checks the images and how many of their planes are the volume's own.
void check_images(const Call& call, MutualInformationCall& checked) {
  checked.dtype = check_dtypes(call);
  check_compared(call);
  const Tensor& pred = call.input("pred");
  checked.channels = pred.shape[2];
  checked.samples = checked.whole_samples = pred.shape.count(3);
  checked.plane_samples = pred.shape.count(4);
  const Tensor& own = call.input("own_planes");
  if (!own.present) return;
  if (own.dtype != DType::kInt32) fail_type(call, "own_planes", "int32", dtype_name(own.dtype));
  if (own.shape.rank() != 2 || own.shape[1] != 1) {
    fail_shape(call, "own_planes", "(1,): a number for all items");
  }
}

void check_binning(const Call& call, MutualInformationCall& checked) {
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
}

void check_whole_samples(const Call& call, int64_t least, MutualInformationCall& checked) {
  const int64_t whole = call.integer("whole_samples");
  if (whole < least || whole > kMostWholeSamples) {
    fail_value(call, "whole_samples", concat("a number from ", least, " to ", kMostWholeSamples),
               concat(whole));
  }
  if (whole > 0) checked.whole_samples = whole;
}

void check_extremes(const Call& call, const MutualInformationCall& checked, bool needed) {
  const Tensor& extremes = call.input("extremes");
  if (!extremes.present) {
    if (needed) fail_type(call, "extremes", "those of the whole volume", "None");
    return;
  }
  const Shape& shape = extremes.shape;
  if (shape.rank() != 4 || shape[2] != checked.channels || shape[3] != kExtremes) {
    fail_shape(call, "extremes", concat("(N, ", checked.channels, ", ", kExtremes, ")"));
  }
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

Shape elements_shape(const MutualInformationCall& checked) {
  return {checked.batch.groups, checked.batch.items, checked.channels};
}

// Whether anything has to be known of the values before they are counted.
bool needs_extremes(const Call& call) {
  return !call.input("value_range").present || call.input("mask").present;
}

Tensor part_extremes_spec(const MutualInformationCall& checked) {
  Shape shape = elements_shape(checked);
  shape.append(extreme_parts(checked.samples));
  shape.append(kExtremes);
  return tensor_spec(checked.dtype, shape);
}

// One count more than there are bins tells that a sample was not a number.
Tensor counts_spec(const MutualInformationCall& checked) {
  Shape shape = elements_shape(checked);
  shape.append(checked.bins() + 1);
  return tensor_spec(DType::kInt64, shape);
}

Tensor histogram_spec(const MutualInformationCall& checked) {
  Shape shape = elements_shape(checked);
  shape.append(checked.num_bins);
  shape.append(checked.num_bins);
  return tensor_spec(checked.dtype, shape);
}

// Checks what the loss and the histogram have in common, and asks for the memory to count in.
const MutualInformationCall& infer_histogram(Call& call) {
  MutualInformationCall found;
  check_images(call, found);
  check_binning(call, found);
  check_value_range(call);
  check_range_choice(call);
  found.batch = check_batch(call);
  const auto& checked = call.keep(found);
  if (needs_extremes(call)) call.set("extremes", part_extremes_spec(checked));
  call.set("counts", counts_spec(checked));
  return checked;
}

Tensor loss_spec(const Call& call, const MutualInformationCall& checked) {
  const Batch& batch = checked.batch;
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    return tensor_spec(checked.dtype, {batch.groups});
  }
  return tensor_spec(checked.dtype, elements_shape(checked));
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

// Checks and sets what the loss, and what is saved for its gradient, are made of and into.
void infer_information(Call& call, const MutualInformationCall& checked) {
  check_smoothing(call, "smooth_nr", 0);
  check_smoothing(call, "smooth_dr", kLeastDivisor);
  call.set("output", loss_spec(call, checked));
  if (call.wants("table") || call.wants("scaling")) check_differentiable(call, checked);
  if (call.wants("table")) call.set("table", table_spec(checked));
  if (call.wants("scaling")) call.set("scaling", scaling_spec(checked));
  if (call.choice<Reduction>("reduction") != Reduction::kNone) {
    call.set("values", tensor_spec(DType::kFloat64, elements_shape(checked)));
  }
}

void infer(Call& call) { infer_information(call, infer_histogram(call)); }

void check_saved(const Call& call, const char* name, Tensor expected) {
  const Tensor& saved = call.input(name);
  expected.shape[0] = saved.shape[0];
  if (saved.shape != expected.shape) fail_shape(call, name, describe(expected));
}

void infer_grad(Call& call) {
  MutualInformationCall found;
  check_images(call, found);
  check_binning(call, found);
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

void infer_joint(Call& call) { call.set("output", histogram_spec(infer_histogram(call))); }

void infer_extremes(Call& call) {
  MutualInformationCall found{};
  check_images(call, found);
  check_value_range(call);
  found.batch = check_batch(call);
  const auto& checked = call.keep(found);
  Shape shape = elements_shape(checked);
  shape.append(kExtremes);
  call.set("output", tensor_spec(checked.dtype, shape));
  call.set("extremes", part_extremes_spec(checked));
}

void infer_counts(Call& call) {
  MutualInformationCall found;
  check_images(call, found);
  check_binning(call, found);
  check_value_range(call);
  check_range_choice(call);
  check_whole_samples(call, 0, found);
  check_extremes(call, found, needs_extremes(call));
  found.batch = check_batch(call);
  call.set("output", counts_spec(call.keep(found)));
}

void infer_of_counts(Call& call) {
  MutualInformationCall found{};
  found.dtype = check_dtypes(call);
  check_binning(call, found);
  check_value_range(call);
  check_range_choice(call);
  check_whole_samples(call, 1, found);
  const Tensor& counts = call.input("counts");
  if (counts.dtype != DType::kInt64) fail_type(call, "counts", "int64", dtype_name(counts.dtype));
  if (counts.shape.rank() != 4 || counts.shape[3] != found.bins() + 1) {
    fail_shape(call, "counts", concat("(N, C, ", found.bins() + 1, ")"));
  }
  found.channels = counts.shape[2];
  check_extremes(call, found, !call.input("value_range").present);
  found.batch = check_batch(call);
  const auto& checked = call.keep(found);
  infer_information(call, checked);
  if (call.wants("histogram")) call.set("histogram", histogram_spec(checked));
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
  const InputSpec value_range = {"value_range", true, InputKind::kCompared};
  const InputSpec extremes = {"extremes", true, InputKind::kCompared};
  // Planes further along the first spatial axis are padding, and not looked at.
  const InputSpec own_planes = {"own_planes", true, InputKind::kCounts};
  const auto with = [](std::vector<InputSpec> inputs, const std::vector<InputSpec>& more) {
    inputs.insert(inputs.end(), more.begin(), more.end());
    return inputs;
  };
  const std::vector<InputSpec> inputs = with(images, {value_range, own_planes});
  const auto with_whole = [](std::vector<AttrSpec> those) {
    those.push_back({"whole_samples", AttrKind::kInt});
    return those;
  };
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
       with(images, {{"table", false, InputKind::kCompared},
                     {"scaling", false, InputKind::kCompared},
                     own_planes,
                     {"grad_output", false, InputKind::kCompared}}),
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
      {"value_extremes",
       nullptr,
       inputs,
       {{"output"}, {"extremes", OutputRole::kWorkspace}},
       {},
       infer_extremes,
       value_extremes_cpu,
       REGKERNELS_CUDA_LAUNCH(value_extremes_cuda)},
      {"joint_counts",
       nullptr,
       with(images, {value_range, extremes, own_planes}),
       {{"output"}},
       with_whole(binning),
       infer_counts,
       joint_counts_cpu,
       REGKERNELS_CUDA_LAUNCH(joint_counts_cuda)},
      {"mutual_information_of_counts",
       nullptr,
       {{"counts", false, InputKind::kCounts}, value_range, extremes},
       {{"output"}, {"table"}, {"scaling"}, {"histogram"}, {"values", OutputRole::kWorkspace}},
       with_whole(attributes),
       infer_of_counts,
       mutual_information_of_counts_cpu,
       REGKERNELS_CUDA_LAUNCH(mutual_information_of_counts_cuda)},
  };
}

}  // namespace regkernels

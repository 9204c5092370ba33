#include <algorithm>

#include "core/reduce.h"
#include "ops/mind_ssc/call.h"
#include "ops/mind_ssc/mind_ssc.h"
#include "ops/table.h"

namespace regkernels {

namespace {

int check_within(const Call& call, const char* name, int most) {
  const int64_t value = call.integer(name);
  if (value < 1 || value > most) {
    fail_value(call, name, concat("a number from 1 to ", most), concat(value));
  }
  return static_cast<int>(value);
}

const MindSscCall& check(Call& call) {
  MindSscCall checked;
  checked.arithmetic = check_dtypes(call);
  checked.dimensions = check_image(call, "image");
  const Tensor& image = call.input("image");
  checked.storage = image.dtype;
  checked.sizes = image_sizes(image);
  checked.radius = check_within(call, "radius", kLargestPatchRadius);
  checked.dilation = check_within(call, "dilation", kLargestDilation);
  checked.batch = {check_batch(call).groups, image.shape[1] * image.shape[2]};
  checked.in_image = image.shape[0] * checked.batch.items;
  checked.in_output = checked.batch.groups * checked.batch.items;
  return call.keep(checked);
}

Tensor output_spec(const Call& call, const MindSscCall& checked) {
  Shape shape = call.input("image").shape;
  shape[0] = checked.batch.groups;
  shape[2] *= descriptor_channels(checked.dimensions);
  return tensor_spec(checked.storage, shape);
}

Tensor mean_spec(const Call& call, const MindSscCall& checked) {
  const Shape& image = call.input("image").shape;
  return tensor_spec(checked.arithmetic, {image[0], image[1], image[2]});
}

int64_t voxels_with(const MindSscCall& checked, int margin) {
  return extended_sizes(checked.sizes, checked.dimensions, margin).voxels();
}

Tensor distances_spec(const MindSscCall& checked) {
  const int families = pair_families(checked.dimensions);
  return tensor_spec(checked.arithmetic,
                     {1, checked.in_image * families * voxels_with(checked, checked.dilation)});
}

void check_mean(const Call& call, const MindSscCall& checked) {
  const Tensor mean = mean_spec(call, checked);
  if (call.input("mean_variance").shape != mean.shape) {
    fail_shape(call, "mean_variance", describe(mean));
  }
}

void infer(Call& call) {
  const auto& checked = check(call);
  call.set("output", output_spec(call, checked));
  call.set("distances", distances_spec(checked));
  call.set("partial_sums",
           partial_sums_spec(checked.arithmetic, checked.batch, checked.sizes, /*sums=*/1));
  // A value alone needs the mean no longer than the call lasts.
  const Tensor mean = mean_spec(call, checked);
  call.set(call.wants("mean_variance") ? "mean_variance" : "mean", mean);
}

void infer_variances(Call& call) {
  const auto& checked = check(call);
  call.set("output", tensor_spec(checked.arithmetic, call.input("image").shape));
  call.set("distances", distances_spec(checked));
}

void infer_of_variance(Call& call) {
  const auto& checked = check(call);
  check_mean(call, checked);
  call.set("output", output_spec(call, checked));
  call.set("distances", distances_spec(checked));
}

void infer_grad(Call& call) {
  const auto& checked = check(call);
  const Tensor output = output_spec(call, checked);
  check_cotangent(call, "grad_output", output.dtype, output.shape);
  check_mean(call, checked);
  call.set("grad_image", gradient_spec(call.input("image"), checked.batch));
  // First the distances are in this memory, then the gradients of squared differences, which reach
  // further. The gradients of the distances make room for that of the continued image likewise.
  const int families = pair_families(checked.dimensions);
  const int64_t continued = voxels_with(checked, checked.radius + checked.dilation);
  call.set("families",
           tensor_spec(checked.arithmetic, {1, checked.in_output * families * continued}));
  const int64_t slopes = checked.sizes.voxels() * descriptor_channels(checked.dimensions);
  call.set("slopes",
           tensor_spec(checked.arithmetic, {1, checked.in_output * std::max(slopes, continued)}));
}

}  // namespace

std::vector<Op> mind_ssc_ops() {
  const std::vector<AttrSpec> attributes = {{"radius", AttrKind::kInt},
                                            {"dilation", AttrKind::kInt}};
  return {
      {"mind_ssc",
       "mind_ssc_grad",
       {{"image", false, InputKind::kImage}},
       {{"output"},
        {"mean_variance", OutputRole::kSaved},
        {"distances", OutputRole::kWorkspace},
        {"partial_sums", OutputRole::kWorkspace},
        {"mean", OutputRole::kWorkspace}},
       attributes,
       infer,
       mind_ssc_cpu,
       REGKERNELS_CUDA_LAUNCH(mind_ssc_cuda)},
      {"mind_ssc_grad",
       nullptr,
       {{"image", false, InputKind::kImage},
        {"mean_variance"},
        {"grad_output", false, InputKind::kImage}},
       {{"grad_image"}, {"families", OutputRole::kWorkspace}, {"slopes", OutputRole::kWorkspace}},
       attributes,
       infer_grad,
       mind_ssc_grad_cpu,
       REGKERNELS_CUDA_LAUNCH(mind_ssc_grad_cuda)},
      {"mind_ssc_variances",
       nullptr,
       {{"image", false, InputKind::kImage}},
       {{"output"}, {"distances", OutputRole::kWorkspace}},
       attributes,
       infer_variances,
       mind_ssc_variances_cpu,
       REGKERNELS_CUDA_LAUNCH(mind_ssc_variances_cuda)},
      {"mind_ssc_of_variance",
       nullptr,
       {{"image", false, InputKind::kImage}, {"mean_variance"}},
       {{"output"}, {"distances", OutputRole::kWorkspace}},
       attributes,
       infer_of_variance,
       mind_ssc_of_variance_cpu,
       REGKERNELS_CUDA_LAUNCH(mind_ssc_of_variance_cuda)},
  };
}

}  // namespace regkernels

#include <cmath>

#include "ops/riemannian_adam_step/call.h"
#include "ops/riemannian_adam_step/riemannian_adam_step.h"
#include "ops/table.h"

namespace regkernels {

namespace {

double check_decay(const Call& call, const char* name) {
  const double value = call.number(name);
  if (!(value >= 0 && value < 1)) {
    fail_value(call, name, "a number from 0 to below 1", concat(value));
  }
  return value;
}

void check_number_of_item(const Call& call, const char* name) {
  const Tensor& number = call.input(name);
  if (number.present && number.shape.rank() != 2) {
    fail_shape(call, name, "(N,): a number for each item");
  }
}

// Checks what all passes have in common. `field` is one of the inputs `others`, which are alike.
AdamCall check(Call& call, const char* field, const std::vector<const char*>& others) {
  AdamCall checked;
  checked.dtype = check_dtypes(call);
  const int D = checked.dimensions = check_field(call, field);
  checked.sizes = field_sizes(call.input(field));
  for (const char* other : others) {
    if (check_field(call, other) != D || !(field_sizes(call.input(other)) == checked.sizes)) {
      fail_shape(call, other, concat("with the spatial axes of ", field));
    }
  }
  for (const char* name : {"mu", "nu"}) {
    if (call.input(name).dtype == DType::kFloat16) {
      fail_type(call, name, "float32, float64 or bfloat16", "float16");
    }
  }
  checked.moments = call.input("mu").dtype;
  if (call.input("nu").dtype != checked.moments) {
    fail_type(call, "nu", concat(dtype_name(checked.moments), " like mu"),
              dtype_name(call.input("nu").dtype));
  }
  checked.planes = call.slab.present() ? call.slab.planes : checked.sizes.z;
  const Tensor& count = call.input("count");
  if (count.dtype != DType::kInt32) fail_type(call, "count", "int32", dtype_name(count.dtype));
  check_number_of_item(call, "count");
  const Shape& epsilon = call.input("epsilon").shape;
  if (epsilon.rank() != 3 || epsilon[2] != D) {
    fail_shape(call, "epsilon", concat("(N, ", D, "): a number for each component"));
  }
  checked.beta1 = check_decay(call, "beta1");
  checked.beta2 = check_decay(call, "beta2");
  checked.learning_rate = -1;
  checked.confined = false;
  checked.batch = check_batch(call);
  return checked;
}

void check_step(const Call& call, AdamCall& checked) {
  checked.learning_rate = call.number("learning_rate");
  checked.confined = call.flag("confined");
  if (!(checked.learning_rate > 0 && std::isfinite(checked.learning_rate))) {
    fail_value(call, "learning_rate", "a positive finite number", concat(checked.learning_rate));
  }
}

Tensor field_spec(const AdamCall& checked, DType dtype) {
  Shape shape = {checked.batch.groups, checked.batch.items};
  append_sizes(shape, checked.sizes, checked.dimensions);
  shape.append(checked.dimensions);
  return tensor_spec(dtype, shape);
}

void set_moments(Call& call, const AdamCall& checked) {
  for (const char* name : {"next_mu", "next_nu"}) {
    call.set(name, field_spec(checked, checked.moments));
  }
}

Tensor longest_spec(const AdamCall& checked) {
  return tensor_spec(checked.dtype, {checked.batch.groups, checked.batch.items});
}

void infer(Call& call) {
  AdamCall checked = check(call, "gradient", {"mu", "nu"});
  check_number_of_item(call, "scale");
  check_step(call, checked);
  // The step is made of the moments, so that they are written whether or not they are asked for.
  const Tensor field = field_spec(checked, checked.dtype);
  call.set("output", field);
  set_moments(call, checked);
  checked.smoothing = check_smoothing(call, "gradient", field.shape, true);
  if (!checked.smoothing.passes.empty()) {
    call.set("weights", tensor_spec(checked.dtype, {1, checked.smoothing.weights}));
    // On CUDA the passes of a wide Gaussian go back and forth between this memory and the step's.
    if (!checked.smoothing.fused) {
      call.set("scratch", tensor_spec(checked.dtype, {1, field.shape.count()}));
    }
  }
  call.set("longest", longest_spec(checked));
  call.keep(checked);
}

void infer_moments(Call& call) {
  AdamCall checked = check(call, "gradient", {"mu", "nu"});
  check_number_of_item(call, "scale");
  call.set("output", longest_spec(checked));
  set_moments(call, checked);
  checked.smoothing =
      check_smoothing(call, "gradient", field_spec(checked, checked.dtype).shape, true);
  if (!checked.smoothing.passes.empty()) {
    if (!checked.smoothing.fused) {
      fail_value(call, "sigma", "a Gaussian that is smoothed with by one kernel", "a wider one");
    }
    call.set("weights", tensor_spec(checked.dtype, {1, checked.smoothing.weights}));
  }
  checked.uncounted = call.integer("uncounted");
  call.keep(checked);
}

void infer_step(Call& call) {
  AdamCall checked = check(call, "mu", {"nu"});
  check_number_of_item(call, "longest");
  check_step(call, checked);
  call.set("output", field_spec(checked, checked.dtype));
  call.keep(checked);
}

}  // namespace

std::vector<Op> riemannian_adam_step_ops() {
  const std::vector<AttrSpec> of_moments = {{"beta1", AttrKind::kFloat},
                                            {"beta2", AttrKind::kFloat},
                                            {"sigma", AttrKind::kFloats},
                                            {"truncate", AttrKind::kFloat},
                                            {"uncounted", AttrKind::kInt}};
  const std::vector<AttrSpec> of_step = {{"beta1", AttrKind::kFloat},
                                         {"beta2", AttrKind::kFloat},
                                         {"learning_rate", AttrKind::kFloat},
                                         {"confined", AttrKind::kBool}};
  std::vector<AttrSpec> of_smooth_step = of_step;
  of_smooth_step.push_back({"sigma", AttrKind::kFloats});
  of_smooth_step.push_back({"truncate", AttrKind::kFloat});
  const InputSpec mu = {"mu", false, InputKind::kImage}, nu = {"nu", false, InputKind::kImage};
  const InputSpec count = {"count", false, InputKind::kCounts};
  const std::vector<InputSpec> inputs = {{"gradient"}, mu, nu, count, {"epsilon"}, {"scale", true}};
  return {
      {"riemannian_adam_step",
       nullptr,
       inputs,
       {{"output"},
        {"next_mu"},
        {"next_nu"},
        {"longest", OutputRole::kWorkspace},
        {"weights", OutputRole::kWorkspace},
        {"scratch", OutputRole::kWorkspace}},
       of_smooth_step,
       infer,
       riemannian_adam_step_cpu,
       REGKERNELS_CUDA_LAUNCH(riemannian_adam_step_cuda)},
      {"adam_moments",
       nullptr,
       inputs,
       {{"output"}, {"next_mu"}, {"next_nu"}, {"weights", OutputRole::kWorkspace}},
       of_moments,
       infer_moments,
       adam_moments_cpu,
       REGKERNELS_CUDA_LAUNCH(adam_moments_cuda),
       true},
      {"adam_step_of_longest",
       nullptr,
       {mu, nu, count, {"epsilon"}, {"longest"}},
       {{"output"}},
       of_step,
       infer_step,
       adam_step_of_longest_cpu,
       REGKERNELS_CUDA_LAUNCH(adam_step_of_longest_cuda),
       true},
  };
}

}  // namespace regkernels

#include "core/op.h"

#include <cfenv>
#include <cstring>

#include "core/check.h"

namespace regkernels {

namespace {

template <class Specs>
int index_of(const Specs& specs, const char* name) {
  // Names are literals, of which the linker keeps one, so that nearly always the address tells.
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].name == name) return static_cast<int>(i);
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (std::strcmp(specs[i].name, name) == 0) return static_cast<int>(i);
  }
  throw std::logic_error(concat("no operand or attribute is called ", name));
}

}  // namespace

const Tensor& Call::input(const char* name) const { return inputs[index_of(op->inputs, name)]; }
const Tensor& Call::output(const char* name) const { return outputs[index_of(op->outputs, name)]; }

bool Call::wants(const char* output) const { return wanted >> index_of(op->outputs, output) & 1u; }
void Call::set(const char* output, const Tensor& spec) {
  outputs[index_of(op->outputs, output)] = spec;
}

int64_t Call::integer(const char* name) const {
  return std::get<int64_t>(attributes[index_of(op->attributes, name)]);
}
double Call::number(const char* name) const {
  return std::get<double>(attributes[index_of(op->attributes, name)]);
}
const std::vector<int64_t>& Call::integers(const char* name) const {
  return std::get<std::vector<int64_t>>(attributes[index_of(op->attributes, name)]);
}
const std::vector<double>& Call::numbers(const char* name) const {
  return std::get<std::vector<double>>(attributes[index_of(op->attributes, name)]);
}

const Op* find_op(const std::string& name) {
  for (const Op& op : op_table()) {
    if (name == op.name) return &op;
  }
  return nullptr;
}

Slab slab_of_sizes(const std::vector<int64_t>& sizes) {
  Slab slab;
  if (sizes.empty()) return slab;
  if (sizes.size() != 3) throw ValueError(concat("slab: expected 3 sizes, got ", sizes.size()));
  slab.sampled_planes = sizes[0];
  slab.planes = sizes[1];
  slab.answering = sizes[2];
  return slab;
}

void check_slab(const Call& call) {
  if (call.slab.present() && !call.op->takes_slabs) {
    throw ValueError(concat(call.op->name, ": takes whole volumes, not slabs"));
  }
}

void set_outputs(Call& call, const std::array<Tensor, kMaxOperands>& outputs) {
  for (size_t i = 0; i < call.op->outputs.size(); ++i) {
    const Tensor& expected = call.outputs[i];
    const Tensor& given = outputs[i];
    if (expected.present != given.present || expected.dtype != given.dtype ||
        expected.shape != given.shape) {
      throw ValueError(concat(call.op->name, ": output ", call.op->outputs[i].name, ": expected ",
                              describe(expected), ", got ", describe(given)));
    }
  }
  call.outputs = outputs;
}

namespace {

class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&previous_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&previous_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t previous_;
};

}  // namespace

void launch(const Context& context, const Call& call, bool cuda) {
  const DefaultArithmetic arithmetic;
  (cuda ? call.op->launch_cuda : call.op->launch_cpu)(context, call);
}

}  // namespace regkernels

#include "core/op.h"

#include <cfenv>
#include <cstring>
#include <utility>

#include "core/check.h"

namespace regkernels {

namespace {

constexpr std::pair<DType, const char*> kDTypeNames[] = {
    {DType::kFloat32, "float32"},
    {DType::kFloat64, "float64"},
    {DType::kFloat16, "float16"},
    {DType::kBFloat16, "bfloat16"},
    {DType::kBool, "bool"},
    {DType::kInt8, "int8"},
    {DType::kUInt8, "uint8"},
    {DType::kInt16, "int16"},
    {DType::kUInt16, "uint16"},
    {DType::kInt32, "int32"},
    {DType::kUInt32, "uint32"},
    {DType::kInt64, "int64"},
    {DType::kUInt64, "uint64"},
    {DType::kComplex64, "complex64"},
    {DType::kComplex128, "complex128"},
};

template <class Specs>
int index_of(const Specs& specs, const char* name) {
  for (size_t i = 0; i < specs.size(); ++i) {
    if (std::strcmp(specs[i].name, name) == 0) return static_cast<int>(i);
  }
  throw std::logic_error(concat("no operand or attribute is called ", name));
}

}  // namespace

const char* dtype_name(DType dtype) {
  for (const auto& [known, name] : kDTypeNames) {
    if (known == dtype) return name;
  }
  return "an unsupported dtype";
}

DType dtype_from_name(const std::string& name) {
  for (const auto& [known, known_name] : kDTypeNames) {
    if (name == known_name) return known;
  }
  return DType::kInvalid;
}

const Tensor& Call::input(const char* name) const { return inputs[index_of(op->inputs, name)]; }
const Tensor& Call::output(const char* name) const { return outputs[index_of(op->outputs, name)]; }

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

void check_outputs(const Call& call) {
  Call expected = call;
  expected.outputs = {};
  call.op->infer(expected);
  for (size_t i = 0; i < call.op->outputs.size(); ++i) {
    const Tensor& want = expected.outputs[i];
    const Tensor& have = call.outputs[i];
    if (want.present != have.present || want.dtype != have.dtype || want.shape != have.shape) {
      throw ValueError(concat(call.op->name, ": output ", call.op->outputs[i].name, ": expected ",
                              describe(want), ", got ", describe(have)));
    }
  }
}

}  // namespace regkernels

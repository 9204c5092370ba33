// What an op is: its name, inputs, outputs and attributes, its shape inference with all checks, and
// one launch per device. The frontends know ops only through this.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "core/errors.h"
#include "core/tensor.h"

namespace regkernels {

inline constexpr int kMaxOperands = 8;

enum class AttrKind { kBool, kInt, kFloat, kChoice, kInts, kFloats };

struct AttrSpec {
  const char* name;
  AttrKind kind;
  std::vector<const char*> choices = {};  // kChoice only; stored as the index into this list
};

// Images (and what is as good as one: a cotangent of an image, an array to be smoothed) may be
// stored in half precision; kernels convert as they load. Fields and affines lead to coordinates: a
// frontend converts them to the arithmetic dtype beforehand, and the result back. What a loss
// compares (kCompared) is converted as well, and the loss stays in the arithmetic dtype. Labels are
// integers (bool counts): they are told apart and put in order, never computed with or converted.
enum class InputKind { kField, kImage, kCompared, kLabels };

struct InputSpec {
  const char* name;
  bool optional = false;
  InputKind kind = InputKind::kField;
};

// A result is what the user asked for. An op has one, called `output`; one without a gradient may
// have more, for `wanted` to ask for. A workspace is scratch memory, an output only so that the
// framework's allocator owns it. The other two are computed in the forward pass for the sake of the
// backward one, when the call's `wanted` asks for them:
//   kUnitGradient, named grad_<input>: the gradient for a cotangent of 1. Where shape inference
//     leaves it present, the backward pass is its product with the cotangent, nothing else. The
//     result is then one number per group, or per item with the unit gradient's leading axes.
//   kSaved: anything that the gradient op takes again as an input of the same name.
// A weight, one number per group, is what a mean was divided by where that is not the number of
// items: devices that hold some of the items combine their means with it.
enum class OutputRole { kResult, kWorkspace, kUnitGradient, kSaved, kWeight };

struct OutputSpec {
  const char* name;
  OutputRole role = OutputRole::kResult;
};

// Booleans and choices are held as integers.
using AttrValue = std::variant<int64_t, double, std::vector<int64_t>, std::vector<double>>;

struct Op;

// One call: every input and output of the op in the order of its declaration (absent ones
// included), and every attribute in the order of its declaration.
struct Call {
  const Op* op = nullptr;
  std::array<Tensor, kMaxOperands> inputs;
  std::array<Tensor, kMaxOperands> outputs;
  std::vector<AttrValue> attributes;
  uint32_t wanted = ~0u;  // bit i: output i is asked for

  bool wants(int output) const { return (wanted >> output) & 1u; }
  const Tensor& input(const char* name) const;
  const Tensor& output(const char* name) const;
  int64_t integer(const char* name) const;
  bool flag(const char* name) const { return integer(name) != 0; }
  double number(const char* name) const;
  const std::vector<int64_t>& integers(const char* name) const;
  const std::vector<double>& numbers(const char* name) const;
  template <class Enum>
  Enum choice(const char* name) const {
    return static_cast<Enum>(integer(name));
  }
};

// Where a call runs. On the CPU the stream is unused.
struct Context {
  int device = -1;  // CUDA device ordinal; -1: the current one
  void* stream = nullptr;
};

struct Op {
  const char* name;
  const char* gradient;  // name of the op that computes the gradients, or null
  std::vector<InputSpec> inputs;
  std::vector<OutputSpec> outputs;
  std::vector<AttrSpec> attributes;
  // Checks the inputs and attributes and fills in call.outputs (present, dtype, shape).
  void (*infer)(Call& call);
  void (*launch_cpu)(const Context& context, const Call& call);
  void (*launch_cuda)(const Context& context, const Call& call);  // null in a CPU-only build
};

// The gradient of an op takes, by name, whatever it needs of the op's inputs and saved outputs, and
// the cotangent of its result as `grad_output`; it returns the gradient of an input `y` as
// `grad_y`.

// Names an op's CUDA launch in its declaration; a CPU-only build has none.
#ifdef REGKERNELS_CUDA
#define REGKERNELS_CUDA_LAUNCH(function) &function
#else
#define REGKERNELS_CUDA_LAUNCH(function) nullptr
#endif

const std::vector<Op>& op_table();
const Op* find_op(const std::string& name);  // null when there is none

// Launches the op of a call, with the arithmetic that IEEE 754 has by default: some threads of XLA
// take subnormal numbers for zeros, as others of any framework may, and results must not depend on
// who calls.
void launch(const Context& context, const Call& call, bool cuda);

// Runs shape inference and checks that the outputs in hand are what it found.
void check_outputs(const Call& call);

}  // namespace regkernels

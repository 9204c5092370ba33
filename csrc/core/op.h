// What an op is: its name, inputs, outputs and attributes, its shape inference with all checks, and
// one launch per device. The frontends know ops only through this.
#pragma once

#include <any>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/errors.h"
#include "core/host_device.h"
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
// Counts are integers as well, of one dtype: numbers of something, in which the result is constant.
enum class InputKind { kField, kImage, kCompared, kLabels, kCounts };

inline bool holds_integers(InputKind kind) {
  return kind == InputKind::kLabels || kind == InputKind::kCounts;
}

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

// Where the arrays of a call lie if they are slabs: runs of planes along the slowest axis, of
// volumes that several devices hold together. What depends on a voxel's place then goes by its
// place in the whole volume. Each device has slabs of its own in the same program, so it is device
// memory that tells where they begin.
struct Slab {
  // The number of the first plane of what is sampled, and of everything else. In shape inference it
  // is not there yet.
  const int32_t* first = nullptr;
  // The planes of the whole volumes likewise; 0: the call has no slabs.
  int64_t sampled_planes = 0;
  int64_t planes = 0;
  // So many of the planes at hand, from the first, answer for the samples between them and the next
  // plane (for cubic samples see resample/cubic.h). A sample for which none does counts as 0.
  int64_t answering = 0;

  bool present() const { return planes > 0; }
};

// Where in its volume an array begins, for a kernel: 0 unless it is a slab.
struct FirstPlane {
  const int32_t* pointer = nullptr;

  FirstPlane() = default;
  explicit FirstPlane(const Slab& slab) : pointer(slab.present() ? slab.first + 1 : nullptr) {}
  REGKERNELS_HD int operator()() const { return pointer == nullptr ? 0 : *pointer; }
};

struct Op;

// One call: every input and output of the op in the order of its declaration (absent ones
// included), and every attribute in the order of its declaration. Ops know them by name.
struct Call {
  const Op* op = nullptr;
  std::array<Tensor, kMaxOperands> inputs;
  std::array<Tensor, kMaxOperands> outputs;
  std::vector<AttrValue> attributes;
  uint32_t wanted = ~0u;  // bit i: output i is asked for
  Slab slab;

  const Tensor& input(const char* name) const;
  const Tensor& output(const char* name) const;
  // Shape inference asks `wants` whether an output is asked for, and says by `set` what it will be.
  // An output that it does not set is absent.
  bool wants(const char* output) const;
  void set(const char* output, const Tensor& spec);
  int64_t integer(const char* name) const;
  bool flag(const char* name) const { return integer(name) != 0; }
  double number(const char* name) const;
  const std::vector<int64_t>& integers(const char* name) const;
  const std::vector<double>& numbers(const char* name) const;
  template <class Enum>
  Enum choice(const char* name) const {
    return static_cast<Enum>(integer(name));
  }

  // Shape inference leaves here what it has found out about the call, as a type of the op's own
  // (`<Op>Call` in its call.h), so that a launch has no need to check anything again.
  template <class OpCall>
  const OpCall& keep(OpCall found) {
    return found_.emplace<OpCall>(std::move(found));
  }
  template <class OpCall>
  const OpCall& checked() const {
    return std::any_cast<const OpCall&>(found_);
  }

 private:
  std::any found_;
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
  // Checks the inputs and attributes, sets the outputs (present, dtype, shape) and keeps what else
  // a launch needs to know. It sees numbers, but PyTorch's compiler may leave sizes open:
  // torchreg/_ops/open_sizes.py then finds out, by trials with other sizes, which sizes of the
  // outputs are which of the inputs. Therefore nothing but the workspaces may depend on the
  // magnitude of a size.
  void (*infer)(Call& call);
  void (*launch_cpu)(const Context& context, const Call& call);
  void (*launch_cuda)(const Context& context, const Call& call);  // null in a CPU-only build
  bool takes_slabs = false;  // whether Call::slab means something to it, in 3-D
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

// The sizes of a Slab in the order of its declaration, or none.
Slab slab_of_sizes(const std::vector<int64_t>& sizes);

// Raises where a call has slabs and its op knows nothing of them.
void check_slab(const Call& call);

// Hands an inferred call the memory of its outputs, after checking that it is what shape inference
// asked for.
void set_outputs(Call& call, const std::array<Tensor, kMaxOperands>& outputs);

// Launches the op of an inferred call, with the arithmetic that IEEE 754 has by default: some
// threads of XLA take subnormal numbers for zeros, as others of any framework may, and results must
// not depend on who calls.
void launch(const Context& context, const Call& call, bool cuda);

}  // namespace regkernels

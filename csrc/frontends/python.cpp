// The extension module: the op table as plain Python functions. Arrays arrive as (dtype, shape),
// and for a launch with their addresses beside them; this file knows no framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/op.h"
#include "core/thread_pool.h"
#include "frontends/xla.h"
#ifdef REGCORE_CUDA
#include "core/cuda_runtime.h"
#endif

namespace py = pybind11;

namespace reg {

namespace {

const Op& op_called(const std::string& name) {
  const Op* op = find_op(name);
  if (op == nullptr) throw ValueError("no op is called " + name);
  return *op;
}

Shape shape_of(const Op& op, const char* name, const py::handle& value) {
  const auto sizes = py::cast<py::tuple>(value);
  // A rank that no operand has is the user's mistake; the check of the operand says it better, but
  // it needs a shape to say it about.
  if (sizes.size() > kMaxRank) {
    throw ValueError(concat(op.name, ": ", name, ": expected at most ", kMaxRank - 1, " axes, got ",
                            sizes.size() - 1));
  }
  Shape shape;
  for (const py::handle& size : sizes) shape.append(py::cast<int64_t>(size));
  return shape;
}

template <class T>
T cast_attribute(const Op& op, const AttrSpec& spec, const py::handle& value,
                 const char* expected) {
  try {
    return py::cast<T>(value);
  } catch (const py::cast_error&) {
    throw TypeError(concat(op.name, ": ", spec.name, ": expected ", expected, ", got ",
                           std::string(py::repr(value))));
  }
}

AttrValue attribute_of(const Op& op, const AttrSpec& spec, const py::handle& value) {
  switch (spec.kind) {
    case AttrKind::kBool:
      if (!py::isinstance<py::bool_>(value)) {
        throw TypeError(concat(op.name, ": ", spec.name, ": expected True or False, got ",
                               std::string(py::repr(value))));
      }
      return static_cast<int64_t>(py::cast<bool>(value));
    case AttrKind::kInt:
      if (py::isinstance<py::bool_>(value)) break;
      return cast_attribute<int64_t>(op, spec, value, "an integer");
    case AttrKind::kFloat:
      return cast_attribute<double>(op, spec, value, "a number");
    case AttrKind::kChoice: {
      const auto text = cast_attribute<std::string>(op, spec, value, "a string");
      std::string choices;
      for (size_t i = 0; i < spec.choices.size(); ++i) {
        if (text == spec.choices[i]) return static_cast<int64_t>(i);
        choices += (i ? ", '" : "'") + std::string(spec.choices[i]) + "'";
      }
      throw ValueError(
          concat(op.name, ": ", spec.name, ": expected one of ", choices, ", got '", text, "'"));
    }
    case AttrKind::kInts:
      return cast_attribute<std::vector<int64_t>>(op, spec, value, "a sequence of integers");
    case AttrKind::kFloats:
      return cast_attribute<std::vector<double>>(op, spec, value, "a sequence of numbers");
  }
  throw TypeError(concat(op.name, ": ", spec.name, ": expected an integer, got ",
                         std::string(py::repr(value))));
}

void set_attributes(Call& call, const py::dict& attributes) {
  for (const AttrSpec& spec : call.op->attributes) {
    PyObject* value = PyDict_GetItemString(attributes.ptr(), spec.name);
    if (value == nullptr) throw TypeError(concat(call.op->name, ": ", spec.name, " is missing"));
    call.attributes.push_back(attribute_of(*call.op, spec, value));
  }
}

// Every operand of the op in order as (dtype, shape), None where it is absent.
template <class Specs, class Tensors>
void set_operands(const Op& op, const Specs& specs, const py::sequence& values, Tensors& tensors) {
  if (values.size() != specs.size()) {
    throw ValueError(
        concat(op.name, ": expected ", specs.size(), " operands, got ", values.size()));
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    const py::object value = values[i];
    if (value.is_none()) continue;
    const auto array = py::cast<py::tuple>(value);
    tensors[i] = tensor_spec(dtype_from_name(py::cast<std::string>(array[0])),
                             shape_of(op, specs[i].name, array[1]));
  }
}

template <class Specs, class Tensors>
void set_addresses(const Op& op, const Specs& specs, const std::vector<uintptr_t>& addresses,
                   Tensors& tensors) {
  if (addresses.size() != specs.size()) {
    throw ValueError(
        concat(op.name, ": expected ", specs.size(), " addresses, got ", addresses.size()));
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    tensors[i].data = reinterpret_cast<void*>(addresses[i]);
  }
}

// The outputs of a call, in order: (dtype, shape), or None for those that it does not produce.
py::list infer(const std::string& name, const py::sequence& inputs, const py::dict& attributes,
               uint32_t wanted) {
  Call call;
  call.op = &op_called(name);
  call.wanted = wanted;
  set_operands(*call.op, call.op->inputs, inputs, call.inputs);
  set_attributes(call, attributes);
  call.op->infer(call);
  py::list result;
  for (size_t i = 0; i < call.op->outputs.size(); ++i) {
    const Tensor& output = call.outputs[i];
    if (!output.present) {
      result.append(py::none());
      continue;
    }
    py::tuple shape(output.shape.rank());
    for (int axis = 0; axis < output.shape.rank(); ++axis) shape[axis] = output.shape[axis];
    result.append(py::make_tuple(dtype_name(output.dtype), shape));
  }
  return result;
}

void launch(const std::string& name, const py::sequence& inputs,
            const std::vector<uintptr_t>& input_addresses, const py::dict& attributes,
            uint32_t wanted, const py::sequence& outputs,
            const std::vector<uintptr_t>& output_addresses, int cuda_device, uintptr_t stream) {
  Call call;
  call.op = &op_called(name);
  call.wanted = wanted;
  set_operands(*call.op, call.op->inputs, inputs, call.inputs);
  set_addresses(*call.op, call.op->inputs, input_addresses, call.inputs);
  set_operands(*call.op, call.op->outputs, outputs, call.outputs);
  set_addresses(*call.op, call.op->outputs, output_addresses, call.outputs);
  set_attributes(call, attributes);
  check_outputs(call);
  Context context;
  context.device = cuda_device;
  context.stream = reinterpret_cast<void*>(stream);
  const auto function = cuda_device < 0 ? call.op->launch_cpu : call.op->launch_cuda;
  if (function == nullptr) {
    throw std::runtime_error(concat(name, ": this build has no CUDA kernels"));
  }
  py::gil_scoped_release release;
  function(context, call);
}

const char* kind_name(AttrKind kind) {
  switch (kind) {
    case AttrKind::kBool:
      return "bool";
    case AttrKind::kInt:
      return "int";
    case AttrKind::kFloat:
      return "float";
    case AttrKind::kChoice:
      return "choice";
    case AttrKind::kInts:
      return "ints";
    case AttrKind::kFloats:
      return "floats";
  }
  return "";
}

const char* kind_name(InputKind kind) {
  switch (kind) {
    case InputKind::kField:
      return "field";
    case InputKind::kImage:
      return "image";
    case InputKind::kCompared:
      return "compared";
  }
  return "";
}

const char* role_name(OutputRole role) {
  switch (role) {
    case OutputRole::kResult:
      return "result";
    case OutputRole::kWorkspace:
      return "workspace";
    case OutputRole::kUnitGradient:
      return "unit_gradient";
    case OutputRole::kSaved:
      return "saved";
  }
  return "";
}

py::dict describe_ops() {
  py::dict table;
  for (const Op& op : op_table()) {
    py::list inputs, outputs, attributes;
    for (const InputSpec& input : op.inputs) {
      const char* kind = kind_name(input.kind);
      inputs.append(py::make_tuple(input.name, input.optional, kind));
    }
    for (const OutputSpec& output : op.outputs) {
      outputs.append(py::make_tuple(output.name, role_name(output.role)));
    }
    for (const AttrSpec& spec : op.attributes) {
      py::list choices;
      for (const char* choice : spec.choices) choices.append(choice);
      attributes.append(py::make_tuple(spec.name, kind_name(spec.kind), py::tuple(choices)));
    }
    py::dict entry;
    entry["inputs"] = py::tuple(inputs);
    entry["outputs"] = py::tuple(outputs);
    entry["attributes"] = py::tuple(attributes);
    entry["gradient"] = op.gradient == nullptr ? py::object(py::none()) : py::str(op.gradient);
    table[op.name] = entry;
  }
  return table;
}

py::dict xla_registrations(const std::string& platform) {
  py::dict result;
  for (const XlaHandler& handler : xla_handlers(platform)) {
    result[py::str(handler.name)] = py::capsule(handler.function);
  }
  return result;
}

std::vector<std::string> cuda_architectures() {
#ifdef REGCORE_CUDA
  std::vector<std::string> result;
  std::string list = REGCORE_CUDA_ARCHITECTURES;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    result.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
#else
  return {};
#endif
}

int cuda_device_count() {
#ifdef REGCORE_CUDA
  int count = 0;
  // Without a driver this is an error; there are no devices then.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_regcore, module) {
  module.doc() = "Registration kernels, as jaxreg and torchreg call them.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ValueError& error) {
      py::set_error(PyExc_ValueError, error.what());
    } catch (const TypeError& error) {
      py::set_error(PyExc_TypeError, error.what());
    }
  });
  module.attr("__version__") = REGCORE_VERSION;
  module.def("ops", &describe_ops);
  module.def("infer", &infer, py::arg("op"), py::arg("inputs"), py::arg("attributes"),
             py::arg("wanted"));
  module.def("launch", &launch, py::arg("op"), py::arg("inputs"), py::arg("input_addresses"),
             py::arg("attributes"), py::arg("wanted"), py::arg("outputs"),
             py::arg("output_addresses"), py::arg("cuda_device"), py::arg("stream"));
  module.def("xla_registrations", &xla_registrations, py::arg("platform"));
  module.def("xla_ffi_api_version", &xla_ffi_api_version);
  module.def("cuda_architectures", &cuda_architectures);
  module.def("cuda_device_count", &cuda_device_count);
  module.def("num_threads", &num_threads);
}

}  // namespace reg

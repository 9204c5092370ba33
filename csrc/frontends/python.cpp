// The extension module: the op table as plain Python functions. Arrays arrive as (dtype, shape),
// and for a launch with their addresses beside them; this file knows no framework.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/op.h"
#include "core/thread_pool.h"
#include "frontends/attributes.h"
#include "frontends/python_call.h"
#include "frontends/tensor_op.h"
#include "frontends/xla.h"
#ifdef REGKERNELS_CUDA
#include "core/cuda_runtime.h"
#endif

namespace py = pybind11;

namespace regkernels {

namespace {

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

DType dtype_of(const Op& op, const char* name, const py::handle& value) {
  const auto text = py::cast<std::string>(value);
  const DType dtype = dtype_from_name(text);
  if (dtype == DType::kInvalid) {
    throw TypeError(concat(op.name, ": ", name,
                           ": expected a dtype of numbers of at most 64 bits, got ", text));
  }
  return dtype;
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
    tensors[i] =
        tensor_spec(dtype_of(op, specs[i].name, array[0]), shape_of(op, specs[i].name, array[1]));
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

Call inferred_call(const std::string& name, const py::sequence& inputs, const py::dict& attributes,
                   uint32_t wanted, const Slab& slab = {}) {
  Call call;
  call.op = &op_called(name);
  call.wanted = wanted;
  set_operands(*call.op, call.op->inputs, inputs, call.inputs);
  call.attributes = AttributeReader::of(*call.op).read(attributes);
  call.slab = slab;
  check_slab(call);
  call.op->infer(call);
  return call;
}

// The outputs of a call, in order: (dtype, shape), or None for those that it does not produce.
py::list infer(const std::string& name, const py::sequence& inputs, const py::dict& attributes,
               uint32_t wanted, const std::vector<int64_t>& slab) {
  const Call call = inferred_call(name, inputs, attributes, wanted, slab_of_sizes(slab));
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

void launch_called(const std::string& name, const py::sequence& inputs,
                   const std::vector<uintptr_t>& input_addresses, const py::dict& attributes,
                   uint32_t wanted, const py::sequence& outputs,
                   const std::vector<uintptr_t>& output_addresses, int cuda_device,
                   uintptr_t stream) {
  Call call = inferred_call(name, inputs, attributes, wanted);
  set_addresses(*call.op, call.op->inputs, input_addresses, call.inputs);
  std::array<Tensor, kMaxOperands> given;
  set_operands(*call.op, call.op->outputs, outputs, given);
  set_addresses(*call.op, call.op->outputs, output_addresses, given);
  set_outputs(call, given);
  Context context;
  context.device = cuda_device;
  context.stream = reinterpret_cast<void*>(stream);
  launch_released(context, call, cuda_device >= 0);
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
    case InputKind::kLabels:
      return "labels";
    case InputKind::kCounts:
      return "counts";
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
    case OutputRole::kWeight:
      return "weight";
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
#ifdef REGKERNELS_CUDA
  std::vector<std::string> result;
  std::string list = REGKERNELS_CUDA_ARCHITECTURES;
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
#ifdef REGKERNELS_CUDA
  int count = 0;
  // Without a driver this is an error; there are no devices then.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_core, module) {
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
  module.attr("__version__") = REGKERNELS_VERSION;
  module.def("ops", &describe_ops);
  module.def("infer", &infer, py::arg("op"), py::arg("inputs"), py::arg("attributes"),
             py::arg("wanted"), py::arg("slab") = std::vector<int64_t>{});
  module.def("launch", &launch_called, py::arg("op"), py::arg("inputs"), py::arg("input_addresses"),
             py::arg("attributes"), py::arg("wanted"), py::arg("outputs"),
             py::arg("output_addresses"), py::arg("cuda_device"), py::arg("stream"));
  py::class_<TensorFramework, std::shared_ptr<TensorFramework>>(module, "TensorFramework")
      .def(py::init<const py::object&, const py::tuple&, py::object, const py::dict&>(),
           py::arg("exchange"), py::arg("types"), py::arg("empty"), py::arg("dtypes"));
  py::class_<TensorOp>(module, "TensorOp")
      .def(py::init<std::shared_ptr<TensorFramework>, const std::string&,
                    std::vector<std::optional<uint32_t>>>(),
           py::arg("framework"), py::arg("op"), py::arg("wanted"))
      .def("launch", &TensorOp::launch, py::arg("operands"), py::arg("attributes"),
           py::arg("wanted"))
      .def("forward", &TensorOp::forward, py::arg("operands"), py::arg("attributes"),
           py::arg("is_recording"));
  module.def("xla_registrations", &xla_registrations, py::arg("platform"));
  module.def("xla_ffi_api_version", &xla_ffi_api_version);
  module.def("cuda_architectures", &cuda_architectures);
  module.def("cuda_device_count", &cuda_device_count);
  module.def("num_threads", &num_threads);
}

}  // namespace regkernels

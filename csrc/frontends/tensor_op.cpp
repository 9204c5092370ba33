#include "frontends/tensor_op.h"

#include <algorithm>
#include <utility>

#include "frontends/python_call.h"

namespace py = pybind11;

namespace regkernels {

namespace {

// kInvalid for those that no op knows.
DType dtype_of(const dlpack::ElementType& type) {
  if (type.lanes != 1) return DType::kInvalid;
  switch (type.code << 8 | type.bits) {
    case dlpack::kFloat << 8 | 32:
      return DType::kFloat32;
    case dlpack::kFloat << 8 | 64:
      return DType::kFloat64;
    case dlpack::kFloat << 8 | 16:
      return DType::kFloat16;
    case dlpack::kBFloat << 8 | 16:
      return DType::kBFloat16;
    case dlpack::kBool << 8 | 8:
      return DType::kBool;
    case dlpack::kInt << 8 | 8:
      return DType::kInt8;
    case dlpack::kInt << 8 | 16:
      return DType::kInt16;
    case dlpack::kInt << 8 | 32:
      return DType::kInt32;
    case dlpack::kInt << 8 | 64:
      return DType::kInt64;
    case dlpack::kUInt << 8 | 8:
      return DType::kUInt8;
    case dlpack::kUInt << 8 | 16:
      return DType::kUInt16;
    case dlpack::kUInt << 8 | 32:
      return DType::kUInt32;
    case dlpack::kUInt << 8 | 64:
      return DType::kUInt64;
    default:
      return DType::kInvalid;
  }
}

bool is_contiguous(const dlpack::View& view) {
  int64_t count = 1;
  bool in_order = true;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    if (view.shape[axis] != 1 && view.strides[axis] != count) in_order = false;
    count *= view.shape[axis];
  }
  return in_order || count == 0;
}

// Whether the operands have dtypes that the kernels take together, so that nothing is converted.
bool have_one_arithmetic(const Call& call) {
  DType arithmetic = DType::kInvalid;
  bool has_half = false;
  for (size_t i = 0; i < call.op->inputs.size(); ++i) {
    const Tensor& input = call.inputs[i];
    if (!input.present || is_integer(input.dtype)) continue;
    if (is_half(input.dtype)) {
      if (call.op->inputs[i].kind != InputKind::kImage) return false;
      has_half = true;
    } else if (arithmetic == DType::kInvalid) {
      arithmetic = input.dtype;
    } else if (arithmetic != input.dtype) {
      return false;
    }
  }
  return !has_half || arithmetic != DType::kFloat64;
}

bool is_plain_number(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value);
}

// Whether all attributes are Python's own numbers and strings.
bool are_plain(const py::dict& attributes) {
  for (const auto& [name, value] : attributes) {
    PyObject* item = value.ptr();
    if (is_plain_number(item) || PyUnicode_CheckExact(item)) continue;
    if (!PyTuple_CheckExact(item)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(item); ++i) {
      if (!is_plain_number(PyTuple_GET_ITEM(item, i))) return false;
    }
  }
  return true;
}

// What calls ask tensors by. It lives as long as the process: strings cannot be given back once
// Python is gone.
struct Names {
  py::str requires_grad = interned("requires_grad"), is_neg = interned("is_neg"),
          device = interned("device");
  py::tuple dtype_and_device = py::make_tuple(interned("dtype"), interned("device"));
};

const Names& names() {
  static const Names* const names = new Names;
  return *names;
}

py::object attribute(const py::handle& of, const py::str& name) {
  PyObject* value = PyObject_GetAttr(of.ptr(), name.ptr());
  if (value == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

bool is_lazily_negated(PyObject* tensor) {
  PyObject* answer = PyObject_CallMethodNoArgs(tensor, names().is_neg.ptr());
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer).ptr() == Py_True;
}

void* address(const dlpack::View& view) { return static_cast<char*>(view.data) + view.byte_offset; }

}  // namespace

TensorFramework::TensorFramework(const py::object& capsule, const py::tuple& tensor_types,
                                 py::object make, const py::dict& dtypes_by_name)
    : empty(std::move(make)) {
  exchange = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (exchange == nullptr) throw py::error_already_set();
  if (exchange->version.major != dlpack::kMajorVersion || exchange->view == nullptr) {
    throw ValueError("no functions of DLPack 1 that look into tensors");
  }
  for (const py::handle& type : tensor_types) types.push_back(py::cast<py::object>(type));
  for (const auto& [name, dtype] : dtypes_by_name) {
    dtypes[static_cast<size_t>(dtype_from_name(py::cast<std::string>(name)))] =
        py::cast<py::object>(dtype);
  }
}

dlpack::View TensorFramework::view(const py::handle& tensor) const {
  dlpack::View view;
  if (exchange->view(tensor.ptr(), &view) != 0) throw py::error_already_set();
  return view;
}

py::object TensorFramework::make_empty(const Tensor& spec, bool has_group_axis,
                                       const py::object& device) const {
  const int first = has_group_axis ? 0 : 1;
  py::tuple shape(spec.shape.rank() - first);
  for (int axis = first; axis < spec.shape.rank(); ++axis) {
    PyTuple_SET_ITEM(shape.ptr(), axis - first, PyLong_FromLongLong(spec.shape[axis]));
  }
  PyObject* const arguments[] = {shape.ptr(), dtypes[static_cast<size_t>(spec.dtype)].ptr(),
                                 device.ptr()};
  PyObject* tensor = PyObject_Vectorcall(empty.ptr(), arguments, 1, names().dtype_and_device.ptr());
  if (tensor == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

TensorOp::TensorOp(std::shared_ptr<TensorFramework> framework, const std::string& name,
                   std::vector<std::optional<uint32_t>> wanted)
    : framework_(std::move(framework)),
      op_(op_called(name)),
      reader_(AttributeReader::of(op_)),
      wanted_(std::move(wanted)) {}

bool TensorOp::set_operands(Call& call, dlpack::Device& device, const py::tuple& operands) const {
  if (operands.size() != op_.inputs.size()) return false;
  bool is_first = true;
  for (size_t i = 0; i < op_.inputs.size(); ++i) {
    PyObject* operand = PyTuple_GET_ITEM(operands.ptr(), i);
    if (operand == Py_None) {
      if (!op_.inputs[i].optional) return false;
      continue;
    }
    const bool is_tensor = std::any_of(
        framework_->types.begin(), framework_->types.end(), [&](const py::object& type) {
          return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(operand));
        });
    if (!is_tensor) return false;
    dlpack::View view;
    if (framework_->exchange->view(operand, &view) != 0) {
      PyErr_Clear();  // Not a tensor with memory of its own.
      return false;
    }
    if (is_first) {
      if (view.device.type != dlpack::kCpu && view.device.type != dlpack::kCuda) return false;
      device = view.device;
      is_first = false;
    }
    if (!(view.device == device) || view.rank >= kMaxRank || !is_contiguous(view)) return false;
    Tensor& tensor = call.inputs[i];
    tensor.present = true;
    tensor.dtype = dtype_of(view.dtype);
    tensor.shape = {1};
    for (int axis = 0; axis < view.rank; ++axis) tensor.shape.append(view.shape[axis]);
    tensor.data = address(view);
    // Zeros that nobody has written to memory have no address.
    const bool is_lazy = view.data == nullptr && tensor.shape.count() > 0;
    if (tensor.dtype == DType::kInvalid || is_lazy || is_lazily_negated(operand)) return false;
  }
  return !is_first && have_one_arithmetic(call);
}

py::list TensorOp::run(Call& call, const dlpack::Device& device, const py::tuple& operands,
                       const py::dict& attributes) const {
  call.attributes = reader_.read(attributes);
  op_.infer(call);
  py::object framework_device;
  for (const py::handle& operand : operands) {
    if (!operand.is_none()) framework_device = attribute(operand, names().device);
  }
  py::list outputs(op_.outputs.size());
  // Workspaces go back to the framework's allocator as soon as the launch is queued: it hands them
  // out again only to work that comes later on this stream.
  std::array<py::object, kMaxOperands> internal;
  for (size_t i = 0; i < op_.outputs.size(); ++i) {
    const OutputRole role = op_.outputs[i].role;
    Tensor& output = call.outputs[i];
    py::object tensor = py::none();
    if (output.present) {
      // A workspace has whatever shape its op likes: the first axis need not be that of groups.
      tensor = framework_->make_empty(output, role == OutputRole::kWorkspace, framework_device);
      output.data = address(framework_->view(tensor));
    }
    if (role == OutputRole::kWorkspace || role == OutputRole::kWeight) {
      internal[i] = std::exchange(tensor, py::none());
    }
    outputs[i] = std::move(tensor);
  }
  Context context;
  const bool cuda = device.type == dlpack::kCuda;
  if (cuda) {
    context.device = device.index;
    if (framework_->exchange->current_stream(device.type, device.index, &context.stream) != 0) {
      throw py::error_already_set();
    }
  }
  launch_released(context, call, cuda);
  return outputs;
}

py::object TensorOp::launch(const py::tuple& operands, const py::dict& attributes,
                            uint32_t wanted) const {
  Call call;
  call.op = &op_;
  call.wanted = wanted;
  dlpack::Device device;
  if (!are_plain(attributes) || !set_operands(call, device, operands)) return py::none();
  return run(call, device, operands, attributes);
}

py::object TensorOp::forward(const py::tuple& operands, const py::dict& attributes,
                             bool is_recording) const {
  Call call;
  call.op = &op_;
  dlpack::Device device;
  if (!are_plain(attributes) || !set_operands(call, device, operands)) return py::none();
  size_t choice = 0;
  py::tuple needs(op_.inputs.size());
  for (size_t i = 0; i < op_.inputs.size(); ++i) {
    py::object need = py::bool_(false);
    if (is_recording && call.inputs[i].present) {
      need = attribute(operands[i], names().requires_grad);
      if (need.ptr() == Py_True) choice |= size_t{1} << i;
    }
    needs[i] = std::move(need);
  }
  if (choice >= wanted_.size() || !wanted_[choice]) return py::none();
  call.wanted = *wanted_[choice];
  return py::make_tuple(needs, run(call, device, operands, attributes));
}

}  // namespace regkernels

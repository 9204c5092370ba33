#include "frontends/attributes.h"

#include <string>
#include <unordered_map>
#include <utility>

#include "core/errors.h"
#include "frontends/python_call.h"

namespace py = pybind11;

namespace regkernels {

namespace {

// A value as Python writes it, unless that is a page long or an error of its own.
std::string text_of(const py::handle& value) {
  try {
    const auto text = std::string(py::repr(value));
    if (text.size() <= 100) return text;
  } catch (const py::error_already_set&) {
  }
  return concat("a value of type ", Py_TYPE(value.ptr())->tp_name);
}

// What an attribute has to be, for its conversions and their errors.
struct ValueReader {
  const Op& op;
  const AttrSpec& spec;
  const py::handle& value;
  const char* expected;

  [[noreturn]] void fail_type() const {
    throw TypeError(
        concat(op.name, ": ", spec.name, ": expected ", expected, ", got ", text_of(value)));
  }
  [[noreturn]] void fail_value(const std::string& instead) const {
    throw ValueError(
        concat(op.name, ": ", spec.name, ": expected ", instead, ", got ", text_of(value)));
  }

  // The casts of pybind11 take True for 1, and 2.5 for 2 where it comes as something else than a
  // float. An array of one number is none: to read it might wait for a device, or freeze a value
  // that is being traced.
  void check_scalar(const py::handle& scalar) const {
    if (PyBool_Check(scalar.ptr()) || py::hasattr(scalar, "shape")) fail_type();
  }
  // Whether a conversion failed because Python cannot do it at all.
  bool is_refusal() const {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return false;
    PyErr_Clear();
    return true;
  }

  int64_t integer(const py::handle& scalar) const {
    if (!PyLong_CheckExact(scalar.ptr())) check_scalar(scalar);
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(scalar.ptr()));
    if (!index) {
      if (is_refusal()) fail_type();
      throw py::error_already_set();
    }
    int overflow = 0;
    const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) fail_value("integers of at most 64 bits");
    return result;
  }

  double number(const py::handle& scalar) const {
    if (PyFloat_CheckExact(scalar.ptr())) return PyFloat_AS_DOUBLE(scalar.ptr());
    check_scalar(scalar);
    const double result = PyFloat_AsDouble(scalar.ptr());
    if (result == -1 && PyErr_Occurred()) {
      if (is_refusal()) fail_type();
      if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
      PyErr_Clear();
      fail_value("numbers of at most 1.8e308");
    }
    return result;
  }

  template <class T>
  std::vector<T> sequence(T (ValueReader::*read)(const py::handle&) const) const {
    if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr())) fail_type();
    std::vector<T> result;
    for (const py::handle& scalar : value) result.push_back((this->*read)(scalar));
    return result;
  }
};

AttrValue value_of(const Op& op, const AttrSpec& spec, const std::vector<py::str>& choices,
                   const py::handle& value) {
  auto reader = [&](const char* expected) { return ValueReader{op, spec, value, expected}; };
  switch (spec.kind) {
    case AttrKind::kBool:
      if (!PyBool_Check(value.ptr())) reader("True or False").fail_type();
      return static_cast<int64_t>(value.ptr() == Py_True);
    case AttrKind::kInt:
      return reader("an integer").integer(value);
    case AttrKind::kFloat:
      return reader("a number").number(value);
    case AttrKind::kChoice: {
      if (!PyUnicode_Check(value.ptr())) reader("a string").fail_type();
      for (size_t i = 0; i < choices.size(); ++i) {
        // What is written as a literal is the very same string.
        if (value.is(choices[i]) || PyUnicode_Compare(value.ptr(), choices[i].ptr()) == 0) {
          return static_cast<int64_t>(i);
        }
      }
      std::string known;
      for (const char* choice : spec.choices) {
        known += (known.empty() ? "'" : ", '") + std::string(choice) + "'";
      }
      reader("a string").fail_value("one of " + known);
    }
    case AttrKind::kInts:
      return reader("a sequence of integers").sequence<int64_t>(&ValueReader::integer);
    case AttrKind::kFloats:
      return reader("a sequence of numbers").sequence<double>(&ValueReader::number);
  }
  throw std::logic_error("unknown attribute kind");
}

}  // namespace

AttributeReader::AttributeReader(const Op& op) : op_(op) {
  for (const AttrSpec& spec : op.attributes) {
    Attribute attribute{&spec, interned(spec.name), {}};
    for (const char* choice : spec.choices) attribute.choices.push_back(interned(choice));
    attributes_.push_back(std::move(attribute));
  }
}

const AttributeReader& AttributeReader::of(const Op& op) {
  // It lives as long as the process: strings cannot be given back once Python is gone.
  static auto* const readers = new std::unordered_map<const Op*, AttributeReader>;
  return readers->try_emplace(&op, op).first->second;
}

std::vector<AttrValue> AttributeReader::read(const py::dict& attributes) const {
  std::vector<AttrValue> values;
  values.reserve(attributes_.size());
  for (const Attribute& attribute : attributes_) {
    PyObject* value = PyDict_GetItemWithError(attributes.ptr(), attribute.name.ptr());
    if (value == nullptr) {
      throw TypeError(concat(op_.name, ": ", attribute.spec->name, " is missing"));
    }
    values.push_back(value_of(op_, *attribute.spec, attribute.choices, value));
  }
  return values;
}

}  // namespace regkernels

// What calls from Python share: names, the op of a name, and a launch that lets other threads run.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/errors.h"
#include "core/op.h"

namespace regkernels {

inline pybind11::str interned(const char* text) {
  return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(text));
}

inline const Op& op_called(const std::string& name) {
  const Op* op = find_op(name);
  if (op == nullptr) throw ValueError("no op is called " + name);
  return *op;
}

inline void launch_released(const Context& context, const Call& call, bool cuda) {
  if (cuda && call.op->launch_cuda == nullptr) {
    throw std::runtime_error(concat(call.op->name, ": this build has no CUDA kernels"));
  }
  const pybind11::gil_scoped_release release;
  launch(context, call, cuda);
}

}  // namespace regkernels

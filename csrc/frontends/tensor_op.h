// Ops called with the tensors of a framework as they are: one call from Python that looks into the
// operands, infers, allocates and launches. It serves what is plain, and declines the rest.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/op.h"
#include "frontends/attributes.h"
#include "frontends/dlpack.h"

namespace regkernels {

// A framework's tensors: how they are recognised, looked into and made.
struct TensorFramework {
  const dlpack::Exchange* exchange;
  std::vector<pybind11::object> types;  // of tensors that are what they look like
  pybind11::object empty;               // empty(shape, dtype=, device=)
  std::array<pybind11::object, kDTypeCount> dtypes;

  // `exchange` is the capsule of the tensors' class, `dtypes` the framework's own by their names.
  TensorFramework(const pybind11::object& exchange, const pybind11::tuple& types,
                  pybind11::object empty, const pybind11::dict& dtypes);

  dlpack::View view(const pybind11::handle& tensor) const;
  pybind11::object make_empty(const Tensor& spec, bool has_group_axis,
                              const pybind11::object& device) const;
};

class TensorOp {
 public:
  // `wanted`: for each choice of inputs that require a gradient, the first of them as the lowest
  // bit of its number, the outputs to ask for. A choice that is not there is declined.
  TensorOp(std::shared_ptr<TensorFramework> framework, const std::string& name,
           std::vector<std::optional<uint32_t>> wanted);

  // The outputs by their places, None for those that are absent or workspaces; or None for a call
  // that is declined, before anything is done for it. Raises what shape inference does.
  pybind11::object launch(const pybind11::tuple& operands, const pybind11::dict& attributes,
                          uint32_t wanted) const;

  // The same for the outputs that a call with these operands asks for, beside which of the inputs
  // require a gradient: (needs, outputs). Without `is_recording` none does.
  pybind11::object forward(const pybind11::tuple& operands, const pybind11::dict& attributes,
                           bool is_recording) const;

 private:
  bool set_operands(Call& call, dlpack::Device& device, const pybind11::tuple& operands) const;
  pybind11::list run(Call& call, const dlpack::Device& device, const pybind11::tuple& operands,
                     const pybind11::dict& attributes) const;

  std::shared_ptr<TensorFramework> framework_;
  const Op& op_;
  const AttributeReader& reader_;
  std::vector<std::optional<uint32_t>> wanted_;
};

}  // namespace regkernels

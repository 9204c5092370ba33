// The attributes of a call, as they come from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "core/op.h"

namespace regkernels {

// Reads the attributes of an op by name. It has the names as Python's own strings, so that a call
// makes none.
class AttributeReader {
 public:
  explicit AttributeReader(const Op& op);

  // The one of an op of the table.
  static const AttributeReader& of(const Op& op);

  // In the order of their declaration. Raises for one that is missing, or not what it has to be.
  std::vector<AttrValue> read(const pybind11::dict& attributes) const;

 private:
  struct Attribute {
    const AttrSpec* spec;
    pybind11::str name;
    std::vector<pybind11::str> choices;
  };

  const Op& op_;
  std::vector<Attribute> attributes_;
};

}  // namespace regkernels

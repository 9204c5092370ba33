// The two errors that bad input can cause. Frontends translate them into Python's own.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace regkernels {

struct ValueError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace regkernels

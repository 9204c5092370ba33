// The op table as XLA FFI handlers.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace regkernels {

struct XlaHandler {
  std::string name;
  void* function;  // XLA_FFI_Handler*
};

// One handler per op that has a launch for the platform ("cpu" or "cuda").
std::vector<XlaHandler> xla_handlers(const std::string& platform);

std::pair<int, int> xla_ffi_api_version();

}  // namespace regkernels

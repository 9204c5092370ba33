// What a call needs of DLPack's exchange of tensors in C, laid out in memory as its specification
// has it since version 1.3: a look into a tensor of a framework, and the stream that its work is
// queued on. The framework hands the functions over in a capsule, so that it need not be linked.
#pragma once

#include <cstdint>

namespace regkernels::dlpack {

inline constexpr const char* kCapsuleName = "dlpack_exchange_api";
inline constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
  int32_t type;
  int32_t index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBFloat = 4,
  kComplex = 5,
  kBool = 6,
};

struct ElementType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// A tensor as its framework has it, until control goes back to the framework.
struct View {
  void* data;
  Device device;
  int32_t rank;
  ElementType dtype;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  struct {
    uint32_t major;
    uint32_t minor;
  } version;
  const void* older;
  // Functions that make and hand over tensors that own their memory.
  const void* owning[3];
  // Both return 0, or something else with a Python exception set. A framework may have no `view`.
  int (*view)(void* tensor, View* view);
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};

}  // namespace regkernels::dlpack

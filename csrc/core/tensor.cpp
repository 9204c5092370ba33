#include "core/tensor.h"

#include <utility>

namespace regkernels {

namespace {

constexpr std::pair<DType, const char*> kDTypeNames[] = {
    {DType::kFloat32, "float32"},
    {DType::kFloat64, "float64"},
    {DType::kFloat16, "float16"},
    {DType::kBFloat16, "bfloat16"},
    {DType::kBool, "bool"},
    {DType::kInt8, "int8"},
    {DType::kUInt8, "uint8"},
    {DType::kInt16, "int16"},
    {DType::kUInt16, "uint16"},
    {DType::kInt32, "int32"},
    {DType::kUInt32, "uint32"},
    {DType::kInt64, "int64"},
    {DType::kUInt64, "uint64"},
    {DType::kComplex64, "complex64"},
    {DType::kComplex128, "complex128"},
};

}  // namespace

const char* dtype_name(DType dtype) {
  for (const auto& [known, name] : kDTypeNames) {
    if (known == dtype) return name;
  }
  return "an unsupported dtype";
}

DType dtype_from_name(const std::string& name) {
  for (const auto& [known, known_name] : kDTypeNames) {
    if (name == known_name) return known;
  }
  return DType::kInvalid;
}

}  // namespace regkernels

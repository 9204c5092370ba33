// Plain views of the memory that a framework hands over: a pointer, a dtype, a row-major shape.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace regkernels {

// Kernels know some of these; the rest are here so that an error can say what came.
enum class DType : int {
  kInvalid,
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kBool,
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
  kComplex64,
  kComplex128,
};
inline constexpr int kDTypeCount = static_cast<int>(DType::kComplex128) + 1;

inline bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }
inline bool is_integer(DType dtype) { return dtype >= DType::kBool && dtype <= DType::kUInt64; }

const char* dtype_name(DType dtype);
DType dtype_from_name(const std::string& name);  // kInvalid when the name is none of ours

inline constexpr int kMaxRank = 8;

class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) {
    for (int64_t dim : dims) append(dim);
  }

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return dims_[axis]; }
  int64_t& operator[](int axis) { return dims_[axis]; }
  const int64_t* begin() const { return dims_.data(); }
  const int64_t* end() const { return dims_.data() + rank_; }
  void append(int64_t dim) { dims_[rank_++] = dim; }

  // Product of the axes from `first` on.
  int64_t count(int first = 0) const {
    int64_t product = 1;
    for (int axis = first; axis < rank_; ++axis) product *= dims_[axis];
    return product;
  }

  bool operator==(const Shape& other) const {
    if (rank_ != other.rank_) return false;
    for (int axis = 0; axis < rank_; ++axis) {
      if (dims_[axis] != other.dims_[axis]) return false;
    }
    return true;
  }
  bool operator!=(const Shape& other) const { return !(*this == other); }

 private:
  int rank_ = 0;
  std::array<int64_t, kMaxRank> dims_{};
};

// `present` distinguishes an operand that was not given, or an output that nobody asked for, from
// an empty one. During shape inference `data` is null throughout.
struct Tensor {
  bool present = false;
  DType dtype = DType::kInvalid;
  Shape shape;
  void* data = nullptr;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline Tensor tensor_spec(DType dtype, const Shape& shape) { return {true, dtype, shape, nullptr}; }

}  // namespace regkernels

// The checks that every op's shape inference is made of. Each failure names op and argument, what
// was expected and what came. Shapes in messages are the user's: without the group axis.
#pragma once

#include <string>
#include <vector>

#include "core/op.h"

namespace regkernels {

// "float32 (2, 1, 5, 6, 7)" as the user sees it.
std::string describe(const Tensor& tensor);

[[noreturn]] void fail_value(const Call& call, const char* argument, const std::string& expected,
                             const std::string& got);
[[noreturn]] void fail_type(const Call& call, const char* argument, const std::string& expected,
                            const std::string& got);
[[noreturn]] void fail_shape(const Call& call, const char* argument, const std::string& expected);

// The dtype that the call computes in, float32 or float64. All present inputs have it, except for
// labels, which are integers; images may instead be stored in half precision where it is float32.
DType check_dtypes(const Call& call);

// The two batch axes shared by all present inputs: each is 1 or the common size.
struct Batch {
  int64_t groups = 1;
  int64_t items = 1;
};
Batch check_batch(const Call& call);

// Checks an image (G, N, C, [Z,] Y, X) and returns D, the number of spatial axes.
int check_image(const Call& call, const char* argument);
// Whether a field may have a spatial size of 0, as it may where nothing is sampled from it.
enum class EmptyField { kRefused, kAllowed };
// Checks a field (G, N, [Z,] Y, X, D), or (G, N, D, [Z,] Y, X) with `channels_first`, and returns
// D.
int check_field(const Call& call, const char* argument, EmptyField empty = EmptyField::kRefused,
                bool channels_first = false);
// Checks an affine (G, N, D, D+1).
void check_affine(const Call& call, const char* argument, int dimensions);

// Spatial sizes in (z, y, x) order, z = 1 in 2-D.
struct Sizes {
  int64_t z = 1, y = 1, x = 1;
  int64_t voxels() const { return z * y * x; }
  int64_t rows() const { return z * y; }
  bool operator==(const Sizes& other) const { return z == other.z && y == other.y && x == other.x; }
};
Sizes image_sizes(const Tensor& image);
Sizes field_sizes(const Tensor& field);
// Appends the sizes as D axes.
void append_sizes(Shape& shape, const Sizes& sizes, int dimensions);
// Checks that rows and columns can be counted in 32 bits; their products need 64.
void check_sizes(const Call& call, const char* argument, const Sizes& sizes);

// Checks that the cotangent of an output has exactly that output's dtype and shape.
void check_cotangent(const Call& call, const char* argument, DType dtype, const Shape& shape);

// Shape of the gradient of an input: its own shape, but one per group.
Tensor gradient_spec(const Tensor& input, const Batch& batch);

// How far to step from one group, or item, to the next; 0 where the operand is broadcast.
struct BatchStride {
  int64_t group = 0;
  int64_t item = 0;
};
BatchStride batch_stride(const Tensor& tensor);

}  // namespace regkernels

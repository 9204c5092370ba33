#include "core/check.h"

#include <algorithm>
#include <limits>

namespace regkernels {

namespace {

std::string user_shape(const Shape& shape) {
  std::string text = "(";
  for (int axis = 1; axis < shape.rank(); ++axis) {
    if (axis > 1) text += ", ";
    text += std::to_string(shape[axis]);
  }
  if (shape.rank() == 2) text += ",";
  return text + ")";
}

}  // namespace

std::string describe(const Tensor& tensor) {
  if (!tensor.present) return "None";
  return concat(dtype_name(tensor.dtype), " ", user_shape(tensor.shape));
}

void fail_value(const Call& call, const char* argument, const std::string& expected,
                const std::string& got) {
  throw ValueError(concat(call.op->name, ": ", argument, ": expected ", expected, ", got ", got));
}

void fail_type(const Call& call, const char* argument, const std::string& expected,
               const std::string& got) {
  throw TypeError(concat(call.op->name, ": ", argument, ": expected ", expected, ", got ", got));
}

void fail_shape(const Call& call, const char* argument, const std::string& expected) {
  fail_value(call, argument, "shape " + expected, user_shape(call.input(argument).shape));
}

DType check_dtypes(const Call& call) {
  const std::vector<InputSpec>& specs = call.op->inputs;
  for (size_t i = 0; i < specs.size(); ++i) {
    const Tensor& input = call.inputs[i];
    if (!input.present) {
      if (!specs[i].optional) fail_type(call, specs[i].name, "an array", "None");
      continue;
    }
    if (holds_integers(specs[i].kind)) {
      if (!is_integer(input.dtype)) {
        fail_type(call, specs[i].name, "an integer dtype or bool", dtype_name(input.dtype));
      }
      continue;
    }
    // A field may be half precision here: frontends convert it, and the user need not.
    if (input.dtype != DType::kFloat32 && input.dtype != DType::kFloat64 && !is_half(input.dtype)) {
      fail_type(call, specs[i].name, "float32, float64, float16 or bfloat16",
                dtype_name(input.dtype));
    }
  }
  DType common = DType::kInvalid;
  const char* first = nullptr;
  for (size_t i = 0; i < specs.size(); ++i) {
    const Tensor& input = call.inputs[i];
    if (!input.present || holds_integers(specs[i].kind)) continue;
    const bool is_image = specs[i].kind == InputKind::kImage;
    if (common == DType::kInvalid) {
      common = is_half(input.dtype) ? DType::kFloat32 : input.dtype;
      first = specs[i].name;
    }
    const bool stored_in_half = is_image && is_half(input.dtype) && common == DType::kFloat32;
    if (input.dtype != common && !stored_in_half) {
      fail_type(call, specs[i].name, concat(dtype_name(common), " to go with ", first),
                dtype_name(input.dtype));
    }
  }
  return common == DType::kInvalid ? DType::kFloat32 : common;
}

Batch check_batch(const Call& call) {
  Batch batch;
  const char* item_source = nullptr;
  for (size_t i = 0; i < call.op->inputs.size(); ++i) {
    const Tensor& input = call.inputs[i];
    if (!input.present) continue;
    const char* name = call.op->inputs[i].name;
    // The cotangent of a sum over the items has no axis of items.
    const int64_t groups = input.shape[0], items = input.shape.rank() > 1 ? input.shape[1] : 1;
    if (groups != 1) {
      // Frontends make the groups; a mismatch is a mistake of theirs.
      if (batch.groups != 1 && batch.groups != groups) {
        throw std::logic_error("operands disagree about the number of groups");
      }
      batch.groups = groups;
    }
    if (items != 1) {
      if (item_source != nullptr && batch.items != items) {
        fail_value(call, name, concat("batch size 1 or ", batch.items, ", as ", item_source),
                   std::to_string(items));
      }
      batch.items = items;
      item_source = name;
    }
  }
  return batch;
}

int check_image(const Call& call, const char* argument) {
  const Tensor& image = call.input(argument);
  const int dimensions = image.shape.rank() - 3;
  if (dimensions != 2 && dimensions != 3) {
    fail_shape(call, argument, "(N, C, Y, X) or (N, C, Z, Y, X)");
  }
  for (int axis = 3; axis < image.shape.rank(); ++axis) {
    if (image.shape[axis] < 1) fail_shape(call, argument, "with spatial axes of at least 1");
  }
  check_sizes(call, argument, image_sizes(image));
  return dimensions;
}

int check_field(const Call& call, const char* argument, EmptyField empty, bool channels_first) {
  const Tensor& field = call.input(argument);
  const int rank = field.shape.rank(), dimensions = rank - 3;
  const bool well_formed = (dimensions == 2 || dimensions == 3) &&
                           field.shape[channels_first ? 2 : rank - 1] == dimensions;
  if (!well_formed) {
    fail_shape(
        call, argument,
        channels_first ? "(N, 2, Y, X) or (N, 3, Z, Y, X)" : "(N, Y, X, 2) or (N, Z, Y, X, 3)");
  }
  const int first = channels_first ? 3 : 2;
  for (int axis = first; axis < first + dimensions; ++axis) {
    if (field.shape[axis] < 1 && empty == EmptyField::kRefused) {
      fail_shape(call, argument, "with spatial axes of at least 1");
    }
  }
  check_sizes(call, argument, channels_first ? image_sizes(field) : field_sizes(field));
  return dimensions;
}

void check_affine(const Call& call, const char* argument, int dimensions) {
  const Shape& shape = call.input(argument).shape;
  if (shape.rank() != 4 || shape[2] != dimensions || shape[3] != dimensions + 1) {
    fail_shape(call, argument, concat("(N, ", dimensions, ", ", dimensions + 1, ")"));
  }
}

namespace {

Sizes sizes_before(const Shape& shape, int first, int last) {
  Sizes sizes;
  sizes.x = shape[last];
  sizes.y = shape[last - 1];
  sizes.z = last - first == 2 ? shape[first] : 1;
  return sizes;
}

}  // namespace

Sizes image_sizes(const Tensor& image) {
  return sizes_before(image.shape, 3, image.shape.rank() - 1);
}

Sizes field_sizes(const Tensor& field) {
  return sizes_before(field.shape, 2, field.shape.rank() - 2);
}

void append_sizes(Shape& shape, const Sizes& sizes, int dimensions) {
  if (dimensions == 3) shape.append(sizes.z);
  shape.append(sizes.y);
  shape.append(sizes.x);
}

void check_sizes(const Call& call, const char* argument, const Sizes& sizes) {
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() / 4;
  constexpr int64_t kMaxColumns = 1 << 26;  // the bytes of a row of vectors fit 32 bits
  if (sizes.z > kMaxRows || sizes.y > kMaxRows || sizes.rows() > kMaxRows ||
      sizes.x > kMaxColumns) {
    fail_value(call, argument, concat("at most ", kMaxRows, " rows of ", kMaxColumns, " voxels"),
               concat(sizes.z, " times ", sizes.y, " rows of ", sizes.x));
  }
}

void check_cotangent(const Call& call, const char* argument, DType dtype, const Shape& shape) {
  const Tensor& cotangent = call.input(argument);
  const Tensor want = tensor_spec(dtype, shape);
  Shape broadcast = shape;  // a mapped call may leave the cotangent unmapped
  broadcast[0] = 1;
  if (cotangent.dtype != dtype || (cotangent.shape != shape && cotangent.shape != broadcast)) {
    fail_value(call, argument, describe(want), describe(cotangent));
  }
}

Tensor gradient_spec(const Tensor& input, const Batch& batch) {
  Tensor gradient = tensor_spec(input.dtype, input.shape);
  gradient.shape[0] = batch.groups;
  return gradient;
}

BatchStride batch_stride(const Tensor& tensor) {
  const int64_t item = tensor.shape.count(2);
  BatchStride stride;
  stride.item = tensor.shape[1] == 1 ? 0 : item;
  stride.group = tensor.shape[0] == 1 ? 0 : item * tensor.shape[1];
  return stride;
}

}  // namespace regkernels

#include "frontends/xla.h"

#include <xla/ffi/api/ffi.h>

#include <array>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>

#include "core/op.h"

namespace regkernels {

namespace {

namespace ffi = xla::ffi;

DType dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::F64:
      return DType::kFloat64;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::PRED:
      return DType::kBool;
    case ffi::DataType::S8:
      return DType::kInt8;
    case ffi::DataType::U8:
      return DType::kUInt8;
    case ffi::DataType::S16:
      return DType::kInt16;
    case ffi::DataType::U16:
      return DType::kUInt16;
    case ffi::DataType::S32:
      return DType::kInt32;
    case ffi::DataType::U32:
      return DType::kUInt32;
    case ffi::DataType::S64:
      return DType::kInt64;
    case ffi::DataType::U64:
      return DType::kUInt64;
    case ffi::DataType::C64:
      return DType::kComplex64;
    case ffi::DataType::C128:
      return DType::kComplex128;
    default:
      return DType::kInvalid;
  }
}

Tensor tensor_of(const ffi::AnyBuffer& buffer, bool grouped) {
  const auto dims = buffer.dimensions();
  if (dims.size() + (grouped ? 0 : 1) > kMaxRank) throw ValueError("an array has too many axes");
  Tensor tensor;
  tensor.present = true;
  tensor.dtype = dtype_of(buffer.element_type());
  if (!grouped) tensor.shape.append(1);
  for (int64_t dim : dims) tensor.shape.append(dim);
  tensor.data = buffer.untyped_data();
  return tensor;
}

template <class T>
T attribute(const ffi::Dictionary& attributes, const char* name) {
  auto value = attributes.get<T>(name);
  if (value.has_error()) {
    throw ValueError(concat("attribute ", name, ": ", value.error().message()));
  }
  return *value;
}

AttrValue attribute_value(const ffi::Dictionary& attributes, const AttrSpec& spec) {
  switch (spec.kind) {
    case AttrKind::kBool:
    case AttrKind::kInt:
    case AttrKind::kChoice:
      return attribute<int64_t>(attributes, spec.name);
    case AttrKind::kFloat:
      return attribute<double>(attributes, spec.name);
    case AttrKind::kInts: {
      const auto values = attribute<ffi::Span<const int64_t>>(attributes, spec.name);
      return std::vector<int64_t>(values.begin(), values.end());
    }
    case AttrKind::kFloats: {
      const auto values = attribute<ffi::Span<const double>>(attributes, spec.name);
      return std::vector<double>(values.begin(), values.end());
    }
  }
  throw std::logic_error("unknown attribute kind");
}

// The attribute `slab` is empty, or has the sizes of a Slab. Where that begins comes as one
// argument more, after the inputs.
Slab slab_of(const ffi::Dictionary& attributes) {
  const auto sizes = attribute<ffi::Span<const int64_t>>(attributes, "slab");
  return slab_of_sizes({sizes.begin(), sizes.end()});
}

// Which inputs are there and which outputs are asked for travel as the attributes `present` and
// `wanted`, bit masks in the order of declaration; arguments and results hold only those. Where
// `grouped` is 0 they come without the group axis, as of one group.
ffi::Error run(const Op& op, bool cuda, void* stream, const ffi::RemainingArgs& args,
               const ffi::RemainingRets& rets, const ffi::Dictionary& attributes) try {
  Call call;
  call.op = &op;
  call.wanted = static_cast<uint32_t>(attribute<int64_t>(attributes, "wanted"));
  const auto present = static_cast<uint32_t>(attribute<int64_t>(attributes, "present"));
  const bool grouped = attribute<int64_t>(attributes, "grouped") != 0;
  size_t next = 0;
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    if (!(present >> i & 1u)) continue;
    auto buffer = args.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return buffer.error();
    call.inputs[i] = tensor_of(*buffer, grouped);
  }
  for (const AttrSpec& spec : op.attributes) {
    call.attributes.push_back(attribute_value(attributes, spec));
  }
  call.slab = slab_of(attributes);
  if (call.slab.present()) {
    const auto buffer = args.get<ffi::Buffer<ffi::DataType::S32>>(next);
    if (buffer.has_error()) return buffer.error();
    call.slab.first = buffer->typed_data();
  }
  check_slab(call);
  op.infer(call);
  next = 0;
  std::array<Tensor, kMaxOperands> outputs;
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    if (!call.outputs[i].present) continue;
    auto buffer = rets.get<ffi::AnyBuffer>(next++);
    if (buffer.has_error()) return buffer.error();
    outputs[i] = tensor_of(**buffer, grouped);
  }
  set_outputs(call, outputs);
  Context context;
  context.stream = stream;
  launch(context, call, cuda);
  return ffi::Error::Success();
} catch (const ValueError& error) {
  return ffi::Error::InvalidArgument(error.what());
} catch (const TypeError& error) {
  return ffi::Error::InvalidArgument(error.what());
} catch (const std::exception& error) {
  return ffi::Error::Internal(error.what());
}

// One handler for each op of the table. They are never freed: threads of XLA may outlive what a
// process frees at its end.
using Handlers = std::vector<std::unique_ptr<ffi::Ffi>>;

const Handlers& cpu_handlers() {
  static const auto& handlers = *new Handlers([] {
    Handlers result;
    for (const Op& op : op_table()) {
      result.push_back(ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs().To(
          [&op](ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes) {
            return run(op, false, nullptr, args, rets, attributes);
          }));
    }
    return result;
  }());
  return handlers;
}

const Handlers& cuda_handlers() {
  static const auto& handlers = *new Handlers([] {
    Handlers result;
    for (const Op& op : op_table()) {
      result.push_back(ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<void*>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attrs()
                           .To(
                               [&op](void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                                     ffi::Dictionary attributes) {
                                 return run(op, true, stream, args, rets, attributes);
                               },
                               {ffi::Traits::kCmdBufferCompatible}));
    }
    return result;
  }());
  return handlers;
}

// XLA calls a plain function without state, so each op needs one of its own, and the compiler has
// to know how many. There are enough for a table of so many ops.
constexpr size_t kMostOps = 64;

template <const Handlers& (*kHandlers)(), size_t kOp>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  return kHandlers()[kOp]->Call(frame);
}

template <const Handlers& (*kHandlers)(), size_t... kOps>
std::array<XLA_FFI_Handler*, kMostOps> functions(std::index_sequence<kOps...>) {
  return {&handle<kHandlers, kOps>...};
}

}  // namespace

std::vector<XlaHandler> xla_handlers(const std::string& platform) {
  const bool cuda = platform == "cuda";
  constexpr std::make_index_sequence<kMostOps> kOps;
  const auto handlers = cuda ? functions<cuda_handlers>(kOps) : functions<cpu_handlers>(kOps);
  const std::vector<Op>& table = op_table();
  if (table.size() > kMostOps) throw std::logic_error("kMostOps in frontends/xla.cpp is too small");
  std::vector<XlaHandler> result;
  for (size_t i = 0; i < table.size(); ++i) {
    if (cuda ? table[i].launch_cuda != nullptr : table[i].launch_cpu != nullptr) {
      result.push_back({table[i].name, reinterpret_cast<void*>(handlers[i])});
    }
  }
  return result;
}

std::pair<int, int> xla_ffi_api_version() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace regkernels

// FFI targets of the lift.
//
//   slidejax_lift_quantize: x [M, K], absmax f32 [M] or [0] -> lifted [M, K'], scale f32 [M];
//       attribute group
//   slidejax_lift_quantize_fused: x [M, K], up [M, K] or [0], weight f32 [K] or [0],
//       bias f32 [K] or [0] -> lifted [M, K'] in 8 bits, scale f32 [M]; attributes group, prologue
//       and activation (names: lift.h), eps
//   slidejax_memcpy: x -> a copy by the driver, with which `slidejax bench` compares the lift
#include "handlers.h"

#include <algorithm>

#include "common/ffi_util.h"
#include "common/group.h"
#include "lift/arguments.h"
#include "lift/lift.h"

namespace slidejax::lift {
namespace {

// Fills in the arguments that both targets have. Returns what is wrong with them, or "".
std::string CheckShapes(const ffi::AnyBuffer& x, const ffi::AnyBuffer& lifted,
                        const ffi::Buffer<ffi::F32>& scale, int32_t group, bool halves,
                        Args& args) {
  const auto x_type = DTypeOf(x.element_type()), lifted_type = DTypeOf(lifted.element_type());
  if (!x_type || (*x_type != DType::kBF16 && *x_type != DType::kF16 && *x_type != DType::kF32)) {
    return "x must be bfloat16, float16 or float32";
  }
  if (!lifted_type || *lifted_type == DType::kS32) {
    return "lifted must be int8, float8_e4m3fn, bfloat16, float16 or float32";
  }
  if (group != 0 && !IsGroup(group)) return "group must be 0 or even, 4 to 16";
  if (x.dimensions().size() != 2 || lifted.dimensions().size() != 2) {
    return "x and lifted must be matrices";
  }
  if (halves && x.dimensions()[1] % 2 != 0) return "x must have two halves, or up be given";
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1] / (halves ? 2 : 1);
  const int64_t lifted_columns = lifted.dimensions()[1];
  const int64_t expected = group == 0 ? columns : LiftedColumns(columns, group);
  if (lifted.dimensions()[0] != rows ||
      (group == 0 ? lifted_columns < expected : lifted_columns != expected)) {
    return "lifted must be [" + std::to_string(rows) + ", " + std::to_string(expected) + "]";
  }
  if (std::max(columns, group == 0 ? lifted_columns : 0) > kMaxColumns) {
    return "a row has at most " + std::to_string(kMaxColumns) + " columns";
  }
  if (Count(scale) != rows) return "scale must have one element for each row";
  args.x = x.untyped_data(), args.x_type = *x_type;
  args.lifted = lifted.untyped_data(), args.lifted_type = *lifted_type;
  args.scale = scale.typed_data();
  args.rows = rows, args.columns = columns, args.lifted_columns = lifted_columns;
  args.x_stride = x.dimensions()[1];
  args.group = group;
  return "";
}

ffi::Error Launch(const char* op, const ffi::AnyBuffer& x, const ffi::AnyBuffer& lifted,
                  const std::string& wrong, const Args& args, cudaStream_t stream) {
  if (!wrong.empty()) {
    return InvalidArgument(op, wrong + " (x " + Describe(x) + ", lifted " + Describe(lifted) +
                                   ", group " + std::to_string(args.group) + ")");
  }
  return CudaError(std::string(op) + " of x " + Describe(x) + " to " + Describe(lifted),
                   LiftQuantize(args, stream));
}

ffi::Error LiftQuantizeImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> absmax,
                            ffi::Result<ffi::AnyBuffer> lifted, ffi::ResultBuffer<ffi::F32> scale,
                            int32_t group) {
  Args args = {};
  args.group = group;
  std::string wrong = CheckShapes(x, *lifted, *scale, group, false, args);
  if (wrong.empty() && Count(absmax) != 0) {
    args.absmax = absmax.typed_data();
    if (Count(absmax) != args.rows) wrong = "absmax must have one element for each row, or none";
  }
  return Launch("lift_quantize", x, *lifted, wrong, args, stream);
}

ffi::Error FusedImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer up,
                     ffi::Buffer<ffi::F32> weight, ffi::Buffer<ffi::F32> bias,
                     ffi::Result<ffi::AnyBuffer> lifted, ffi::ResultBuffer<ffi::F32> scale,
                     int32_t group, std::string_view prologue, std::string_view activation,
                     float eps) {
  Args args = {};
  const std::string wrong = FusedArguments(
      {x, up, weight, bias, *lifted, *scale, group, prologue, activation, eps}, args);
  return Launch("lift_quantize_fused", x, *lifted, wrong, args, stream);
}

ffi::Error MemcpyImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (x.size_bytes() != y->size_bytes()) {
    return InvalidArgument("memcpy", "x and y must have as many bytes");
  }
  return CudaError("memcpy of " + Describe(x),
                   cudaMemcpyAsync(y->untyped_data(), x.untyped_data(), x.size_bytes(),
                                   cudaMemcpyDeviceToDevice, stream));
}

}  // namespace

std::string FusedArguments(const FusedOperands& o, Args& args) {
  args.group = o.group, args.eps = o.eps;
  const auto prologue = PrologueOf(o.prologue);
  const bool glu = prologue == PrologueKind::kGlu;
  const bool halves = glu && Count(o.up) == 0 && Count(o.x) != 0;  // x holds the gate and up
  if (std::string wrong = CheckShapes(o.x, o.lifted, o.scale, o.group, halves, args);
      !wrong.empty()) {
    return wrong;
  }
  const auto activation = ActivationOf(o.activation);
  if (!prologue) return "there is no prologue " + std::string(o.prologue);
  if (!activation) return "there is no activation " + std::string(o.activation);
  if (Bytes(args.lifted_type) != 1) return "lifted must be int8 or float8_e4m3fn";
  args.prologue = *prologue, args.activation = *activation;
  const bool norm = *prologue == PrologueKind::kRmsNorm || *prologue == PrologueKind::kLayerNorm;
  if (glu && !halves && (o.up.element_type() != o.x.element_type() || Count(o.up) != Count(o.x))) {
    return "up must be like x, not " + Describe(o.up);
  }
  if (norm && Count(o.weight) != args.columns) {
    return "weight must have one element for each column";
  }
  if (Count(o.bias) != 0 && Count(o.bias) != args.columns) {
    return "bias must have one element for each column, or none";
  }
  if (glu) args.up = o.up.untyped_data();
  if (halves) {
    args.up =
        static_cast<const char*>(args.x) + args.columns * static_cast<int64_t>(Bytes(args.x_type));
  }
  if (norm) args.weight = o.weight.typed_data();
  if (Count(o.bias) != 0) args.bias = o.bias.typed_data();
  return "";
}

}  // namespace slidejax::lift

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_memcpy, slidejax::lift::MemcpyImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_lift_quantize, slidejax::lift::LiftQuantizeImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_lift_quantize_fused, slidejax::lift::FusedImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("group")
                                  .Attr<std::string_view>("prologue")
                                  .Attr<std::string_view>("activation")
                                  .Attr<float>("eps"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

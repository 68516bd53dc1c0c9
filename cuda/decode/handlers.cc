// FFI target of the decode kernel (decode/decode.h).
//
//   slidejax_linear_decode: x [M, K], values [out, groups, kept], zeros u8 [out, groups],
//       scale_w f32 [out], bias f32 [out] or [0], residual [M, out] or [0] -> y [M, out],
//       workspace u8 [W]. A dense weight has values [out, K'], K' a multiple of 32, and zeros [0].
#include "handlers.h"

#include <algorithm>

#include "common/ffi_util.h"
#include "common/group.h"
#include "common/integers.h"
#include "decode/decode.h"

namespace slidejax::decode {
namespace {

constexpr char kLinear[] = "linear_decode";
constexpr int64_t kMost = int64_t{1} << 30;  // of each dimension
constexpr int kAlignment = 16;               // of the workspace
constexpr int kBlockGroups = 8, kDenseBlock = 32;

// Readies the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kLinear, DecodeInit());
}

// Fills in the arguments; returns what is wrong with them, or "".
std::string Arguments(const ffi::AnyBuffer& x, const ffi::AnyBuffer& values,
                      const ffi::Buffer<ffi::U8>& zeros, const ffi::Buffer<ffi::F32>& scale_w,
                      const ffi::Buffer<ffi::F32>& bias, const ffi::AnyBuffer& residual,
                      const ffi::AnyBuffer& y, const ffi::Buffer<ffi::U8>& workspace,
                      DecodeArgs& args) {
  const auto shape = values.dimensions();
  const bool dense = shape.size() == 2;
  if (x.dimensions().size() != 2 || y.dimensions().size() != 2 || (!dense && shape.size() != 3))
    return "x and y must be matrices, values [out, groups, kept] or, dense, [out, K']";
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1], outputs = shape[0];
  const int64_t group = dense ? 0 : shape[2] + 2;
  const int64_t block = dense ? kDenseBlock : kBlockGroups;  // along values' second axis
  if (std::max({rows, columns, outputs, shape[1]}) > kMost) return "a dimension is over 2**30";
  if (!dense && !IsGroup(group)) return "kept must be even, 2 to 14";
  if (shape[1] % block != 0)
    return "values must have a multiple of " + std::to_string(block) + " groups or columns";
  if (columns > shape[1] * (dense ? 1 : group)) return "x has more columns than the weight";
  if (static_cast<int64_t>(zeros.element_count()) != (dense ? 0 : outputs * shape[1]))
    return "zeros must be [out, groups] or, of a dense weight, [0]";
  const auto type = DTypeOf(values.element_type()), x_type = DTypeOf(x.element_type()),
             y_type = DTypeOf(y.element_type()), residual_type = DTypeOf(residual.element_type());
  if (!type || Bytes(*type) > 2) return "values must be int8, float8_e4m3fn, bfloat16 or float16";
  const auto is_float = [](DType t) {
    return t == DType::kBF16 || t == DType::kF16 || t == DType::kF32;
  };
  if (!x_type || !y_type || !residual_type || !is_float(*x_type) || !is_float(*y_type) ||
      !is_float(*residual_type))
    return "x, residual and y must be bfloat16, float16 or float32";
  if (y.dimensions()[0] != rows || y.dimensions()[1] != outputs) return "y must be [M, out]";
  if (static_cast<int64_t>(scale_w.element_count()) != outputs) return "scale_w must be [out]";
  if (bias.element_count() != 0 && static_cast<int64_t>(bias.element_count()) != outputs)
    return "bias must be [out] or [0]";
  const bool adds = residual.dimensions().size() == 2;
  if (adds ? residual.dimensions()[0] != rows || residual.dimensions()[1] != outputs
           : residual.element_count() != 0)
    return "residual must be [M, out] or [0]";

  args.x = x.untyped_data(), args.x_type = *x_type;
  args.values = values.untyped_data(), args.type = *type;
  args.zeros = dense ? nullptr : zeros.typed_data();
  args.scale_w = scale_w.typed_data();
  args.bias = bias.element_count() != 0 ? bias.typed_data() : nullptr;
  args.residual = adds ? residual.untyped_data() : nullptr;
  args.residual_type = *residual_type;
  args.y = y.untyped_data(), args.y_type = *y_type;
  args.M = static_cast<int32_t>(rows), args.out = static_cast<int32_t>(outputs);
  args.columns = static_cast<int32_t>(columns), args.group = static_cast<int32_t>(group);
  args.blocks = static_cast<int32_t>(shape[1] / block);
  if (y.element_count() == 0) return "";
  if (columns == 0) return "x has no columns";
  const auto begin = reinterpret_cast<uintptr_t>(workspace.typed_data());
  const uintptr_t aligned = RoundUp<uintptr_t>(begin, kAlignment);
  args.workspace = reinterpret_cast<void*>(aligned);
  const int64_t wanted = DecodeWorkspace(args.M, args.type, args.group, args.blocks);
  if (static_cast<int64_t>(workspace.element_count() - (aligned - begin)) < wanted)
    return "the workspace must have " + std::to_string(wanted + kAlignment) + " bytes";
  const char* wrong = DecodeCheck(args);
  return wrong ? wrong : "";
}

ffi::Error LinearImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer values,
                      ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::F32> scale_w,
                      ffi::Buffer<ffi::F32> bias, ffi::AnyBuffer residual,
                      ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::U8> workspace) {
  DecodeArgs args = {};
  const std::string wrong =
      Arguments(x, values, zeros, scale_w, bias, residual, *y, *workspace, args);
  if (!wrong.empty()) {
    return InvalidArgument(kLinear, wrong + " (x " + Describe(x) + ", values " + Describe(values) +
                                        ", residual " + Describe(residual) + ", y " + Describe(*y) +
                                        ", workspace u8[" +
                                        std::to_string(workspace->element_count()) + "])");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  return CudaError(std::string(kLinear) + " of x " + Describe(x) + " to y " + Describe(*y),
                   Decode(args, stream));
}

}  // namespace
}  // namespace slidejax::decode

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_decode_initialize, slidejax::decode::InitializeImpl,
    xla::ffi::Ffi::BindInitialize().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_linear_decode, slidejax::decode::LinearImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

// FFI targets of the Hopper implementation (hopper/hopper.h).
//
//   slidejax_hopper_metadata: zeros u8 [out, groups] -> metadata u8 [bytes]; attribute group
//   slidejax_sparse_matmul_hopper: lifted [M, K'], scale_x f32 [M], WEIGHT -> y [M, out], workspace
//   u8 [W];
//       attributes config, token_group, split
//   slidejax_linear_hopper: x [M, K], up [M, K] or [0], norm_weight f32 [K] or [0], norm_bias f32
//   [K] or [0], WEIGHT
//       -> y [M, out], lifted [M, K'], scale_x f32 [M], workspace u8 [W]; attributes group,
//       prologue, activation, eps as slidejax_lift_quantize_fused has them, prologue 0 for none.
//       The lift and the product in one call, so that the product's kernel can begin while the
//       lift's still runs.
//
// WEIGHT: values [out, groups, kept], zeros u8 [out, groups], scale_w f32 [out], bias f32 [out] or
// [0], metadata u8 [bytes] or [0]. A dense one has values [out, K'], and neither zeros nor
// metadata, [0].
#include "handlers.h"

#include <algorithm>

#include "common/ffi_util.h"
#include "hopper/hopper.h"
#include "lift/arguments.h"

namespace slidejax {
namespace {

constexpr char kMatmul[] = "sparse_matmul_hopper";
constexpr char kLinear[] = "linear_hopper";
constexpr uintptr_t kAlignment = 128;  // of the workspace

ffi::Error MetadataImpl(cudaStream_t stream, ffi::Buffer<ffi::U8> zeros,
                        ffi::ResultBuffer<ffi::U8> metadata, int32_t group) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument("hopper_metadata", message);
  };
  if (zeros.dimensions().size() != 2) return fail("zeros must be [out, groups]");
  if (group < 4 || group > 16 || group % 2)
    return fail("group must be even, 4 to 16, got " + std::to_string(group));
  const int out = static_cast<int>(zeros.dimensions()[0]),
            groups = static_cast<int>(zeros.dimensions()[1]);
  const size_t bytes = slidejax_hopper_metadata_bytes(out, groups, group);
  if (metadata->element_count() != bytes) {
    return fail("metadata takes " + std::to_string(bytes) + " bytes, not " +
                std::to_string(metadata->element_count()));
  }
  if (bytes == 0) return ffi::Error::Success();
  return CudaError("hopper_metadata",
                   slidejax_hopper_expand_metadata(
                       zeros.typed_data(), reinterpret_cast<uint32_t*>(metadata->typed_data()), out,
                       groups, group, stream));
}

// Readies the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kMatmul, slidejax_hopper_init());
}

template <typename Buffer>
int64_t Count(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

struct Weight {
  ffi::AnyBuffer values;
  ffi::Buffer<ffi::U8> zeros;
  ffi::Buffer<ffi::F32> scale, bias;
  ffi::Buffer<ffi::U8> metadata;
};

// Fills in the arguments of y = lifted x weight; returns what is wrong with them, or "".
std::string MatmulArguments(const ffi::AnyBuffer& lifted, const ffi::Buffer<ffi::F32>& scale_x,
                            const Weight& w, const ffi::AnyBuffer& y,
                            const ffi::Buffer<ffi::U8>& workspace, HopperArgs& args) {
  const bool dense = w.values.dimensions().size() == 2;
  if (lifted.dimensions().size() != 2 || y.dimensions().size() != 2 ||
      (!dense && w.values.dimensions().size() != 3)) {
    return "lifted and y must be matrices, values [out, groups, kept] or, dense, [out, K']";
  }
  const int64_t outputs = w.values.dimensions()[0], groups = w.values.dimensions()[1],
                columns = lifted.dimensions()[1];
  if (std::max(groups, columns) > INT32_MAX) return "a dimension is over 2**31 - 1";
  args.groups = static_cast<int32_t>(groups);
  if (dense) {
    if (columns != groups) return "lifted and values must have as many columns";
    if (Count(w.zeros) != 0 || Count(w.metadata) != 0)
      return "a dense weight has neither zeros nor metadata";
  } else {
    const int64_t group = w.values.dimensions()[2] + 2;
    if (group < 4 || group > 16 || group % 2) return "kept must be even, 2 to 14";
    if (columns != groups * (group / 2 - 1) * 4)
      return "lifted columns do not fit the groups of values";
    if (Count(w.zeros) != outputs * groups) return "zeros must be [out, groups]";
    args.group = static_cast<int32_t>(group);
    const size_t bytes =
        slidejax_hopper_metadata_bytes(static_cast<int>(outputs), args.groups, args.group);
    if (Count(w.metadata) != 0 && w.metadata.element_count() != bytes)
      return "metadata has the wrong size";
    args.zeros = w.zeros.typed_data();
    args.meta = Count(w.metadata) != 0 ? reinterpret_cast<const uint32_t*>(w.metadata.typed_data())
                                       : nullptr;
  }
  const auto type = DTypeOf(lifted.element_type()), y_type = DTypeOf(y.element_type());
  if (!type || lifted.element_type() != w.values.element_type() ||
      (*type != DType::kS8 && *type != DType::kE4M3)) {
    return "lifted and values must both be int8 or float8_e4m3fn";
  }
  args.input = *type == DType::kS8 ? HopperInput::kS8 : HopperInput::kE4M3;
  if (y_type == DType::kBF16)
    args.output = HopperOutput::kBF16;
  else if (y_type == DType::kF16)
    args.output = HopperOutput::kF16;
  else if (y_type == DType::kF32)
    args.output = HopperOutput::kF32;
  else if (y_type == DType::kS32)
    args.output = HopperOutput::kS32;
  else
    return "y must be bfloat16, float16, float32 or, of int8, int32";
  const int64_t rows = lifted.dimensions()[0];
  if (y.dimensions()[0] != rows || y.dimensions()[1] != outputs) return "y must be [M, out]";
  if (rows > INT32_MAX || outputs > INT32_MAX) return "a dimension is over 2**31 - 1";
  if (Count(scale_x) != rows || Count(w.scale) != outputs)
    return "scales must be float32 [M] and [out]";
  if (Count(w.bias) != 0 && Count(w.bias) != outputs) return "bias must be [out] or [0]";

  args.lifted = lifted.untyped_data(), args.scale_x = scale_x.typed_data(),
  args.values = w.values.untyped_data();
  args.scale_w = w.scale.typed_data(),
  args.bias = Count(w.bias) != 0 ? w.bias.typed_data() : nullptr;
  args.y = y.untyped_data();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace.typed_data());
  const uintptr_t aligned = (begin + kAlignment - 1) / kAlignment * kAlignment;
  args.workspace = reinterpret_cast<void*>(aligned);
  args.workspace_bytes = workspace.element_count() > aligned - begin
                             ? workspace.element_count() - (aligned - begin)
                             : 0;
  args.M = static_cast<int32_t>(rows), args.out = static_cast<int32_t>(outputs);
  if (y.element_count() == 0) return "";
  const char* wrong = slidejax_hopper_check(args);
  return wrong ? wrong : "";
}

ffi::Error Wrong(const char* op, const std::string& what, const ffi::AnyBuffer& x,
                 const ffi::AnyBuffer& lifted, const Weight& w, const ffi::AnyBuffer& y,
                 const ffi::Buffer<ffi::U8>& workspace) {
  const std::string from =
      x.untyped_data() == lifted.untyped_data() ? "" : "x " + Describe(x) + ", ";
  return InvalidArgument(op, what + " (" + from + "lifted " + Describe(lifted) + ", values " +
                                 Describe(w.values) + ", y " + Describe(y) + ", workspace u8[" +
                                 std::to_string(workspace.element_count()) + "])");
}

std::string Name(const char* op, const ffi::AnyBuffer& x, const ffi::AnyBuffer& y) {
  return std::string(op) + " of x " + Describe(x) + " to y " + Describe(y);
}

ffi::Error ExecuteImpl(cudaStream_t stream, ffi::AnyBuffer lifted, ffi::Buffer<ffi::F32> scale_x,
                       ffi::AnyBuffer values, ffi::Buffer<ffi::U8> zeros,
                       ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                       ffi::Buffer<ffi::U8> metadata, ffi::Result<ffi::AnyBuffer> y,
                       ffi::ResultBuffer<ffi::U8> workspace, int32_t config, int32_t token_group,
                       int32_t split) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  HopperArgs args = {};
  args.config = config, args.token_group = token_group, args.split = split;
  const std::string wrong = MatmulArguments(lifted, scale_x, w, *y, *workspace, args);
  if (!wrong.empty()) return Wrong(kMatmul, wrong, lifted, lifted, w, *y, *workspace);
  if (y->element_count() == 0) return ffi::Error::Success();
  return CudaError(Name(kMatmul, lifted, *y), slidejax_hopper_sparse_matmul(args, stream));
}

ffi::Error LinearImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer up,
                      ffi::Buffer<ffi::F32> norm_weight, ffi::Buffer<ffi::F32> norm_bias,
                      ffi::AnyBuffer values, ffi::Buffer<ffi::U8> zeros,
                      ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                      ffi::Buffer<ffi::U8> metadata, ffi::Result<ffi::AnyBuffer> y,
                      ffi::Result<ffi::AnyBuffer> lifted, ffi::ResultBuffer<ffi::F32> scale_x,
                      ffi::ResultBuffer<ffi::U8> workspace, int32_t group, int32_t prologue,
                      int32_t activation, float eps) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  LiftArgs lift = {};
  HopperArgs args = {};
  args.config = -1, args.split = -1, args.after_lift = true;
  std::string wrong = LiftArguments(x, up, norm_weight, norm_bias, *lifted, *scale_x, group,
                                    prologue, activation, eps, lift);
  if (wrong.empty()) wrong = MatmulArguments(*lifted, *scale_x, w, *y, *workspace, args);
  if (wrong.empty() && group != args.group)
    wrong = "group " + std::to_string(group) + " is not that of values";
  if (!wrong.empty()) return Wrong(kLinear, wrong, x, *lifted, w, *y, *workspace);
  if (y->element_count() == 0) return ffi::Error::Success();
  HopperCounters counters = {};
  cudaError_t status = slidejax_hopper_before_lift(args, stream, &counters);
  lift.counters = counters.first, lift.counter_count = counters.count;
  if (status == cudaSuccess) status = LiftQuantize(lift, stream);
  if (status == cudaSuccess) status = slidejax_hopper_sparse_matmul(args, stream);
  return CudaError(Name(kLinear, x, *y), status);
}

}  // namespace
}  // namespace slidejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_hopper_metadata_handler, slidejax::MetadataImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_hopper_initialize_handler, slidejax::InitializeImpl,
    xla::ffi::Ffi::BindInitialize().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_hopper_execute_handler, slidejax::ExecuteImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int32_t>("config")
                                  .Attr<int32_t>("token_group")
                                  .Attr<int32_t>("split"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_hopper_linear_handler, slidejax::LinearImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("prologue")
                                  .Attr<int32_t>("activation")
                                  .Attr<float>("eps"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

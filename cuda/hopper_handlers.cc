// FFI targets of the Hopper implementation (sparse_matmul_hopper.h).
//
//   slidejax_hopper_metadata: zeros u8 [out, groups] -> metadata u8 [bytes]; attribute group
//   slidejax_sparse_matmul_hopper: lifted [M, K'], scale_x f32 [M], values [out, groups, kept], zeros u8 [out, groups],
//       scale_w f32 [out], bias f32 [out] or [0], metadata u8 [bytes] or [0] -> y [M, out], workspace u8 [W];
//       attributes config, token_group, split
//   slidejax_dense_matmul_hopper: codes [M, K], scale_x f32 [M], values [out, K], scale_w f32 [out], bias f32 [out] or [0]
//       -> y [M, out], workspace u8 [W]
#include "ffi_util.h"
#include "handlers.h"
#include "sparse_matmul_hopper.h"

namespace slidejax {
namespace {

constexpr char kMatmul[] = "sparse_matmul_hopper";
constexpr char kDense[] = "dense_matmul_hopper";
constexpr uintptr_t kAlignment = 128;  // of the workspace

ffi::Error MetadataImpl(cudaStream_t stream, ffi::Buffer<ffi::U8> zeros, ffi::ResultBuffer<ffi::U8> metadata, int32_t group) {
  const auto fail = [&](const std::string& message) { return InvalidArgument("hopper_metadata", message); };
  if (zeros.dimensions().size() != 2) return fail("zeros must be [out, groups]");
  if (group < 4 || group > 16 || group % 2) return fail("group must be even, 4 to 16, got " + std::to_string(group));
  const int out = static_cast<int>(zeros.dimensions()[0]), groups = static_cast<int>(zeros.dimensions()[1]);
  const size_t bytes = slidejax_hopper_metadata_bytes(out, groups, group);
  if (metadata->element_count() != bytes) {
    return fail("metadata takes " + std::to_string(bytes) + " bytes, not " + std::to_string(metadata->element_count()));
  }
  if (bytes == 0) return ffi::Error::Success();
  return CudaError("hopper_metadata", slidejax_hopper_expand_metadata(zeros.typed_data(),
                                                                      reinterpret_cast<uint32_t*>(metadata->typed_data()), out,
                                                                      groups, group, stream));
}

// Readies the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kMatmul, slidejax_hopper_init());
}

// What is common to sparse and dense weights, once the shape of the weight is known: args has groups, group, zeros and meta.
ffi::Error Run(const char* op, HopperArgs args, int64_t outputs, cudaStream_t stream, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> scale_x,
               ffi::AnyBuffer values, ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y,
               ffi::ResultBuffer<ffi::U8> workspace) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument(op, message + " (x " + Describe(x) + ", values " + Describe(values) + ", y " + Describe(*y) + ", workspace u8[" +
                                   std::to_string(workspace->element_count()) + "])");
  };
  const auto type = DTypeOf(x.element_type()), y_type = DTypeOf(y->element_type());
  if (!type || x.element_type() != values.element_type() || (*type != DType::kS8 && *type != DType::kE4M3)) {
    return fail("x and values must both be int8 or float8_e4m3fn");
  }
  args.input = *type == DType::kS8 ? HopperInput::kS8 : HopperInput::kE4M3;
  if (y_type == DType::kBF16) args.output = HopperOutput::kBF16;
  else if (y_type == DType::kF16) args.output = HopperOutput::kF16;
  else if (y_type == DType::kF32) args.output = HopperOutput::kF32;
  else if (y_type == DType::kS32) args.output = HopperOutput::kS32;
  else return fail("y must be bfloat16, float16, float32 or, of int8, int32");
  const int64_t rows = x.dimensions()[0];
  if (y->dimensions()[0] != rows || y->dimensions()[1] != outputs) return fail("y must be [M, out]");
  if (rows > INT32_MAX || outputs > INT32_MAX) return fail("a dimension is over 2**31 - 1");
  const auto count = [](const auto& buffer) { return static_cast<int64_t>(buffer.element_count()); };
  if (count(scale_x) != rows || count(scale_w) != outputs) return fail("scales must be float32 [M] and [out]");
  if (count(bias) != 0 && count(bias) != outputs) return fail("bias must be [out] or [0]");
  if (y->element_count() == 0) return ffi::Error::Success();

  args.lifted = x.untyped_data(), args.scale_x = scale_x.typed_data(), args.values = values.untyped_data();
  args.scale_w = scale_w.typed_data(), args.bias = count(bias) != 0 ? bias.typed_data() : nullptr;
  args.y = y->untyped_data();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace->typed_data());
  const uintptr_t aligned = (begin + kAlignment - 1) / kAlignment * kAlignment;
  args.workspace = reinterpret_cast<void*>(aligned);
  args.workspace_bytes = workspace->element_count() > aligned - begin ? workspace->element_count() - (aligned - begin) : 0;
  args.M = static_cast<int32_t>(rows), args.out = static_cast<int32_t>(outputs);
  if (const char* wrong = slidejax_hopper_check(args)) return fail(wrong);
  return CudaError(std::string(op) + " of x " + Describe(x) + " to y " + Describe(*y), slidejax_hopper_sparse_matmul(args, stream));
}

ffi::Error ExecuteImpl(cudaStream_t stream, ffi::AnyBuffer lifted, ffi::Buffer<ffi::F32> scale_x, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::U8> zeros, ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                       ffi::Buffer<ffi::U8> metadata, ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::U8> workspace,
                       int32_t config, int32_t token_group, int32_t split) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument(kMatmul, message + " (lifted " + Describe(lifted) + ", values " + Describe(values) + ", y " + Describe(*y) + ")");
  };
  if (lifted.dimensions().size() != 2 || values.dimensions().size() != 3 || y->dimensions().size() != 2) {
    return fail("lifted and y must be matrices, values [out, groups, kept]");
  }
  const int64_t outputs = values.dimensions()[0], groups = values.dimensions()[1], group = values.dimensions()[2] + 2;
  if (group < 4 || group > 16 || group % 2) return fail("kept must be even, 2 to 14");
  if (groups > INT32_MAX || lifted.dimensions()[1] != groups * (group / 2 - 1) * 4) return fail("lifted columns do not fit the groups of values");
  if (static_cast<int64_t>(zeros.element_count()) != outputs * groups) return fail("zeros must be [out, groups]");
  const size_t bytes = slidejax_hopper_metadata_bytes(static_cast<int>(outputs), static_cast<int>(groups), static_cast<int>(group));
  if (metadata.element_count() != 0 && metadata.element_count() != bytes) return fail("metadata has the wrong size");
  HopperArgs args = {};
  args.zeros = zeros.typed_data();
  args.meta = metadata.element_count() != 0 ? reinterpret_cast<const uint32_t*>(metadata.typed_data()) : nullptr;
  args.groups = static_cast<int32_t>(groups), args.group = static_cast<int32_t>(group);
  args.config = config, args.token_group = token_group, args.split = split;
  return Run(kMatmul, args, outputs, stream, lifted, scale_x, values, scale_w, bias, y, workspace);
}

ffi::Error DenseImpl(cudaStream_t stream, ffi::AnyBuffer codes, ffi::Buffer<ffi::F32> scale_x, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y,
                     ffi::ResultBuffer<ffi::U8> workspace) {
  if (codes.dimensions().size() != 2 || values.dimensions().size() != 2 || y->dimensions().size() != 2 ||
      codes.dimensions()[1] != values.dimensions()[1] || codes.dimensions()[1] > INT32_MAX) {
    return InvalidArgument(kDense, "codes must be [M, K], values [out, K] and y [M, out], not " + Describe(codes) + ", " + Describe(values) +
                                       " and " + Describe(*y));
  }
  HopperArgs args = {};
  args.groups = static_cast<int32_t>(codes.dimensions()[1]);
  args.config = -1, args.split = -1;
  return Run(kDense, args, values.dimensions()[0], stream, codes, scale_x, values, scale_w, bias, y, workspace);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_hopper_initialize_handler, slidejax::InitializeImpl,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_hopper_dense_handler, slidejax::DenseImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

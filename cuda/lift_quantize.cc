// FFI target slidejax_lift_quantize: x [M, K], absmax f32 [M] or [0] -> lifted [M, K'], scale f32 [M]; attribute group.
#include "lift_quantize.h"

#include "ffi_util.h"
#include "handlers.h"

namespace slidejax {
namespace {

ffi::Error LiftQuantizeImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> absmax,
                            ffi::Result<ffi::AnyBuffer> lifted, ffi::ResultBuffer<ffi::F32> scale, int32_t group) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument("lift_quantize", message + " (x " + Describe(x) + ", lifted " + Describe(*lifted) + ", group " +
                                                std::to_string(group) + ")");
  };
  const auto x_type = DTypeOf(x.element_type()), lifted_type = DTypeOf(lifted->element_type());
  if (!x_type || (*x_type != DType::kBF16 && *x_type != DType::kF16 && *x_type != DType::kF32)) {
    return fail("x must be bfloat16, float16 or float32");
  }
  if (!lifted_type || *lifted_type == DType::kS32) return fail("lifted must be int8, float8_e4m3fn, bfloat16, float16 or float32");
  if (group != 0 && (group < 4 || group > 16 || group % 2)) return fail("group must be 0 or even, 4 to 16");
  if (x.dimensions().size() != 2 || lifted->dimensions().size() != 2) return fail("x and lifted must be matrices");
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1], lifted_columns = lifted->dimensions()[1];
  if (columns > kMaxColumns) return fail("a row has at most " + std::to_string(kMaxColumns) + " columns");
  const int64_t expected = group == 0 ? columns : LiftedColumns(columns, group);
  if (lifted->dimensions()[0] != rows || (group == 0 ? lifted_columns < expected : lifted_columns != expected)) {
    return fail("lifted must be [" + std::to_string(rows) + ", " + std::to_string(expected) + "]");
  }
  if (group == 0 && lifted_columns > kMaxColumns) return fail("a row has at most " + std::to_string(kMaxColumns) + " columns");
  const int64_t given = static_cast<int64_t>(absmax.element_count());
  if (given != 0 && given != rows) return fail("absmax must have one element for each row, or none");
  if (static_cast<int64_t>(scale->element_count()) != rows) return fail("scale must have one element for each row");
  LiftArgs args = {};
  args.x = x.untyped_data(), args.x_type = *x_type;
  args.absmax = given != 0 ? absmax.typed_data() : nullptr;
  args.lifted = lifted->untyped_data(), args.lifted_type = *lifted_type;
  args.scale = scale->typed_data();
  args.rows = rows, args.columns = columns, args.lifted_columns = lifted_columns, args.group = group;
  return CudaError("lift_quantize of x " + Describe(x) + " to " + Describe(*lifted), LiftQuantize(args, stream));
}

}  // namespace
}  // namespace slidejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_lift_quantize, slidejax::LiftQuantizeImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

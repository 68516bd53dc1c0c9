// FFI targets of the Hopper implementation (hopper/hopper.h).
//
//   slidejax_metadata_hopper: zeros u8 [out, groups] -> metadata u8 [bytes]; attribute group
//   slidejax_sparse_matmul_hopper: lifted [M, K'], scale_x f32 [M], WEIGHT
//       -> y [M, out], workspace u8 [W]
//   slidejax_linear_hopper: x [M, K], up [M, K] or [0], norm_weight f32 [K] or [0],
//       norm_bias f32 [K] or [0], WEIGHT
//       -> y [M, out], lifted [M, K'], scale_x f32 [M], workspace u8 [W];
//       attributes group, prologue, activation, eps as slidejax_lift_quantize_fused has them. The
//       lift and the product in one call, so that the product's kernel can begin while the lift's
//       still runs.
//
// WEIGHT: values [out, groups, kept], zeros u8 [out, groups], scale_w f32 [out],
// bias f32 [out] or [0], metadata u8 [bytes] or [0]. A dense weight has values [out, K'], and
// neither zeros nor metadata, which are [0].
#include "handlers.h"

#include <algorithm>

#include "common/ffi_util.h"
#include "common/group.h"
#include "common/integers.h"
#include "hopper/hopper.h"
#include "lift/arguments.h"

namespace slidejax::hopper {
namespace {

constexpr char kMatmul[] = "sparse_matmul_hopper";
constexpr char kLinear[] = "linear_hopper";
constexpr uintptr_t kAlignment = 128;  // of the workspace

ffi::Error MetadataImpl(cudaStream_t stream, ffi::Buffer<ffi::U8> zeros,
                        ffi::ResultBuffer<ffi::U8> metadata, int32_t group) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument("metadata_hopper", message);
  };
  if (zeros.dimensions().size() != 2) return fail("zeros must be [out, groups]");
  if (!IsGroup(group)) {
    return fail("group must be even, 4 to 16, got " + std::to_string(group));
  }
  const int64_t out = zeros.dimensions()[0], columns = zeros.dimensions()[1] * 2 * (group - 2);
  if (std::max(out, columns) > INT32_MAX) return fail("a dimension is over 2**31 - 1");
  const Problem problem = {0, static_cast<int32_t>(out), static_cast<int32_t>(columns), group};
  const size_t bytes = MetadataBytes(problem);
  if (metadata->element_count() != bytes) {
    return fail("metadata takes " + std::to_string(bytes) + " bytes, not " +
                std::to_string(metadata->element_count()));
  }
  if (bytes == 0) return ffi::Error::Success();
  auto* const words = reinterpret_cast<uint32_t*>(metadata->typed_data());
  return CudaError("metadata_hopper", ExpandMetadata(zeros.typed_data(), words, problem, stream));
}

// Prepares the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kMatmul, Init());
}

struct Weight {
  ffi::AnyBuffer values;
  ffi::Buffer<ffi::U8> zeros;
  ffi::Buffer<ffi::F32> scale, bias;
  ffi::Buffer<ffi::U8> metadata;

  bool dense() const { return values.dimensions().size() == 2; }
};

// Fills in the arguments of a weight that is multiplied with `columns` lifted columns. Returns what
// is wrong with it, or "".
std::string WeightArguments(const Weight& w, int64_t columns, Args& args) {
  const int64_t outputs = w.values.dimensions()[0], groups = w.values.dimensions()[1];
  if (std::max(groups, columns) > INT32_MAX) return "a dimension is over 2**31 - 1";
  args.problem.columns = static_cast<int32_t>(columns);
  args.values = w.values.untyped_data();
  args.scale_w = w.scale.typed_data();
  args.bias = Count(w.bias) != 0 ? w.bias.typed_data() : nullptr;
  if (w.dense()) {
    if (columns != groups) return "lifted and values must have as many columns";
    if (Count(w.zeros) != 0 || Count(w.metadata) != 0) {
      return "a dense weight has neither zeros nor metadata";
    }
    return "";
  }
  const int64_t group = w.values.dimensions()[2] + 2;
  if (!IsGroup(group)) return "kept must be even, 2 to 14";
  if (columns != groups * (group / 2 - 1) * 4) {
    return "lifted columns do not fit the groups of values";
  }
  if (Count(w.zeros) != outputs * groups) return "zeros must be [out, groups]";
  args.problem.group = static_cast<int32_t>(group);
  args.zeros = w.zeros.typed_data();
  if (Count(w.metadata) != 0) {
    args.metadata = reinterpret_cast<const uint32_t*>(w.metadata.typed_data());
    if (w.metadata.element_count() != MetadataBytes(args.problem)) {
      return "metadata has the wrong size";
    }
  }
  return "";
}

// Fills in the arguments of y = lifted x weight; returns what is wrong with them, or "".
std::string MatmulArguments(const ffi::AnyBuffer& lifted, const ffi::Buffer<ffi::F32>& scale_x,
                            const Weight& w, const ffi::AnyBuffer& y,
                            const ffi::Buffer<ffi::U8>& workspace, Args& args) {
  if (lifted.dimensions().size() != 2 || y.dimensions().size() != 2 ||
      (!w.dense() && w.values.dimensions().size() != 3)) {
    return "lifted and y must be matrices, values [out, groups, kept] or, dense, [out, K']";
  }
  const int64_t rows = lifted.dimensions()[0], outputs = w.values.dimensions()[0];
  if (std::max(rows, outputs) > INT32_MAX) return "a dimension is over 2**31 - 1";
  args.problem.M = static_cast<int32_t>(rows), args.problem.out = static_cast<int32_t>(outputs);
  if (std::string wrong = WeightArguments(w, lifted.dimensions()[1], args); !wrong.empty()) {
    return wrong;
  }
  const auto type = DTypeOf(lifted.element_type()), y_type = DTypeOf(y.element_type());
  if (!type || lifted.element_type() != w.values.element_type() || Bytes(*type) != 1) {
    return "lifted and values must both be int8 or float8_e4m3fn";
  }
  if (!y_type || Bytes(*y_type) == 1) {
    return "y must be bfloat16, float16, float32 or, of int8, int32";
  }
  args.operand = *type, args.result = *y_type;
  if (y.dimensions()[0] != rows || y.dimensions()[1] != outputs) return "y must be [M, out]";
  if (Count(scale_x) != rows || Count(w.scale) != outputs) {
    return "scales must be float32 [M] and [out]";
  }
  if (Count(w.bias) != 0 && Count(w.bias) != outputs) return "bias must be [out] or [0]";

  args.lifted = lifted.untyped_data(), args.scale_x = scale_x.typed_data();
  args.y = y.untyped_data();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(workspace.typed_data());
  const size_t bytes = workspace.element_count();
  const size_t skipped = RoundUp<uintptr_t>(begin, kAlignment) - begin;
  args.workspace = reinterpret_cast<void*>(begin + skipped);
  args.workspace_bytes = bytes > skipped ? bytes - skipped : 0;
  if (y.element_count() == 0) return "";
  const char* wrong = Check(args);
  return wrong ? wrong : "";
}

ffi::Error Wrong(const char* op, const std::string& what, const ffi::AnyBuffer& x,
                 const ffi::AnyBuffer& lifted, const Weight& w, const ffi::AnyBuffer& y,
                 const ffi::Buffer<ffi::U8>& workspace) {
  const bool lifts = x.untyped_data() != lifted.untyped_data();
  return InvalidArgument(op, what + " (" + (lifts ? "x " + Describe(x) + ", " : "") + "lifted " +
                                 Describe(lifted) + ", values " + Describe(w.values) + ", y " +
                                 Describe(y) + ", workspace u8[" +
                                 std::to_string(workspace.element_count()) + "])");
}

std::string NameOf(const char* op, const ffi::AnyBuffer& x, const ffi::AnyBuffer& y) {
  return std::string(op) + " of x " + Describe(x) + " to y " + Describe(y);
}

ffi::Error MatmulImpl(cudaStream_t stream, ffi::AnyBuffer lifted, ffi::Buffer<ffi::F32> scale_x,
                      ffi::AnyBuffer values, ffi::Buffer<ffi::U8> zeros,
                      ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                      ffi::Buffer<ffi::U8> metadata, ffi::Result<ffi::AnyBuffer> y,
                      ffi::ResultBuffer<ffi::U8> workspace) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  Args args = {};
  const std::string wrong = MatmulArguments(lifted, scale_x, w, *y, *workspace, args);
  if (!wrong.empty()) return Wrong(kMatmul, wrong, lifted, lifted, w, *y, *workspace);
  if (y->element_count() == 0) return ffi::Error::Success();
  return CudaError(NameOf(kMatmul, lifted, *y), SparseMatmul(args, stream));
}

ffi::Error LinearImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer up,
                      ffi::Buffer<ffi::F32> norm_weight, ffi::Buffer<ffi::F32> norm_bias,
                      ffi::AnyBuffer values, ffi::Buffer<ffi::U8> zeros,
                      ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                      ffi::Buffer<ffi::U8> metadata, ffi::Result<ffi::AnyBuffer> y,
                      ffi::Result<ffi::AnyBuffer> lifted, ffi::ResultBuffer<ffi::F32> scale_x,
                      ffi::ResultBuffer<ffi::U8> workspace, int32_t group,
                      std::string_view prologue, std::string_view activation, float eps) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  lift::Args lift_args = {};
  Args args = {};
  args.after_lift = true;
  std::string wrong = lift::FusedArguments(
      {x, up, norm_weight, norm_bias, *lifted, *scale_x, group, prologue, activation, eps},
      lift_args);
  if (wrong.empty()) wrong = MatmulArguments(*lifted, *scale_x, w, *y, *workspace, args);
  if (wrong.empty() && group != args.problem.group) {
    wrong = "group " + std::to_string(group) + " is not that of values";
  }
  if (!wrong.empty()) return Wrong(kLinear, wrong, x, *lifted, w, *y, *workspace);
  if (y->element_count() == 0) return ffi::Error::Success();
  Counters counters = {};
  cudaError_t status = BeforeLift(args, stream, &counters);
  lift_args.counters = counters.first, lift_args.counter_count = counters.count;
  if (status == cudaSuccess) status = lift::LiftQuantize(lift_args, stream);
  if (status == cudaSuccess) status = SparseMatmul(args, stream);
  return CudaError(NameOf(kLinear, x, *y), status);
}

// The operands of a weight.
template <typename Binding>
auto BindWeight(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::Buffer<ffi::U8>>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::Buffer<ffi::U8>>();
}

auto BindMatmul() {
  return BindWeight(ffi::Ffi::Bind()
                        .Ctx<ffi::PlatformStream<cudaStream_t>>()
                        .Arg<ffi::AnyBuffer>()
                        .Arg<ffi::Buffer<ffi::F32>>())
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::U8>>();
}

auto BindLinear() {
  return BindWeight(ffi::Ffi::Bind()
                        .Ctx<ffi::PlatformStream<cudaStream_t>>()
                        .Arg<ffi::AnyBuffer>()
                        .Arg<ffi::AnyBuffer>()
                        .Arg<ffi::Buffer<ffi::F32>>()
                        .Arg<ffi::Buffer<ffi::F32>>())
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::U8>>()
      .Attr<int32_t>("group")
      .Attr<std::string_view>("prologue")
      .Attr<std::string_view>("activation")
      .Attr<float>("eps");
}

}  // namespace
}  // namespace slidejax::hopper

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_metadata_hopper, slidejax::hopper::MetadataImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int32_t>("group"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_hopper_initialize, slidejax::hopper::InitializeImpl,
    xla::ffi::Ffi::BindInitialize().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_sparse_matmul_hopper, slidejax::hopper::MatmulImpl,
                              slidejax::hopper::BindMatmul(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_linear_hopper, slidejax::hopper::LinearImpl,
                              slidejax::hopper::BindLinear(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

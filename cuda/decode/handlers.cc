// FFI targets of the decode kernel (decode/decode.h).
//
//   slidejax_linear_decode: x [M, K], values [out, groups, kept], zeros u8 [out, groups],
//       scale_w f32 [out], bias f32 [out] or [0], residual [M, out] or [0] -> y [M, out],
//       workspace u8 [W]. A dense weight has values [out, K'], K' a multiple of 32, and zeros [0].
//   slidejax_chain_decode: x [M, K]; for each stage values, zeros, scale_w, bias and residual as
//       above, and norm f32 [K] or [0] -> y [M, out] of each stage in `outputs`, workspace u8 [W].
//       A stage reads the y of the one before. Attributes, a number for each stage: `adds`, the
//       earlier stage whose y is the residual, or -1; `gates`, the lift::Activation of a gate in
//       the first half of the stage's outputs, which leaves half of them, or -1; `eps` of the norm.
#include "handlers.h"

#include <algorithm>
#include <string>
#include <vector>

#include "common/ffi_util.h"
#include "common/group.h"
#include "common/integers.h"
#include "common/workspace.h"
#include "decode/decode.h"

namespace slidejax::decode {
namespace {

constexpr char kLinear[] = "linear_decode", kChain[] = "chain_decode";
constexpr int64_t kMost = int64_t{1} << 30;  // of each dimension
constexpr int kAlignment = 16;               // of the workspace
constexpr int kBlockGroups = 8, kDenseBlock = 32;

// Readies the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kLinear, DecodeInit());
}

bool IsFloat(std::optional<DType> type) {
  return type == DType::kBF16 || type == DType::kF16 || type == DType::kF32;
}

// Sizes of a weight that DecodeArgs lacks.
struct WeightSizes {
  int64_t rows = 0, inputs = 0;  // of the weight; the most columns of x
};

// Fills in the weight's arguments; returns what is wrong with it, or "".
std::string TakeWeight(const ffi::AnyBuffer& values, const ffi::Buffer<ffi::U8>& zeros,
                       const ffi::Buffer<ffi::F32>& scale_w, const ffi::Buffer<ffi::F32>& bias,
                       DecodeArgs& args, WeightSizes& sizes) {
  const auto shape = values.dimensions();
  const bool dense = shape.size() == 2;
  if (!dense && shape.size() != 3) return "values must be [out, groups, kept] or, dense, [out, K']";
  const int64_t group = dense ? 0 : shape[2] + 2;
  const int64_t block = dense ? kDenseBlock : kBlockGroups;  // along values' second axis
  if (std::max(shape[0], shape[1]) > kMost) return "a dimension is over 2**30";
  if (!dense && !IsGroup(group)) return "kept must be even, 2 to 14";
  if (shape[1] % block != 0)
    return "values must have a multiple of " + std::to_string(block) + " groups or columns";
  if (Count(zeros) != (dense ? 0 : shape[0] * shape[1]))
    return "zeros must be [out, groups] or, of a dense weight, [0]";
  const auto type = DTypeOf(values.element_type());
  if (!type || Bytes(*type) > 2) return "values must be int8, float8_e4m3fn, bfloat16 or float16";
  if (Count(scale_w) != shape[0]) return "scale_w must be [out]";
  if (Count(bias) != 0 && Count(bias) != shape[0]) return "bias must be [out] or [0]";

  sizes = {shape[0], shape[1] * (dense ? 1 : group)};
  args.values = values.untyped_data(), args.type = *type;
  args.zeros = dense ? nullptr : zeros.typed_data();
  args.scale_w = scale_w.typed_data();
  args.bias = Count(bias) != 0 ? bias.typed_data() : nullptr;
  args.group = static_cast<int32_t>(group);
  args.blocks = static_cast<int32_t>(shape[1] / block);
  return "";
}

// Fills in a residual [M, out], or none for [0]; returns what is wrong with it, or "".
std::string TakeResidual(const ffi::AnyBuffer& residual, DecodeArgs& args) {
  const auto type = DTypeOf(residual.element_type());
  if (!IsFloat(type)) return "residual must be bfloat16, float16 or float32";
  const bool adds = residual.dimensions().size() == 2;
  if (adds ? residual.dimensions()[0] != args.M || residual.dimensions()[1] != args.out
           : residual.element_count() != 0)
    return "residual must be [M, out] or [0]";
  args.residual = adds ? residual.untyped_data() : nullptr;
  args.residual_type = *type;
  return "";
}

// Fills in the arguments; returns what is wrong with them, or "".
std::string Arguments(const ffi::AnyBuffer& x, const ffi::AnyBuffer& values,
                      const ffi::Buffer<ffi::U8>& zeros, const ffi::Buffer<ffi::F32>& scale_w,
                      const ffi::Buffer<ffi::F32>& bias, const ffi::AnyBuffer& residual,
                      const ffi::AnyBuffer& y, const ffi::Buffer<ffi::U8>& workspace,
                      DecodeArgs& args) {
  if (x.dimensions().size() != 2 || y.dimensions().size() != 2) return "x and y must be matrices";
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  if (std::max(rows, columns) > kMost) return "a dimension is over 2**30";
  WeightSizes sizes;
  if (auto wrong = TakeWeight(values, zeros, scale_w, bias, args, sizes); !wrong.empty())
    return wrong;
  if (columns > sizes.inputs) return "x has more columns than the weight";
  const auto x_type = DTypeOf(x.element_type()), y_type = DTypeOf(y.element_type());
  if (!IsFloat(x_type) || !IsFloat(y_type)) return "x and y must be bfloat16, float16 or float32";
  if (y.dimensions()[0] != rows || y.dimensions()[1] != sizes.rows) return "y must be [M, out]";
  args.x = x.untyped_data(), args.x_type = *x_type;
  args.y = y.untyped_data(), args.y_type = *y_type;
  args.M = static_cast<int32_t>(rows), args.out = static_cast<int32_t>(sizes.rows);
  args.columns = static_cast<int32_t>(columns);
  if (auto wrong = TakeResidual(residual, args); !wrong.empty()) return wrong;
  if (y.element_count() == 0) return "";
  if (columns == 0) return "x has no columns";
  Workspace memory(workspace, kAlignment);
  const int64_t wanted = DecodeWorkspace(args.M, args.type, args.group, args.blocks);
  args.workspace = memory.Take(wanted);
  if (!memory.enough())
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

// The calls of a chain, from its operands and results.
class Chain {
 public:
  Chain(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Span<const int64_t> adds,
        ffi::Span<const int64_t> gates, ffi::Span<const float> eps,
        ffi::Span<const int64_t> outputs)
      : operands_(operands),
        results_(results),
        adds_(adds),
        gates_(gates),
        eps_(eps),
        outputs_(outputs) {}

  // Fills in all calls; returns what is wrong, or "".
  std::string Fill() {
    const size_t count = adds_.size();
    if (count == 0 || gates_.size() != count || eps_.size() != count)
      return "adds, gates and eps must have a number for each stage";
    if (operands_.size() != 1 + kOperands * count || results_.size() != outputs_.size() + 1)
      return "the operands are x and " + std::to_string(kOperands) +
             " for each stage, the results one for each output and a workspace";
    const auto x = operands_.get<ffi::AnyBuffer>(0);
    auto memory = results_.get<ffi::Buffer<ffi::U8>>(outputs_.size());
    if (!x || x->dimensions().size() != 2 || !IsFloat(DTypeOf(x->element_type())))
      return "x must be a matrix of bfloat16, float16 or float32";
    if (!memory) return "the workspace must be u8";
    if (x->element_count() == 0 || x->dimensions()[0] > kDecodeTokens || x->dimensions()[1] > kMost)
      return "x must have 1 to " + std::to_string(kDecodeTokens) + " rows, and columns";
    x_type_ = *DTypeOf(x->element_type()), rows_ = static_cast<int32_t>(x->dimensions()[0]);
    calls.resize(count);
    calls[0].x = x->untyped_data(), calls[0].columns = static_cast<int32_t>(x->dimensions()[1]);
    Workspace workspace(**memory, kAlignment);
    for (size_t i = 0; i < count; ++i) {
      if (auto wrong = Stage(i, workspace); !wrong.empty())
        return "stage " + std::to_string(i) + ": " + wrong;
    }
    return workspace.enough() ? "" : "the workspace is too small";
  }

  std::vector<DecodeArgs> calls;

 private:
  static constexpr size_t kOperands = 6;  // of a stage

  std::string Stage(size_t i, Workspace& workspace) {
    const size_t first = 1 + kOperands * i;
    const auto values = operands_.get<ffi::AnyBuffer>(first);
    const auto zeros = operands_.get<ffi::Buffer<ffi::U8>>(first + 1);
    const auto scale_w = operands_.get<ffi::Buffer<ffi::F32>>(first + 2);
    const auto bias = operands_.get<ffi::Buffer<ffi::F32>>(first + 3);
    const auto residual = operands_.get<ffi::AnyBuffer>(first + 4);
    const auto norm = operands_.get<ffi::Buffer<ffi::F32>>(first + 5);
    if (!values || !zeros || !scale_w || !bias || !residual || !norm)
      return "zeros must be u8, scale_w, bias and norm float32";
    DecodeArgs& args = calls[i];
    if (i > 0) args.x = calls[i - 1].y, args.columns = calls[i - 1].out;
    WeightSizes sizes;
    if (auto wrong = TakeWeight(*values, *zeros, *scale_w, *bias, args, sizes); !wrong.empty())
      return wrong;
    if (args.columns > sizes.inputs) return "x has more columns than the weight";
    const bool gate = gates_[i] >= 0;
    if (sizes.rows == 0 || gates_[i] > static_cast<int>(lift::Activation::kRelu) ||
        (gate && sizes.rows % 2 != 0))
      return "the weight must have outputs, with a gate an even number of them";
    args.x_type = args.y_type = x_type_, args.M = rows_;
    args.out = static_cast<int32_t>(gate ? sizes.rows / 2 : sizes.rows);
    args.gate_rows = gate ? args.out : 0;
    if (gate) args.activation = static_cast<lift::Activation>(gates_[i]);
    if (Count(*norm) != 0 && Count(*norm) != args.columns) return "norm must be [K] or [0]";
    args.norm = Count(*norm) != 0 ? norm->typed_data() : nullptr, args.eps = eps_[i];
    if (auto wrong = TakeResidual(*residual, args); !wrong.empty()) return wrong;
    if (adds_[i] >= 0) {
      if (adds_[i] >= static_cast<int64_t>(i) || calls[adds_[i]].out != args.out)
        return "adds must name an earlier stage with as many outputs";
      args.residual = calls[adds_[i]].y, args.residual_type = x_type_;
    }
    if (gate && args.residual != nullptr) return "a gate takes no residual";
    args.workspace = workspace.Take(DecodeWorkspace(args.M, args.type, args.group, args.blocks));
    if (auto wrong = Result(i, workspace); !wrong.empty()) return wrong;
    const char* wrong = DecodeCheck(args);
    return wrong ? wrong : "";
  }

  // Where the stage's results go.
  std::string Result(size_t i, Workspace& workspace) {
    DecodeArgs& args = calls[i];
    for (size_t output = 0; output < outputs_.size(); ++output) {
      if (outputs_[output] != static_cast<int64_t>(i)) continue;
      auto y = results_.get<ffi::AnyBuffer>(output);
      if (!y || (*y)->dimensions().size() != 2 || (*y)->dimensions()[0] != args.M ||
          (*y)->dimensions()[1] != args.out || DTypeOf((*y)->element_type()) != x_type_)
        return "y must be [M, out] in the dtype of x";
      args.y = (*y)->untyped_data();
      return "";
    }
    args.y = workspace.Take(int64_t{args.M} * args.out * static_cast<int64_t>(Bytes(x_type_)));
    return "";
  }

  const ffi::RemainingArgs operands_;
  const ffi::RemainingRets results_;
  const ffi::Span<const int64_t> adds_, gates_;
  const ffi::Span<const float> eps_;
  const ffi::Span<const int64_t> outputs_;
  DType x_type_ = DType::kBF16;
  int32_t rows_ = 0;
};

ffi::Error ChainImpl(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                     ffi::Span<const int64_t> adds, ffi::Span<const int64_t> gates,
                     ffi::Span<const float> eps, ffi::Span<const int64_t> outputs) {
  Chain chain(operands, results, adds, gates, eps, outputs);
  if (const std::string wrong = chain.Fill(); !wrong.empty()) return InvalidArgument(kChain, wrong);
  return CudaError(kChain,
                   DecodeChain(chain.calls.data(), static_cast<int>(chain.calls.size()), stream));
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_chain_decode, slidejax::decode::ChainImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("adds")
                                  .Attr<xla::ffi::Span<const int64_t>>("gates")
                                  .Attr<xla::ffi::Span<const float>>("eps")
                                  .Attr<xla::ffi::Span<const int64_t>>("outputs"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

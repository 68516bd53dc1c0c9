// FFI targets of the Hopper implementation (hopper/hopper.h).
//
//   slidejax_metadata_hopper: zeros u8 [out, groups] -> metadata u8 [bytes]; attribute group
//   slidejax_sparse_matmul_hopper: lifted [M, K'], scale_x f32 [M], WEIGHT, residual
//       -> y [M, out], workspace u8 [W]
//   slidejax_linear_hopper: x [M, K], up [M, K] or [0], norm_weight f32 [K] or [0],
//       norm_bias f32 [K] or [0], WEIGHT, residual
//       -> y [M, out], lifted [M, K'], scale_x f32 [M], workspace u8 [W];
//       attributes group, prologue, activation, eps as slidejax_lift_quantize_fused has them. The
//       lift and the product in one call, so that the product's kernel can begin while the lift's
//       still runs.
//   slidejax_chain_hopper: x [M, K]; for each stage WEIGHT, residual, and norm f32 [K] or [0]
//       -> y [M, out] of each stage in `outputs`, workspace u8 [W]. A stage is a lift and a
//       product, and reads the y of the one before. Attributes, a number for each stage: `adds`,
//       the earlier stage whose y is the residual, or -1; `gates`, the lift::Activation of the gate
//       in the first half of the stage's input, or -1; `eps` of the norm; `workspaces`, the bytes
//       of workspace that the product takes. The workspace must also hold the codes and scales of
//       every stage, and the results that are no outputs, each aligned to 128 bytes.
//
// WEIGHT: values [out, groups, kept], zeros u8 [out, groups], scale_w f32 [out],
// bias f32 [out] or [0], metadata u8 [bytes] or [0]. A dense weight has values [out, K'], and
// neither zeros nor metadata, which are [0]. A residual is [M, out] or [0].
#include "handlers.h"

#include <algorithm>
#include <vector>

#include "common/ffi_util.h"
#include "common/group.h"
#include "common/integers.h"
#include "common/workspace.h"
#include "hopper/hopper.h"
#include "lift/arguments.h"

namespace slidejax::hopper {
namespace {

constexpr char kMatmul[] = "sparse_matmul_hopper";
constexpr char kLinear[] = "linear_hopper";
constexpr char kChain[] = "chain_hopper";
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

// Fills in a residual; returns what is wrong with it, or "".
std::string ResidualArguments(const ffi::AnyBuffer& residual, Args& args) {
  if (residual.element_count() == 0) return "";
  const auto type = DTypeOf(residual.element_type());
  if (type != DType::kBF16 && type != DType::kF16 && type != DType::kF32) {
    return "residual must be bfloat16, float16 or float32";
  }
  if (residual.dimensions().size() != 2 || residual.dimensions()[0] != args.problem.M ||
      residual.dimensions()[1] != args.problem.out) {
    return "residual must be [M, out] or [0]";
  }
  args.residual = residual.untyped_data(), args.residual_type = *type;
  return "";
}

// Fills in the arguments of y = lifted x weight + residual; returns what is wrong with them, or "".
std::string MatmulArguments(const ffi::AnyBuffer& lifted, const ffi::Buffer<ffi::F32>& scale_x,
                            const Weight& w, const ffi::AnyBuffer& residual,
                            const ffi::AnyBuffer& y, const ffi::Buffer<ffi::U8>& workspace,
                            Args& args) {
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

  if (std::string wrong = ResidualArguments(residual, args); !wrong.empty()) return wrong;
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
                      ffi::Buffer<ffi::U8> metadata, ffi::AnyBuffer residual,
                      ffi::Result<ffi::AnyBuffer> y, ffi::ResultBuffer<ffi::U8> workspace) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  Args args = {};
  const std::string wrong = MatmulArguments(lifted, scale_x, w, residual, *y, *workspace, args);
  if (!wrong.empty()) return Wrong(kMatmul, wrong, lifted, lifted, w, *y, *workspace);
  if (y->element_count() == 0) return ffi::Error::Success();
  return CudaError(NameOf(kMatmul, lifted, *y), SparseMatmul(args, stream));
}

ffi::Error LinearImpl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer up,
                      ffi::Buffer<ffi::F32> norm_weight, ffi::Buffer<ffi::F32> norm_bias,
                      ffi::AnyBuffer values, ffi::Buffer<ffi::U8> zeros,
                      ffi::Buffer<ffi::F32> scale_w, ffi::Buffer<ffi::F32> bias,
                      ffi::Buffer<ffi::U8> metadata, ffi::AnyBuffer residual,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> lifted,
                      ffi::ResultBuffer<ffi::F32> scale_x, ffi::ResultBuffer<ffi::U8> workspace,
                      int32_t group, std::string_view prologue, std::string_view activation,
                      float eps) {
  const Weight w{values, zeros, scale_w, bias, metadata};
  lift::Args lift_args = {};
  Args args = {};
  args.after_lift = true;
  std::string wrong = lift::FusedArguments(
      {x, up, norm_weight, norm_bias, *lifted, *scale_x, group, prologue, activation, eps},
      lift_args);
  if (wrong.empty()) wrong = MatmulArguments(*lifted, *scale_x, w, residual, *y, *workspace, args);
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

// The lifts and products of a chain, from its operands, results and attributes.
class Chain {
 public:
  struct Stage {
    lift::Args lift;
    Args product;
  };
  std::vector<Stage> stages;

  Chain(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Span<const int64_t> adds,
        ffi::Span<const int64_t> gates, ffi::Span<const float> eps,
        ffi::Span<const int64_t> workspaces, ffi::Span<const int64_t> outputs)
      : operands_(operands),
        results_(results),
        adds_(adds),
        gates_(gates),
        eps_(eps),
        workspaces_(workspaces),
        outputs_(outputs) {}

  // Fills in all stages; returns what is wrong, or "".
  std::string Fill() {
    const size_t count = adds_.size();
    if (count == 0 || gates_.size() != count || eps_.size() != count || workspaces_.size() != count)
      return "adds, gates, eps and workspaces must have a number for each stage";
    if (operands_.size() != 1 + kOperands * count || results_.size() != outputs_.size() + 1)
      return "the operands are x and " + std::to_string(kOperands) +
             " for each stage, the results one for each output and a workspace";
    const auto x = operands_.get<ffi::AnyBuffer>(0);
    auto memory = results_.get<ffi::Buffer<ffi::U8>>(outputs_.size());
    if (!x || x->dimensions().size() != 2 || x->element_count() == 0 ||
        std::max(x->dimensions()[0], x->dimensions()[1]) > INT32_MAX)
      return "x must be a matrix with rows and columns";
    const auto type = DTypeOf(x->element_type());
    if (type != DType::kBF16 && type != DType::kF16 && type != DType::kF32)
      return "x must be bfloat16, float16 or float32";
    if (!memory) return "the workspace must be u8";
    type_ = *type, rows_ = static_cast<int32_t>(x->dimensions()[0]);
    Workspace workspace(**memory, kAlignment);
    stages.resize(count);
    const void* input = x->untyped_data();
    int64_t columns = x->dimensions()[1];
    for (size_t i = 0; i < count; ++i) {
      if (auto wrong = Fill(i, input, columns, workspace); !wrong.empty())
        return "stage " + std::to_string(i) + ": " + wrong;
      input = stages[i].product.y, columns = stages[i].product.problem.out;
    }
    return workspace.enough() ? "" : "the workspace is too small";
  }

 private:
  static constexpr size_t kOperands = 7;  // of a stage

  // `input`: what the stage reads, of `width` columns.
  std::string Fill(size_t i, const void* input, int64_t width, Workspace& workspace) {
    const size_t first = 1 + kOperands * i;
    const auto values = operands_.get<ffi::AnyBuffer>(first);
    const auto zeros = operands_.get<ffi::Buffer<ffi::U8>>(first + 1);
    const auto scale_w = operands_.get<ffi::Buffer<ffi::F32>>(first + 2);
    const auto bias = operands_.get<ffi::Buffer<ffi::F32>>(first + 3);
    const auto metadata = operands_.get<ffi::Buffer<ffi::U8>>(first + 4);
    const auto residual = operands_.get<ffi::AnyBuffer>(first + 5);
    const auto norm = operands_.get<ffi::Buffer<ffi::F32>>(first + 6);
    if (!values || !zeros || !scale_w || !bias || !metadata || !residual || !norm)
      return "zeros and metadata must be u8, scale_w, bias and norm float32";
    const Weight w{*values, *zeros, *scale_w, *bias, *metadata};
    if ((!w.dense() && values->dimensions().size() != 3) || values->element_count() == 0)
      return "values must be [out, groups, kept] or, dense, [out, K'], and not empty";
    const int64_t outputs = values->dimensions()[0];
    const int64_t group = w.dense() ? 0 : values->dimensions()[2] + 2;
    if (outputs > INT32_MAX || (!w.dense() && !IsGroup(group))) return "kept must be even, 2 to 14";
    const bool gate = gates_[i] >= 0;
    if (gates_[i] > static_cast<int>(lift::Activation::kRelu) || (gate && width % 2 != 0))
      return "gates are numbers of activations, and a gate is half of the input";
    const int64_t columns = gate ? width / 2 : width;
    const int64_t lifted_columns =
        w.dense() ? values->dimensions()[1] : lift::LiftedColumns(columns, static_cast<int>(group));
    if (lifted_columns < columns) return "a dense weight has too few columns";
    Args& args = stages[i].product;
    args.problem.M = rows_, args.problem.out = static_cast<int32_t>(outputs);
    if (auto wrong = WeightArguments(w, lifted_columns, args); !wrong.empty()) return wrong;
    const auto type = DTypeOf(values->element_type());
    if (!type || Bytes(*type) != 1) return "values must be int8 or float8_e4m3fn";
    if (Count(*scale_w) != outputs || (Count(*bias) != 0 && Count(*bias) != outputs))
      return "scale_w must be [out], bias [out] or [0]";
    if (Count(*norm) != 0 && (Count(*norm) != columns || gate))
      return "norm must be [K] or [0], and [0] with a gate";
    if (auto wrong = ResidualArguments(*residual, args); !wrong.empty()) return wrong;
    if (adds_[i] >= 0) {
      if (adds_[i] >= static_cast<int64_t>(i) || stages[adds_[i]].product.problem.out != outputs)
        return "adds must name an earlier stage with as many outputs";
      args.residual = stages[adds_[i]].product.y, args.residual_type = type_;
    }
    args.operand = *type, args.result = type_;
    void* const lifted = workspace.Take(rows_ * lifted_columns);
    auto* const scale_x = static_cast<float*>(workspace.Take(rows_ * int64_t{4}));
    args.lifted = lifted, args.scale_x = scale_x;
    args.workspace_bytes = std::max<int64_t>(workspaces_[i], 0);
    args.workspace = workspace.Take(static_cast<int64_t>(args.workspace_bytes));
    args.after_lift = true;
    if (auto wrong = Result(i, workspace); !wrong.empty()) return wrong;

    lift::Args& lift = stages[i].lift;
    lift.x = input, lift.x_type = type_, lift.rows = rows_;
    lift.columns = columns, lift.x_stride = width;
    lift.lifted = lifted, lift.lifted_type = *type, lift.scale = scale_x;
    lift.lifted_columns = lifted_columns, lift.group = static_cast<int>(group);
    if (std::max(columns, w.dense() ? lifted_columns : 0) > lift::kMaxColumns)
      return "a row has too many columns";
    if (gate) {
      lift.prologue = lift::PrologueKind::kGlu;
      lift.activation = static_cast<lift::Activation>(gates_[i]);
      lift.up = static_cast<const char*>(input) + columns * static_cast<int64_t>(Bytes(type_));
    } else if (Count(*norm) != 0) {
      lift.prologue = lift::PrologueKind::kRmsNorm;
      lift.weight = norm->typed_data(), lift.eps = eps_[i];
    }
    lift.behind = i > 0;
    const char* wrong = Check(args);
    return wrong ? wrong : "";
  }

  // Where the stage's results go.
  std::string Result(size_t i, Workspace& workspace) {
    Args& args = stages[i].product;
    for (size_t output = 0; output < outputs_.size(); ++output) {
      if (outputs_[output] != static_cast<int64_t>(i)) continue;
      auto y = results_.get<ffi::AnyBuffer>(output);
      if (!y || (*y)->dimensions().size() != 2 || (*y)->dimensions()[0] != rows_ ||
          (*y)->dimensions()[1] != args.problem.out || DTypeOf((*y)->element_type()) != type_)
        return "y must be [M, out] in the dtype of x";
      args.y = (*y)->untyped_data();
      return "";
    }
    args.y = workspace.Take(int64_t{rows_} * args.problem.out * static_cast<int64_t>(Bytes(type_)));
    return "";
  }

  const ffi::RemainingArgs operands_;
  const ffi::RemainingRets results_;
  const ffi::Span<const int64_t> adds_, gates_;
  const ffi::Span<const float> eps_;
  const ffi::Span<const int64_t> workspaces_, outputs_;
  DType type_ = DType::kBF16;
  int32_t rows_ = 0;
};

// Launches a chain. Metadata that is not prepared is made first: the first lift begins when all of
// it is there, and so do all kernels behind that one.
cudaError_t Run(std::vector<Chain::Stage>& stages, cudaStream_t stream) {
  for (Chain::Stage& stage : stages) {
    Counters counters = {};
    if (auto s = BeforeLift(stage.product, stream, &counters)) return s;
    stage.lift.counters = counters.first, stage.lift.counter_count = counters.count;
  }
  for (const Chain::Stage& stage : stages) {
    if (auto s = lift::LiftQuantize(stage.lift, stream)) return s;
    if (auto s = SparseMatmul(stage.product, stream)) return s;
  }
  return cudaSuccess;
}

ffi::Error ChainImpl(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                     ffi::Span<const int64_t> adds, ffi::Span<const int64_t> gates,
                     ffi::Span<const float> eps, ffi::Span<const int64_t> workspaces,
                     ffi::Span<const int64_t> outputs) {
  Chain chain(operands, results, adds, gates, eps, workspaces, outputs);
  if (const std::string wrong = chain.Fill(); !wrong.empty()) return InvalidArgument(kChain, wrong);
  return CudaError(kChain, Run(chain.stages, stream));
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
      .Arg<ffi::AnyBuffer>()
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
      .Arg<ffi::AnyBuffer>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_chain_hopper, slidejax::hopper::ChainImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("adds")
                                  .Attr<xla::ffi::Span<const int64_t>>("gates")
                                  .Attr<xla::ffi::Span<const float>>("eps")
                                  .Attr<xla::ffi::Span<const int64_t>>("workspaces")
                                  .Attr<xla::ffi::Span<const int64_t>>("outputs"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

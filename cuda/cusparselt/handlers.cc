// FFI targets of the cuSPARSELt implementation.
//
//   slidejax_compress_cusparselt: values [out, groups, kept], zeros u8 [out, groups]
//       -> compressed u8 [bytes]; attribute layout, of layout.h: with none the library compresses
//   slidejax_sparse_matmul_cusparselt: lifted [M, K'], scale_x f32 [M], compressed u8 [bytes],
//       scale_w f32 [out], bias f32 [out] or [0], residual [M, out] or [0] -> y [M, out],
//       workspace u8 [W];
//       attributes raw, algorithm, split_k, split_k_mode, parts, beside
//
// With the attribute raw, y is the int32 or float32 accumulators. For bfloat16 y the library rounds
// the accumulators of 8-bit codes to bfloat16, whose range holds all of them, and slidejax's kernel
// applies scales and bias in place: a second rounding, for a third of the memory traffic. Any other
// y is made from int32 or float32 accumulators and rounded once.
//
// The initialize stage makes the plans, once for each device, and keeps them in the state that the
// instantiate stage has made. The execute stage only copies, multiplies and finishes, into XLA's
// buffers and in order with its stream, so that it can be captured in a CUDA graph.
#include "handlers.h"

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "common/ffi_util.h"
#include "common/group.h"
#include "cusparselt/helpers.h"
#include "cusparselt/layout.h"
#include "cusparselt/plan.h"
#include "cusparselt/product.h"

namespace slidejax::cusparselt {
namespace {

constexpr char kCompress[] = "compress_cusparselt";
constexpr char kMatmul[] = "sparse_matmul_cusparselt";
constexpr int64_t kAlignment = 256;  // of the parts of the workspace

ffi::Error CompressImpl(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::AnyBuffer values,
                        ffi::Buffer<ffi::U8> zeros, ffi::ResultBuffer<ffi::U8> compressed,
                        ffi::Span<const int64_t> layout) {
  const auto fail = [&](const std::string& message) {
    return InvalidArgument(kCompress, message + " (values " + slidejax::Describe(values) +
                                          ", zeros u8[" + std::to_string(zeros.element_count()) +
                                          "])");
  };
  const auto type = DTypeOf(values.element_type());
  if (!type || Bytes(*type) > 2)
    return fail("values must be int8, float8_e4m3fn, bfloat16 or float16");
  if (values.dimensions().size() != 3) return fail("values must be [out, groups, kept]");
  ExpandArgs args = {};
  args.outputs = values.dimensions()[0], args.groups = values.dimensions()[1];
  args.group = static_cast<int>(values.dimensions()[2]) + 2;
  if (!IsGroup(args.group)) return fail("kept must be even, 2 to 14");
  if (args.groups % 8 != 0) return fail("groups must be whole blocks of 8");
  if (static_cast<int64_t>(zeros.element_count()) != args.outputs * args.groups)
    return fail("zeros must be [out, groups]");
  const int64_t columns = args.groups * (args.group / 2 - 1) * 4;
  args.padded_outputs = RoundUp<int64_t>(args.outputs, Multiple(*type));
  try {
    const CompressedSize size = SizeOfCompressed(*type, args.outputs, columns);
    if (compressed->element_count() != size.compressed) {
      return fail("the compressed form takes " + std::to_string(size.compressed) + " bytes, not " +
                  std::to_string(compressed->element_count()));
    }
    if (const auto known = FromNumbers(layout.begin(), layout.size())) {
      PackArgs pack = {};
      pack.values = values.untyped_data(), pack.zeros = zeros.typed_data();
      pack.compressed = compressed->typed_data(), pack.compressed_bytes = Count(*compressed);
      pack.type = *type, pack.outputs = args.outputs, pack.padded_outputs = args.padded_outputs;
      pack.groups = args.groups, pack.group = args.group, pack.layout = *known;
      const cudaError_t status = PackCompressed(pack, stream);
      return status == cudaSuccess ? ffi::Error::Success() : CudaError(kCompress, status);
    }
    // XLA accepts no alignment above 16 here, but aligns to more.
    const auto dense =
        scratch.Allocate(std::max<size_t>(args.padded_outputs * columns * Bytes(*type), 16), 16);
    const auto buffer = scratch.Allocate(std::max<size_t>(size.buffer, 16), 16);
    if (!dense || !buffer) {
      return ffi::Error(
          ffi::ErrorCode::kResourceExhausted,
          "slidejax compress_cusparselt: XLA has no scratch memory for a dense copy of values " +
              slidejax::Describe(values));
    }
    args.values = values.untyped_data(), args.zeros = zeros.typed_data(), args.lifted = *dense,
    args.type = *type;
    const cudaError_t status = ExpandLifted(args, stream);
    if (status != cudaSuccess) return CudaError(kCompress, status);
    Compress(*type, args.outputs, columns, *dense, compressed->typed_data(), *buffer, stream);
  } catch (const Failure& failure) {
    return ffi::Error::Internal(std::string("slidejax ") + kCompress + ": " + failure.what());
  }
  return ffi::Error::Success();
}

// ---- The product --------------------------------------------------------------------------------

// The products of one call in one executable. The devices that run the executable share it, each
// with a product of its own.
class State {
 public:
  static ffi::TypeId id;

  // Returns the product for a problem on the current device, and makes it if there is none. The
  // problem's choice was measured at a nearby number of tokens. Where these are too few for its
  // parts, there is one part. Where the library refuses its algorithm, or the algorithm wants more
  // workspace than there is, the library's default takes its place. Throws Failure.
  const Product& Get(const Problem& problem, size_t workspace_limit) {
    int device = 0;
    if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess)
      throw Failure(cudaGetErrorString(status));
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<Product>& product = products_[{device, problem.Key()}];
    if (product == nullptr) product = Make(problem, workspace_limit);
    return *product;
  }

 private:
  static std::unique_ptr<Product> Make(Problem problem, size_t workspace_limit) {
    const Choice asked = problem.choice;
    const Choice in_one_part = {asked.algorithm, asked.split_k, asked.split_k_mode, 1};
    for (const Choice& choice : {asked, in_one_part}) {
      if (choice.algorithm < 0) break;
      problem.choice = choice;
      try {
        auto product = std::make_unique<Product>(problem);
        if (product->workspace_bytes() <= workspace_limit) return product;
      } catch (const Failure&) {
      }
    }
    problem.choice = {};
    auto product = std::make_unique<Product>(problem);
    if (product->workspace_bytes() > workspace_limit) {
      throw Failure("the library wants " + std::to_string(product->workspace_bytes()) +
                    " bytes of workspace, and has " + std::to_string(workspace_limit) + ", for " +
                    problem.Describe());
    }
    return product;
  }

  std::mutex mutex_;
  std::map<std::pair<int, decltype(std::declval<Problem>().Key())>, std::unique_ptr<Product>>
      products_;
};
ffi::TypeId State::id = {};

ffi::ErrorOr<std::unique_ptr<State>> Instantiate(ffi::Dictionary) {
  return std::make_unique<State>();
}

// A call whose shapes have been checked.
struct Call {
  Problem problem;
  int64_t rows, outputs, columns;
  DType y_type;
  bool raw;
  bool padded_rows;  // x is copied, so that the library may read whole multiples of rows
  bool direct;       // the accumulators are where y will be
  // Bytes of the workspace's parts.
  int64_t accumulator_bytes, padded_bytes;
  size_t library_bytes;  // the rest of the workspace
};

struct Operands {
  ffi::AnyBuffer lifted;
  ffi::Buffer<ffi::F32> scale_x;
  ffi::Buffer<ffi::U8> compressed;
  ffi::Buffer<ffi::F32> scale_w;
  ffi::Buffer<ffi::F32> bias;
  ffi::AnyBuffer residual;
  ffi::AnyBuffer y;
  ffi::Buffer<ffi::U8> workspace;
  bool raw;
  int32_t algorithm, split_k, split_k_mode, parts, beside;

  std::string Describe() const {
    return "(lifted " + slidejax::Describe(lifted) + ", compressed u8[" +
           std::to_string(compressed.element_count()) + "], y " + slidejax::Describe(y) +
           ", workspace u8[" + std::to_string(workspace.element_count()) + "])";
  }
};

// The failure to report about a call's operands.
Failure FailureOf(const std::string& message, const Operands& o) {
  return Failure(message + " " + o.Describe());
}

bool IsWide(DType type) {
  return type == DType::kBF16 || type == DType::kF16 || type == DType::kF32;
}

// Throws Failure.
void CheckShapes(const Operands& o) {
  const auto type = DTypeOf(o.lifted.element_type()), y_type = DTypeOf(o.y.element_type());
  const auto require = [&](bool holds, const char* message) {
    if (!holds) throw FailureOf(message, o);
  };
  require(type && Bytes(*type) <= 2, "lifted must be int8, float8_e4m3fn, bfloat16 or float16");
  require(y_type && Bytes(*y_type) > 1, "y must be bfloat16, float16, float32 or int32");
  require(o.lifted.dimensions().size() == 2 && o.y.dimensions().size() == 2,
          "lifted and y must be matrices");
  const int64_t rows = o.lifted.dimensions()[0], outputs = o.y.dimensions()[1];
  require(o.lifted.dimensions()[1] % 32 == 0, "lifted columns must be a multiple of 32");
  require(o.y.dimensions()[0] == rows, "lifted and y must have the same rows");
  require(Count(o.scale_x) == rows, "scale_x must have one element for each row");
  require(Count(o.scale_w) == outputs, "scale_w must have one element for each output");
  require(Count(o.bias) == 0 || Count(o.bias) == outputs,
          "bias must have one element for each output, or none");
  const auto residual_type = DTypeOf(o.residual.element_type());
  require(Count(o.residual) == 0 ||
              (Count(o.residual) == rows * outputs && residual_type && IsWide(*residual_type)),
          "residual must be bfloat16, float16 or float32 of the shape of y, or nothing");
  require(!o.raw || Count(o.residual) == 0, "raw y takes no residual");
  if (o.raw) {
    require(*y_type == (*type == DType::kS8 ? DType::kS32 : DType::kF32),
            "raw y must be int32 for int8 codes, float32 for others");
  } else {
    require(*y_type != DType::kS32, "y must be a float");
  }
}

Problem ProblemOf(const Operands& o) {
  Problem p = {};
  p.operand = *DTypeOf(o.lifted.element_type());
  p.outputs = RoundUp<int64_t>(o.y.dimensions()[1], Multiple(p.operand));
  p.tokens = RoundUp<int64_t>(o.lifted.dimensions()[0], Multiple(p.operand));
  p.columns = o.lifted.dimensions()[1];
  p.choice = {o.algorithm, o.split_k, o.split_k_mode, o.parts, o.beside};
  if (Bytes(p.operand) > 1)
    p.result = p.operand;
  else if (!o.raw && *DTypeOf(o.y.element_type()) == DType::kBF16)
    p.result = DType::kBF16;
  else
    p.result = p.operand == DType::kS8 ? DType::kS32 : DType::kF32;
  return p;
}

// Throws Failure.
Call CheckCall(const Operands& o) {
  CheckShapes(o);
  Call call = {};
  call.rows = o.lifted.dimensions()[0], call.columns = o.lifted.dimensions()[1];
  call.outputs = o.y.dimensions()[1];
  call.y_type = *DTypeOf(o.y.element_type()), call.raw = o.raw;
  const Problem& p = call.problem = ProblemOf(o);
  if (o.raw && p.result != call.y_type) {
    throw FailureOf("the library has no float32 accumulators for this dtype", o);
  }
  call.padded_rows = p.tokens != call.rows;
  call.direct =
      Bytes(p.result) == Bytes(call.y_type) && !call.padded_rows && p.outputs == call.outputs;
  const int64_t result_bytes = Bytes(p.result), operand_bytes = Bytes(p.operand);
  call.accumulator_bytes = call.direct ? 0 : p.tokens * p.outputs * result_bytes;
  call.padded_bytes = call.padded_rows ? p.tokens * p.columns * operand_bytes : 0;
  const int64_t used = kAlignment + RoundUp<int64_t>(call.accumulator_bytes, kAlignment) +
                       RoundUp<int64_t>(call.padded_bytes, kAlignment);
  if (Count(o.workspace) < used) {
    throw FailureOf("workspace must have at least " + std::to_string(used) + " bytes", o);
  }
  call.library_bytes = static_cast<size_t>(Count(o.workspace) - used);
  return call;
}

// Makes Operands of a handler's arguments.
template <typename... Rest>
Operands Gather(ffi::AnyBuffer lifted, ffi::Buffer<ffi::F32> scale_x,
                ffi::Buffer<ffi::U8> compressed, ffi::Buffer<ffi::F32> scale_w,
                ffi::Buffer<ffi::F32> bias, ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y,
                ffi::ResultBuffer<ffi::U8> workspace, Rest... attributes) {
  return {lifted, scale_x, compressed, scale_w, bias, residual, *y, *workspace, attributes...};
}

ffi::Error Initialize(State* state, const Operands& o) {
  if (o.lifted.element_count() == 0 || o.y.element_count() == 0) return ffi::Error::Success();
  try {
    const Call call = CheckCall(o);
    state->Get(call.problem, call.library_bytes);
  } catch (const Failure& failure) {
    return ffi::Error::Internal(std::string("slidejax ") + kMatmul + ": " + failure.what());
  }
  return ffi::Error::Success();
}

// Runs a checked call; throws Failure.
void Run(const Call& call, const Product& product, const Operands& o, cudaStream_t stream) {
  const Problem& p = call.problem;
  // The parts of the workspace are accumulators, padded x and the library's own, in this order.
  char* next = reinterpret_cast<char*>(
      RoundUp<int64_t>(reinterpret_cast<intptr_t>(o.workspace.untyped_data()), kAlignment));
  const auto take = [&](int64_t bytes) {
    char* part = next;
    next += RoundUp<int64_t>(bytes, kAlignment);
    return part;
  };
  const auto check = [&](cudaError_t status, const char* what) {
    if (status != cudaSuccess)
      throw Failure(std::string(what) + ": " + cudaGetErrorString(status) + " " + o.Describe());
  };
  void* d = call.direct ? o.y.untyped_data() : take(call.accumulator_bytes);
  const void* x = o.lifted.untyped_data();
  if (call.padded_rows) {
    const int64_t bytes = call.rows * call.columns * Bytes(p.operand);
    char* copy = take(call.padded_bytes);
    check(cudaMemcpyAsync(copy, x, bytes, cudaMemcpyDeviceToDevice, stream), "copying x");
    check(cudaMemsetAsync(copy + bytes, 0, call.padded_bytes - bytes, stream), "padding x");
    x = copy;
  }
  void* scratch = take(product.workspace_bytes());
  if (call.raw) {
    product.Run(o.compressed.typed_data(), x, d, scratch, nullptr, stream);
    if (call.direct) return;
    const int64_t element = Bytes(p.result);  // there is only padding to drop
    check(cudaMemcpy2DAsync(o.y.untyped_data(), call.outputs * element, d, p.outputs * element,
                            call.outputs * element, call.rows, cudaMemcpyDeviceToDevice, stream),
          "dropping padding");
    return;
  }
  DequantizeArgs finish = {};
  finish.accumulators = d, finish.accumulator_type = p.result, finish.pitch = p.outputs;
  finish.scale_x = o.scale_x.typed_data();
  // A weight that is not quantised has scales of one.
  finish.scale_w = Bytes(p.operand) == 1 ? o.scale_w.typed_data() : nullptr;
  finish.bias = o.bias.element_count() > 0 ? o.bias.typed_data() : nullptr;
  if (o.residual.element_count() > 0) {
    finish.residual = o.residual.untyped_data();
    finish.residual_type = *DTypeOf(o.residual.element_type());
  }
  finish.y = o.y.untyped_data(), finish.y_type = call.y_type;
  finish.rows = call.rows, finish.outputs = call.outputs;
  product.Run(o.compressed.typed_data(), x, d, scratch, &finish, stream);
}

ffi::Error Execute(cudaStream_t stream, State* state, const Operands& o) {
  if (o.y.element_count() == 0) return ffi::Error::Success();
  if (o.lifted.element_count() == 0)
    return InvalidArgument(kMatmul, "K' must not be 0 " + o.Describe());
  try {
    const Call call = CheckCall(o);
    Run(call, state->Get(call.problem, call.library_bytes), o, stream);
  } catch (const Failure& failure) {
    return ffi::Error::Internal(std::string("slidejax ") + kMatmul + ": " + failure.what());
  }
  return ffi::Error::Success();
}

// Binds the operands and attributes, as every stage after instantiate sees them.
template <typename Binding>
auto BindOperands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::Buffer<ffi::U8>>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::Buffer<ffi::F32>>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::Buffer<ffi::U8>>()
      .template Attr<bool>("raw")
      .template Attr<int32_t>("algorithm")
      .template Attr<int32_t>("split_k")
      .template Attr<int32_t>("split_k_mode")
      .template Attr<int32_t>("parts")
      .template Attr<int32_t>("beside");
}

}  // namespace
}  // namespace slidejax::cusparselt

XLA_FFI_TypeId* slidejax_cusparselt_state_id() { return &slidejax::cusparselt::State::id; }

const XLA_FFI_TypeInfo* slidejax_cusparselt_state_info() {
  static const XLA_FFI_TypeInfo info = xla::ffi::MakeTypeInfo<slidejax::cusparselt::State>();
  return &info;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_compress_cusparselt, slidejax::cusparselt::CompressImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<xla::ffi::ScratchAllocator>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("layout"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_sparse_matmul_cusparselt_instantiate,
                              slidejax::cusparselt::Instantiate,
                              xla::ffi::Ffi::BindInstantiate().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_sparse_matmul_cusparselt_initialize,
    [](slidejax::cusparselt::State* state, auto... operands) {
      return slidejax::cusparselt::Initialize(state, slidejax::cusparselt::Gather(operands...));
    },
    slidejax::cusparselt::BindOperands(
        xla::ffi::Ffi::BindInitialize().Ctx<xla::ffi::State<slidejax::cusparselt::State>>()));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_sparse_matmul_cusparselt_execute,
    [](cudaStream_t stream, slidejax::cusparselt::State* state, auto... operands) {
      return slidejax::cusparselt::Execute(stream, state,
                                           slidejax::cusparselt::Gather(operands...));
    },
    slidejax::cusparselt::BindOperands(xla::ffi::Ffi::Bind()
                                           .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                           .Ctx<xla::ffi::State<slidejax::cusparselt::State>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});

// FFI target of the attention kernel (attention/attention.h).
//
//   slidejax_decode_attention: q [rows, heads * head_dim], k and v [rows, kv_heads * head_dim], or
//       q, k and v side by side in one array and the others [0]; keys and values
//       [rows, kv_heads, length, head_dim], positions s32 [rows], cosines and sines f32
//       [rows, head_dim / 2] -> y [rows, heads * head_dim], keys and values in place, workspace u8
//       [W]. Attributes: heads, scale, window (0 is none).
#include "handlers.h"

#include <algorithm>

#include "attention/attention.h"
#include "attention/plan.h"
#include "common/ffi_util.h"
#include "common/integers.h"

namespace slidejax::attention {
namespace {

constexpr char kName[] = "decode_attention";
constexpr int64_t kMostRows = 65535, kMost = int64_t{1} << 30;  // of a grid; of other dimensions
constexpr int kAlignment = 16;

// Readies the current device's kernels, outside of capture.
ffi::Error InitializeImpl(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return CudaError(kName, AttentionInit());
}

bool IsFloat(std::optional<DType> type) {
  return type && (*type == DType::kBF16 || *type == DType::kF16 || *type == DType::kF32);
}

bool Misaligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment != 0; }

// Fills in the arguments; returns what is wrong with them, or "".
std::string Arguments(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v,
                      const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
                      const ffi::Buffer<ffi::S32>& positions, const ffi::Buffer<ffi::F32>& cosines,
                      const ffi::Buffer<ffi::F32>& sines, const ffi::AnyBuffer& y,
                      const ffi::AnyBuffer& keys_out, const ffi::AnyBuffer& values_out,
                      const ffi::Buffer<ffi::U8>& workspace, int64_t heads, float scale,
                      int64_t window, AttentionArgs& args) {
  const auto shape = keys.dimensions();
  if (shape.size() != 4 || q.dimensions().size() != 2)
    return "q must be a matrix, keys [rows, kv_heads, length, head_dim]";
  const int64_t rows = shape[0], kv_heads = shape[1], length = shape[2], head_dim = shape[3];
  if (std::max({rows, kv_heads, length, heads, window}) > kMost || rows > kMostRows ||
      kv_heads * kMaxHeads > kMostRows)
    return "too many rows, heads or positions";
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) return "kv_heads must divide heads";
  if (head_dim < kHeadDimMultiple || head_dim > kMaxHeadDim || head_dim % kHeadDimMultiple != 0)
    return "head_dim must be a multiple of 16 up to 256";
  const bool together = k.element_count() == 0 && v.element_count() == 0;
  const int64_t q_size = heads * head_dim, kv_size = kv_heads * head_dim;
  const int64_t row = together ? q_size + 2 * kv_size : q_size;
  if (q.dimensions()[0] != rows || q.dimensions()[1] != row) return "q has another size";
  if (!together && (Count(k) != rows * kv_size || Count(v) != rows * kv_size))
    return "k and v must be [rows, kv_heads * head_dim]";
  if (Count(values) != Count(keys) || values.element_type() != keys.element_type())
    return "keys and values must be of one shape and dtype";
  const auto type = DTypeOf(q.element_type()), cache = DTypeOf(keys.element_type());
  if (!IsFloat(type) || !IsFloat(cache) || y.element_type() != q.element_type() ||
      (!together && (k.element_type() != q.element_type() || v.element_type() != q.element_type())))
    return "q, k, v and y, and the cache, must be bfloat16, float16 or float32";
  if (Count(positions) != rows) return "positions must be [rows]";
  if (Count(cosines) != rows * head_dim / 2 || Count(sines) != rows * head_dim / 2)
    return "cosines and sines must be [rows, head_dim / 2]";
  if (Count(y) != rows * q_size) return "y must be [rows, heads * head_dim]";
  if (keys_out.untyped_data() != keys.untyped_data() ||
      values_out.untyped_data() != values.untyped_data())
    return "the cache must be written in place";

  const auto* begin = static_cast<const char*>(q.untyped_data());
  const int64_t bytes = static_cast<int64_t>(Bytes(*type));
  args.q = begin, args.type = *type;
  args.k = together ? begin + q_size * bytes : k.untyped_data();
  args.v = together ? begin + (q_size + kv_size) * bytes : v.untyped_data();
  args.q_stride = row, args.kv_stride = together ? row : kv_size;
  args.keys = keys.untyped_data(), args.values = values.untyped_data(), args.cache_type = *cache;
  args.positions = positions.typed_data();
  args.cosines = cosines.typed_data(), args.sines = sines.typed_data();
  args.y = y.untyped_data();
  args.rows = static_cast<int32_t>(rows), args.heads = static_cast<int32_t>(heads);
  args.kv_heads = static_cast<int32_t>(kv_heads), args.length = static_cast<int32_t>(length);
  args.head_dim = static_cast<int32_t>(head_dim);
  args.scale = scale, args.window = static_cast<int32_t>(window);
  for (const void* p :
       {args.q, args.k, args.v, static_cast<const void*>(args.keys),
        static_cast<const void*>(args.values), static_cast<const void*>(args.cosines),
        static_cast<const void*>(args.sines)})
    if (Misaligned(p)) return "operands must be aligned to 16 bytes";
  const auto at = reinterpret_cast<uintptr_t>(workspace.typed_data());
  const uintptr_t aligned = RoundUp<uintptr_t>(at, kAlignment);
  args.workspace = reinterpret_cast<void*>(aligned);
  const int64_t wanted = rows == 0 ? 0 : AttentionWorkspace(args);
  if (Count(workspace) - static_cast<int64_t>(aligned - at) < wanted)
    return "the workspace must have " + std::to_string(wanted + kAlignment) + " bytes";
  return "";
}

ffi::Error AttentionImpl(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::AnyBuffer keys, ffi::AnyBuffer values,
                         ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::F32> cosines,
                         ffi::Buffer<ffi::F32> sines, ffi::Result<ffi::AnyBuffer> y,
                         ffi::Result<ffi::AnyBuffer> keys_out,
                         ffi::Result<ffi::AnyBuffer> values_out,
                         ffi::ResultBuffer<ffi::U8> workspace, int64_t heads, float scale,
                         int64_t window) {
  AttentionArgs args = {};
  const std::string wrong =
      Arguments(q, k, v, keys, values, positions, cosines, sines, *y, *keys_out, *values_out,
                *workspace, heads, scale, window, args);
  if (!wrong.empty()) {
    return InvalidArgument(kName, wrong + " (q " + Describe(q) + ", k " + Describe(k) + ", keys " +
                                      Describe(keys) + ", y " + Describe(*y) + ", heads " +
                                      std::to_string(heads) + ", workspace u8[" +
                                      std::to_string(workspace->element_count()) + "])");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  return CudaError(std::string(kName) + " of q " + Describe(q) + " and keys " + Describe(keys),
                   Attention(args, stream));
}

}  // namespace
}  // namespace slidejax::attention

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    slidejax_attention_initialize, slidejax::attention::InitializeImpl,
    xla::ffi::Ffi::BindInitialize().RemainingArgs().RemainingRets().Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(slidejax_decode_attention, slidejax::attention::AttentionImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Attr<int64_t>("heads")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

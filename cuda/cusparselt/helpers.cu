#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cusparselt/helpers.h"

namespace slidejax::cusparselt {
namespace {

constexpr int kThreads = 256;

// Thread blocks of a grid-stride loop, enough for any GPU.
unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 16)));
}

// ---- Expansion: a thread writes the four columns of one window ----------------------------------

template <typename T>  // an unsigned integer of the element's size
__global__ void ExpandKernel(const ExpandArgs a) {
  using Window = std::conditional_t<sizeof(T) == 1, uint32_t, uint64_t>;
  // A stored -0 would count as a non-zero when the library compresses the window.
  constexpr T kMinusZero = static_cast<T>(T{1} << (8 * sizeof(T) - 1));
  const int windows = a.group / 2 - 1, kept = a.group - 2;
  const int64_t row_windows = a.groups * windows;
  const bool is_float = a.type != DType::kS8;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < a.padded_outputs * row_windows; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t out = i / row_windows, q = i - out * row_windows, g = q / windows;
    const int w = static_cast<int>(q - g * windows);
    Window window = 0;
    if (out < a.outputs) {
      const uint8_t zeros = a.zeros[out * a.groups + g];
      const T* values = static_cast<const T*>(a.values) + (out * a.groups + g) * kept + 2 * w;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        // The kept value's column in its group is its number plus the zeros before it.
        int column = 2 * w + k;
        column += column >= (zeros & 15);
        column += column >= (zeros >> 4);
        T value = values[k];
        if (is_float && value == kMinusZero) value = 0;
        window |= static_cast<Window>(value) << (8 * sizeof(T) * ((column - 2 * w) & 3));
      }
    }
    static_cast<Window*>(a.lifted)[i] = window;
  }
}

// ---- Dequantisation: a thread finishes 8 outputs of several rows --------------------------------

constexpr int kVector = 8;
constexpr int kRowsOfThread = 4;  // whose accumulators are under way together
constexpr int kRowsOfBlock = 8 * kRowsOfThread;
constexpr int64_t kManyBlocks = 2048;  // fill any GPU, and make more than one step each

// Eight neighbouring elements, which are loaded and stored as words of 16 bytes. The compiler would
// store a struct of 16-bit elements one by one, which takes several times as long.
template <typename T>
struct Eight;
template <>
struct Eight<int> {
  using Word = int4;
  Word words[2];
  __device__ void ToFloats(float* v) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[4 * i] = __int2float_rn(words[i].x), v[4 * i + 1] = __int2float_rn(words[i].y);
      v[4 * i + 2] = __int2float_rn(words[i].z), v[4 * i + 3] = __int2float_rn(words[i].w);
    }
  }
};
template <>
struct Eight<float> {
  using Word = float4;
  Word words[2];
  __device__ void ToFloats(float* v) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[4 * i] = words[i].x, v[4 * i + 1] = words[i].y;
      v[4 * i + 2] = words[i].z, v[4 * i + 3] = words[i].w;
    }
  }
  __device__ void FromFloats(const float* v) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      words[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }
};
template <typename Pair, float2 (*kToFloats)(Pair), Pair (*kFromFloats)(float2)>
struct EightHalves {
  using Word = uint4;
  Word words[1];
  __device__ void ToFloats(float* v) const {
    const uint32_t bits[] = {words[0].x, words[0].y, words[0].z, words[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pair pair;
      memcpy(&pair, &bits[i], 4);
      const float2 floats = kToFloats(pair);
      v[2 * i] = floats.x, v[2 * i + 1] = floats.y;
    }
  }
  __device__ void FromFloats(const float* v) {
    uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair pair = kFromFloats(make_float2(v[2 * i], v[2 * i + 1]));
      memcpy(&bits[i], &pair, 4);
    }
    words[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  }
};
__device__ inline float2 FromPair(__half2 v) { return __half22float2(v); }
__device__ inline float2 FromPair(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ inline __half2 ToHalves(float2 v) { return __float22half2_rn(v); }
__device__ inline __nv_bfloat162 ToBfloats(float2 v) { return __float22bfloat162_rn(v); }
template <>
struct Eight<__half> : EightHalves<__half2, FromPair, ToHalves> {};
template <>
struct Eight<__nv_bfloat16> : EightHalves<__nv_bfloat162, FromPair, ToBfloats> {};

template <typename T>
__device__ Eight<T> LoadEight(const T* from) {
  Eight<T> eight;
  constexpr int kWords = sizeof(eight.words) / 16;
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    eight.words[i] = __ldcg(reinterpret_cast<const typename Eight<T>::Word*>(from) + i);
  return eight;
}

__device__ inline float ToFloat(__half v) { return __half2float(v); }
__device__ inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float ToFloat(float v) { return v; }
template <typename T>
__device__ inline T FromFloat(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// Adds eight elements, of which `count` exist.
template <typename T>
__device__ void AddEight(const void* data, int64_t at, bool whole, int count, float* v) {
  const T* from = static_cast<const T*>(data) + at;
  if (whole) {
    float terms[kVector];
    LoadEight(from).ToFloats(terms);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = __fadd_rn(v[i], terms[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) v[i] = __fadd_rn(v[i], ToFloat(from[i]));
  }
}

__device__ inline void AddResidual(const DequantizeArgs& a, int64_t at, bool whole, int count,
                                   float* v) {
  if (a.residual == nullptr) return;
  switch (a.residual_type) {
    case DType::kBF16: return AddEight<__nv_bfloat16>(a.residual, at, whole, count, v);
    case DType::kF16: return AddEight<__half>(a.residual, at, whole, count, v);
    default: return AddEight<float>(a.residual, at, whole, count, v);
  }
}

// The rows of a thread in one step: `first`, `first - 8` and so on.
template <typename Acc>
struct Rows {
  Eight<Acc> acc[kRowsOfThread];
  float scale_x[kRowsOfThread];

  __device__ void Load(const DequantizeArgs& a, int64_t first, int64_t column) {
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int64_t row = first - r * 8;
      if (row < 0) continue;
      scale_x[r] = a.scale_x[row];
      // Eights of accumulators are whole, because the pitch of rows is padded.
      acc[r] = LoadEight(static_cast<const Acc*>(a.accumulators) + row * a.pitch + column);
    }
  }
};

// blockDim (32, 8). A block finishes 256 outputs of 32 rows at a time and goes on above them, from
// the last row to the first: the product's last results may still be in the L2 cache. The next
// rows are on their way while the thread works on some.
template <typename Acc, typename Y>
__global__ void __launch_bounds__(kThreads) DequantizeKernel(const DequantizeArgs a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * kVector;
  if (column >= a.outputs) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRowsOfBlock;
  int64_t first = a.rows - 1 - static_cast<int64_t>(blockIdx.y) * kRowsOfBlock - threadIdx.y;
  Rows<Acc> next;
  next.Load(a, first, column);
  const int count = static_cast<int>(min(static_cast<int64_t>(kVector), a.outputs - column));
  const bool whole = count == kVector && a.outputs % kVector == 0;
  float scale_w[kVector], bias[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    scale_w[i] = a.scale_w != nullptr && i < count ? a.scale_w[column + i] : 1.0f;
    bias[i] = a.bias != nullptr && i < count ? a.bias[column + i] : 0.0f;
  }
  for (; first >= 0; first -= step) {
    const Rows<Acc> rows = next;
    next.Load(a, first - step, column);
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      const int64_t row = first - r * 8;
      if (row < 0) continue;
      float v[kVector];
      rows.acc[r].ToFloats(v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        // Each operation rounds, as in XLA's unfused formula.
        v[i] = __fmul_rn(__fmul_rn(v[i], rows.scale_x[r]), scale_w[i]);
        if (a.bias != nullptr) v[i] = __fadd_rn(v[i], bias[i]);
      }
      AddResidual(a, row * a.outputs + column, whole, count, v);
      Y* out = static_cast<Y*>(a.y) + row * a.outputs + column;
      if (whole) {
        Eight<Y> y;
        y.FromFloats(v);
        constexpr int kWords = sizeof(y.words) / 16;
#pragma unroll
        for (int i = 0; i < kWords; ++i)
          __stcg(reinterpret_cast<typename Eight<Y>::Word*>(out) + i, y.words[i]);
      } else {
        for (int i = 0; i < kVector; ++i)
          if (i < count) out[i] = FromFloat<Y>(v[i]);
      }
    }
  }
}

// y is finished already, where a row's scale is 1. Any other scale is that of a row that becomes
// nan. A warp looks at one row.
template <typename Y>
__global__ void __launch_bounds__(kThreads) ScaleRowsKernel(const DequantizeArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;
  const float scale_x = a.scale_x[row];
  if (scale_x == 1.0f) return;
  Y* y = static_cast<Y*>(a.y) + row * a.outputs;
  for (int64_t i = threadIdx.x % 32; i < a.outputs; i += 32)
    y[i] = FromFloat<Y>(__fmul_rn(ToFloat(y[i]), scale_x));
}

template <typename Acc, typename Y>
void Launch(const DequantizeArgs& a, cudaStream_t stream) {
  if constexpr (std::is_same_v<Acc, Y>) {
    if (a.accumulators == a.y && a.scale_w == nullptr && a.bias == nullptr &&
        a.residual == nullptr) {
      const auto blocks = static_cast<unsigned>((a.rows + kThreads / 32 - 1) / (kThreads / 32));
      ScaleRowsKernel<Y><<<blocks, kThreads, 0, stream>>>(a);
      return;
    }
  }
  const int64_t across = (a.outputs + 32 * kVector - 1) / (32 * kVector);
  const int64_t steps = (a.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int64_t blocks = a.most_blocks > 0 ? a.most_blocks : kManyBlocks;
  const int64_t down = std::clamp<int64_t>((blocks + across - 1) / across, 1, steps);
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  DequantizeKernel<Acc, Y><<<grid, dim3(32, 8), 0, stream>>>(a);
}

template <typename Acc>
cudaError_t DequantizeTo(const DequantizeArgs& a, cudaStream_t stream) {
  switch (a.y_type) {
    case DType::kBF16: Launch<Acc, __nv_bfloat16>(a, stream); break;
    case DType::kF16: Launch<Acc, __half>(a, stream); break;
    case DType::kF32: Launch<Acc, float>(a, stream); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaPeekAtLastError();
}

// ---- Random operands ----------------------------------------------------------------------------

__device__ inline uint32_t Hash(uint64_t i) {  // splitmix64
  i += 0x9e3779b97f4a7c15ull;
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((i ^ (i >> 31)) >> 16);
}

__global__ void FillKernel(DType type, void* data, int64_t count, bool two_of_four) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t h = Hash(i);
    const float uniform = static_cast<float>(h & 0xffff) / 32768.0f - 1.0f;
    // The two of every four columns that are kept.
    const uint32_t first = Hash(i / 4 + (int64_t{1} << 40)) % 4;
    const uint32_t second = (first + 1 + Hash(i / 4 + (int64_t{1} << 41)) % 3) % 4;
    const bool zero = two_of_four && i % 4 != first && i % 4 != second;
    switch (type) {
      case DType::kS8:
        static_cast<int8_t*>(data)[i] = zero ? 0 : static_cast<int8_t>(uniform * 127.0f);
        break;
      // The sign, 7 of the 16 exponents, the mantissa: always finite.
      case DType::kE4M3:
        static_cast<uint8_t*>(data)[i] =
            zero ? 0 : static_cast<uint8_t>((h & 0x87) | (4 + h / 256 % 7) << 3);
        break;
      case DType::kBF16:
        static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(zero ? 0.0f : uniform);
        break;
      case DType::kF16:
        static_cast<__half*>(data)[i] = __float2half_rn(zero ? 0.0f : uniform);
        break;
      default: static_cast<float*>(data)[i] = zero ? 0.0f : uniform; break;
    }
  }
}

}  // namespace

cudaError_t ExpandLifted(const ExpandArgs& a, cudaStream_t stream) {
  const unsigned blocks = Blocks(a.padded_outputs * a.groups * (a.group / 2 - 1));
  if (Bytes(a.type) == 1)
    ExpandKernel<uint8_t><<<blocks, kThreads, 0, stream>>>(a);
  else if (Bytes(a.type) == 2)
    ExpandKernel<uint16_t><<<blocks, kThreads, 0, stream>>>(a);
  else
    return cudaErrorInvalidValue;
  return cudaPeekAtLastError();
}

cudaError_t Dequantize(const DequantizeArgs& a, cudaStream_t stream) {
  if (a.rows == 0 || a.outputs == 0) return cudaSuccess;
  switch (a.accumulator_type) {
    case DType::kS32: return DequantizeTo<int>(a, stream);
    case DType::kF32: return DequantizeTo<float>(a, stream);
    case DType::kBF16: return DequantizeTo<__nv_bfloat16>(a, stream);
    case DType::kF16: return DequantizeTo<__half>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t FillRandom(DType type, void* data, int64_t count, bool two_of_four,
                       cudaStream_t stream) {
  FillKernel<<<Blocks(count), kThreads, 0, stream>>>(type, data, count, two_of_four);
  return cudaPeekAtLastError();
}

}  // namespace slidejax::cusparselt

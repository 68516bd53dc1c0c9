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
constexpr int kRowsOfThread = 4;

template <typename T>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Vector {
  T element[kVector];
};

__device__ inline float ToFloat(int v) { return __int2float_rn(v); }
__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(__half v) { return __half2float(v); }
__device__ inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ inline T FromFloat(float v) {
  if constexpr (std::is_same_v<T, float>)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

// blockDim (32, 8): 256 outputs, 8 rows at a time.
template <typename Acc, typename Y>
__global__ void __launch_bounds__(kThreads) DequantizeKernel(const DequantizeArgs a) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * kVector;
  if (column >= a.outputs) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kVector), a.outputs - column));
  float scale_w[kVector], bias[kVector];
  bool keep =
      a.accumulators == a.y && a.bias == nullptr;  // y is finished where scale_x is 1 as well
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    scale_w[i] = a.scale_w != nullptr && i < count ? a.scale_w[column + i] : 1.0f;
    bias[i] = a.bias != nullptr && i < count ? a.bias[column + i] : 0.0f;
    keep = keep && scale_w[i] == 1.0f;
  }
  const bool whole = count == kVector && a.outputs % kVector == 0;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.y * kRowsOfThread + threadIdx.y;
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int64_t row = first + r * blockDim.y;
    if (row >= a.rows) return;
    const float scale_x = a.scale_x[row];
    if (keep && scale_x == 1.0f) continue;
    // Vectors of accumulators are whole, because the pitch of rows is padded.
    const Vector<Acc> acc = *reinterpret_cast<const Vector<Acc>*>(
        static_cast<const Acc*>(a.accumulators) + row * a.pitch + column);
    Vector<Y> y;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Each operation rounds, as in XLA's unfused formula.
      const float scaled = __fmul_rn(__fmul_rn(ToFloat(acc.element[i]), scale_x), scale_w[i]);
      y.element[i] = FromFloat<Y>(a.bias != nullptr ? __fadd_rn(scaled, bias[i]) : scaled);
    }
    Y* out = static_cast<Y*>(a.y) + row * a.outputs + column;
    if (whole) {
      *reinterpret_cast<Vector<Y>*>(out) = y;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < count) out[i] = y.element[i];
      }
    }
  }
}

template <typename Acc>
cudaError_t DequantizeTo(const DequantizeArgs& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((a.outputs + 32 * kVector - 1) / (32 * kVector)),
                  static_cast<unsigned>((a.rows + 8 * kRowsOfThread - 1) / (8 * kRowsOfThread)));
  const dim3 block(32, 8);
  switch (a.y_type) {
    case DType::kBF16: DequantizeKernel<Acc, __nv_bfloat16><<<grid, block, 0, stream>>>(a); break;
    case DType::kF16: DequantizeKernel<Acc, __half><<<grid, block, 0, stream>>>(a); break;
    case DType::kF32: DequantizeKernel<Acc, float><<<grid, block, 0, stream>>>(a); break;
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

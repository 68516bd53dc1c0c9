// Elements of the cache and of x: in registers they are float32, eight at a time.
#pragma once

#include <cstring>

#include "attention/attention.h"
#include "attention/plan.h"
#include "attention/ptx.cuh"

namespace slidejax::attention {

__device__ inline void Widen(__nv_bfloat16, const uint32_t* from, float (&to)[kChannels]) {
#pragma unroll
  for (int i = 0; i < kChannels / 2; ++i) {
    to[2 * i] = __uint_as_float(from[i] << 16);
    to[2 * i + 1] = __uint_as_float(from[i] & 0xffff0000u);
  }
}
__device__ inline void Widen(__half, const uint32_t* from, float (&to)[kChannels]) {
#pragma unroll
  for (int i = 0; i < kChannels / 2; ++i) {
    __half2 pair;
    memcpy(&pair, &from[i], 4);
    const float2 wide = __half22float2(pair);
    to[2 * i] = wide.x, to[2 * i + 1] = wide.y;
  }
}
__device__ inline void Widen(float, const uint32_t* from, float (&to)[kChannels]) {
#pragma unroll
  for (int i = 0; i < kChannels; ++i) to[i] = __uint_as_float(from[i]);
}

__device__ inline __nv_bfloat16 Narrow(__nv_bfloat16, float x) { return __float2bfloat16(x); }
__device__ inline __half Narrow(__half, float x) { return __float2half(x); }
__device__ inline float Narrow(float, float x) { return x; }
__device__ inline float Wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float Wide(__half x) { return __half2float(x); }
__device__ inline float Wide(float x) { return x; }

template <typename Run>
__device__ void WithType(DType type, const Run& run) {
  if (type == DType::kBF16) {
    run(__nv_bfloat16{});
  } else if (type == DType::kF16) {
    run(__half{});
  } else {
    run(float{});
  }
}

// Writes eight elements from number `at` on, a multiple of 8.
template <typename T>
__device__ void Store8(void* to, int64_t at, const float (&from)[kChannels]) {
  alignas(16) T narrow[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) narrow[i] = Narrow(T{}, from[i]);
  auto* target = reinterpret_cast<uint4*>(static_cast<T*>(to) + at);
#pragma unroll
  for (int i = 0; i < static_cast<int>(kChannels * sizeof(T) / 16); ++i)
    target[i] = reinterpret_cast<const uint4*>(narrow)[i];
}

__device__ inline float Shuffle(float value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
__device__ inline float ShuffleXor(float value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

}  // namespace slidejax::attention

// Numbers of arrays whose type is known only when the kernel runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax::decode {

// Numbers of an array of bfloat16, float16 or float32, from L2: v[k] becomes number place(k), and
// stays as it is where that is negative. All are asked for before one is converted.
template <int kCount, typename Place>
__device__ inline void LoadFloats(float (&v)[kCount], const void* from, DType type,
                                  const Place& place) {
  const auto load = [&](auto zero, const auto& convert) {
    using T = decltype(zero);
    T found[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      found[k] = place(k) < 0 ? zero : __ldcg(static_cast<const T*>(from) + place(k));
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (place(k) >= 0) v[k] = convert(found[k]);
  };
  switch (type) {
    case DType::kBF16:
      return load(__nv_bfloat16{}, [](__nv_bfloat16 x) { return __bfloat162float(x); });
    case DType::kF16: return load(__half{}, [](__half x) { return __half2float(x); });
    default: return load(0.0f, [](float x) { return x; });
  }
}

// Number i of such an array.
__device__ inline float LoadFloat(const void* from, DType type, int64_t i) {
  float v[1] = {};
  LoadFloats(v, from, type, [i](int) { return i; });
  return v[0];
}

// Writes number i of such an array.
__device__ inline void StoreFloat(void* array, DType type, int64_t i, float v) {
  switch (type) {
    case DType::kBF16: static_cast<__nv_bfloat16*>(array)[i] = __float2bfloat16(v); break;
    case DType::kF16: static_cast<__half*>(array)[i] = __float2half(v); break;
    default: static_cast<float*>(array)[i] = v; break;
  }
}

// A number rounded to a type.
__device__ inline float Rounded(float v, DType type) {
  switch (type) {
    case DType::kBF16: return __bfloat162float(__float2bfloat16(v));
    case DType::kF16: return __half2float(__float2half(v));
    default: return v;
  }
}

}  // namespace slidejax::decode

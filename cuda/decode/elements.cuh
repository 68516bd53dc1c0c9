// Numbers of arrays whose type is known only when the kernel runs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax::decode {

// Number i of an array of bfloat16, float16 or float32, from L2.
__device__ inline float LoadFloat(const void* from, DType type, int64_t i) {
  switch (type) {
    case DType::kBF16: return __bfloat162float(__ldcg(static_cast<const __nv_bfloat16*>(from) + i));
    case DType::kF16: return __half2float(__ldcg(static_cast<const __half*>(from) + i));
    default: return __ldcg(static_cast<const float*>(from) + i);
  }
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

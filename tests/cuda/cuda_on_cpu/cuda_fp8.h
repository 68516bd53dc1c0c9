// See cuda_runtime_api.h.
#pragma once

#include "cuda_runtime_api.h"

struct __nv_fp8_e4m3 {
  uint8_t bits;
};
enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

inline uint8_t __emulated_e4m3(float v) {
  if (v != v) return 0x7f;
  const uint8_t sign = std::signbit(v) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(v), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  // 8 to 16 eighths of 2^exponent, or fewer below 2^-6.
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  // Eighths from 8 on carry into the exponent by themselves.
  return sign | static_cast<uint8_t>(((exponent + 6) << 3) + steps);
}
inline uint16_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t, __nv_fp8_interpretation_t) {
  return static_cast<uint16_t>(__emulated_e4m3(v.x) | __emulated_e4m3(v.y) << 8);
}

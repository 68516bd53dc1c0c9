// See cuda_runtime_api.h.
#pragma once

#include "cuda_runtime_api.h"

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half(float v) { return {static_cast<_Float16>(v)}; }
inline float2 __half22float2(__half2 v) {
  return {static_cast<float>(v.x.value), static_cast<float>(v.y.value)};
}
inline __half2 __float22half2_rn(float2 v) {
  return {{static_cast<_Float16>(v.x)}, {static_cast<_Float16>(v.y)}};
}
inline __half __hmax_nan(__half a, __half b) {
  return a.value != a.value || a.value > b.value ? a : b;
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) {
  return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)};
}

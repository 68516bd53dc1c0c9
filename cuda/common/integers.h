// Integer arithmetic that host code and kernels share.
#pragma once

#include "common/host_device.h"

namespace slidejax {

SLIDEJAX_HOST_DEVICE constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// The least multiple of `multiple` that is at least `value`.
template <typename Int>
SLIDEJAX_HOST_DEVICE constexpr Int RoundUp(Int value, Int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace slidejax

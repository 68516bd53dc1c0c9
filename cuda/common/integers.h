// Integer arithmetic that host code and kernels share.
#pragma once

#include "common/host_device.h"

namespace slidejax {

SLIDEJAX_HOST_DEVICE constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

}  // namespace slidejax

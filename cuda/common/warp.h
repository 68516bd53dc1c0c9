// The lanes of a warp.
#pragma once

namespace slidejax {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;  // the mask of __shfl_sync and its kin

}  // namespace slidejax

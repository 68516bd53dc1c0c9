// The parameters of the attention kernels, and the partial results that they hand over.
#pragma once

#include "attention/attention.h"
#include "attention/plan.h"

namespace slidejax::attention {

struct Params {
  AttentionArgs a;
  int chunks, splits, log_splits, warps;
  bool clustered;  // else partial results go to the workspace, if there are splits
};

// The score of an unseen key. It is finite, so that two of them differ by a number.
constexpr float kUnseen = -1e30f;
constexpr float kLog2E = 1.44269504f;

// A partial result of a head: the greatest score, and the sum of weights.
struct Head {
  float greatest, total;
};

}  // namespace slidejax::attention

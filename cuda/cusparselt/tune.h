// The search for the fastest way to compute a product with cuSPARSELt on the current device.
#pragma once

#include <cstddef>
#include <vector>

#include "cusparselt/plan.h"

namespace slidejax::cusparselt {

struct Timing {
  Choice choice;
  double microseconds;
  size_t workspace_bytes;
};

// Times the library's kernels for a problem, fastest first. With `finish` a time includes
// slidejax's kernel behind the library's, and several parts are tried as well. Without it, a time
// is that of the product alone. A candidate is left out if it refuses the problem, if it wants more
// workspace than the limit, or if it is clearly slower than the best so far. Allocates memory and
// synchronises. Throws Failure.
std::vector<Timing> Tune(Problem problem, size_t workspace_limit, bool finish);

}  // namespace slidejax::cusparselt

// The groups of a (2N-2):2N pattern.
#pragma once

#include <cstdint>

namespace slidejax {

// Whether a group can have this number of columns: an even one, 4 to 16. A dense weight has no
// groups, for which callers write 0.
constexpr bool IsGroup(int64_t columns) {
  return columns >= 4 && columns <= 16 && columns % 2 == 0;
}

}  // namespace slidejax

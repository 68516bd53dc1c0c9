// The order of the metadata in the library's compressed form, found out from the library itself.
//
// The library's own function to compress a weight needs a dense copy and takes many times as long
// as the bytes would. The form's order is not published and depends on the GPU and on the release.
// It is therefore learned: the library compresses a matrix in which one window differs from all
// others, once for each bit of the numbers of rows and windows, and what changes says where the bit
// leads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "cusparselt/pack.h"

namespace slidejax::cusparselt {

// Returns the order for a weight of `columns` lifted columns on the current device, or nothing if
// it is not a sum over bits, or if PackCompressed with it does not give the library's own bytes for
// a random weight. Allocates memory and synchronises. Throws Failure.
std::optional<Layout> LearnLayout(DType operand, int64_t outputs, int64_t columns);

// A layout as an attribute of a call: base, the terms of rows, those of windows, run.
std::vector<int64_t> ToNumbers(const Layout& layout);
std::optional<Layout> FromNumbers(const int64_t* numbers, size_t count);

}  // namespace slidejax::cusparselt

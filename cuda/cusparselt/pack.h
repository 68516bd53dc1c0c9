// Kernels that write the library's compressed form without the library, and that find out its
// order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "cusparselt/order.h"

namespace slidejax::cusparselt {

// The compressed form of a packed weight.
struct PackArgs {
  const void* values;    // [outputs, groups, group - 2]
  const uint8_t* zeros;  // [outputs, groups], z1 | z2 << 4
  void* compressed;      // values of the padded outputs, then metadata
  int64_t compressed_bytes;
  DType type;
  int64_t outputs, padded_outputs, groups;  // groups are whole blocks of 8
  int group;                                // 2N
  Layout layout;
};
cudaError_t PackCompressed(const PackArgs& args, cudaStream_t stream);

// A random packed weight of the pattern 2:4 whose kept values are not zero.
cudaError_t FillPacked(DType type, void* values, uint8_t* zeros, int64_t groups,
                       cudaStream_t stream);

// Every four columns of a dense matrix become v, v, 0, 0, or with `second` 0, 0, v, v.
cudaError_t FillWindows(DType type, void* dense, int64_t windows, bool second, cudaStream_t stream);

// How two arrays of bytes differ, by nibbles.
struct Difference {
  unsigned long long count, last;  // the number of nibbles that differ, and the last one's address
};
// Writes `*difference`, which is in device memory.
cudaError_t Compare(const void* a, const void* b, int64_t bytes, Difference* difference,
                    cudaStream_t stream);

}  // namespace slidejax::cusparselt

// Small kernels around the library's product: they expand the packed form, finish accumulators, and
// make random operands for tuning.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax::cusparselt {

// The packed form as a dense 2:4 matrix over lifted columns.
struct ExpandArgs {
  const void* values;    // [outputs, groups, 2N-2]
  const uint8_t* zeros;  // [outputs, groups], z1 | z2 << 4
  void* lifted;          // [padded_outputs, groups * (N-1) * 4]; rows past `outputs` become zeros
  DType type;            // 1 or 2 bytes
  int64_t outputs, padded_outputs, groups;
  int group;  // 2N
};
cudaError_t ExpandLifted(const ExpandArgs& args, cudaStream_t stream);

// y = ((float32(accumulator) * scale_x) * scale_w + bias) + residual, rounded once.
struct DequantizeArgs {
  const void* accumulators;  // [rows, pitch] of accumulator_type; may be y itself
  DType accumulator_type;    // int32, float32, bfloat16, float16
  int64_t pitch;             // elements, a multiple of 8
  const float* scale_x;      // [rows]
  const float* scale_w;      // [outputs], or nullptr: all are 1
  const float* bias;         // [outputs] or nullptr
  const void* residual;      // [rows, outputs] of residual_type, or nullptr
  DType residual_type;       // bfloat16, float16, float32
  void* y;                   // [rows, outputs] of y_type: bfloat16, float16, float32
  DType y_type;
  int64_t rows, outputs;
  // At most about this many thread blocks, so that another kernel keeps most of the GPU. 0: as many
  // as are fastest alone.
  int64_t most_blocks = 0;
};
cudaError_t Dequantize(const DequantizeArgs& args, cudaStream_t stream);

// Writes pseudo-random finite elements. With `two_of_four`, two of each four are zero.
cudaError_t FillRandom(DType type, void* data, int64_t count, bool two_of_four,
                       cudaStream_t stream);

}  // namespace slidejax::cusparselt

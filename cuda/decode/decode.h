// y = x W' for few rows of x, at the rate at which memory delivers the weights: the host interface.
//
// W' is a (2N-2):2N weight in the packed form of SlideWeight as it lies, or a dense one. Its values
// have 8 or 16 bits; x is quantised to 8 bits, or rounded to the 16-bit type. The kernel needs
// nothing prepared and no Hopper instruction (docs/decode-kernel.md says how it works). It converts
// a few rows of x itself; for more, a small kernel runs ahead of it in the same call.
//
// Nothing here allocates, synchronises or, after DecodeInit, looks anything up: calls can be
// captured in a CUDA graph. Pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax::decode {

struct DecodeArgs {
  const void* x;         // [M, columns]
  DType x_type;          // bfloat16, float16 or float32
  const void* values;    // [out, groups, group - 2]; a dense weight: [out, K']. 16-byte aligned
  const uint8_t* zeros;  // [out, groups], z1 | z2 << 4; null for a dense weight
  const float* scale_w;  // [out]
  const float* bias;     // [out] or null
  const void* residual;  // [M, out] or null
  DType residual_type;   // bfloat16, float16 or float32
  void* y;               // [M, out]
  DType y_type;          // bfloat16, float16 or float32
  DType type;            // of values: int8, float8_e4m3fn, bfloat16 or float16
  int32_t M, out;
  int32_t columns;  // of x
  int32_t group;    // 2N; 0 for a dense weight
  int32_t blocks;   // of 8 groups in a row of the weight; of 32 columns in a dense one
  void* workspace;  // DecodeWorkspace bytes, 16-byte aligned, any contents
};

// Most rows of x that a call takes.
inline constexpr int kDecodeTokens = 8;

// Bytes of workspace for a call, enough for every device.
int64_t DecodeWorkspace(int M, DType type, int group, int blocks);

// Readies the kernels on the current device; call once per device, outside of stream capture.
// Repeating it costs nothing.
cudaError_t DecodeInit();

// Null if the arguments can be run on the current device, else what is wrong with them.
const char* DecodeCheck(const DecodeArgs& args);

cudaError_t Decode(const DecodeArgs& args, cudaStream_t stream);

}  // namespace slidejax::decode

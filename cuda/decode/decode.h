// y = x W' for few rows of x, at the rate at which memory delivers the weights: the host interface.
//
// W' is a (2N-2):2N weight in the packed form of SlideWeight as it lies, or a dense one. Its values
// have 8 or 16 bits; x is quantised to 8 bits, or rounded to the 16-bit type. The kernel needs
// nothing prepared and no Hopper instruction (docs/decode-kernel.md says how it works). It converts
// a few rows of x itself; for more, a small kernel runs ahead of it in the same call.
//
// DecodeChain runs several such calls, each with the results of the one before, so that the kernels
// overlap: a kernel is ready, with its scales, before the one ahead has ended.
//
// Nothing here allocates, synchronises or, after DecodeInit, looks anything up: calls can be
// captured in a CUDA graph. Pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "lift/lift.h"

namespace slidejax::decode {

// A row of the weight is one output. Where gate_rows is not 0, row i is the gate of output i and
// row gate_rows + i its other factor: y = activation(gate) * other, both rounded to y's type
// before.
struct DecodeArgs {
  const void* x;         // [M, columns]
  DType x_type;          // bfloat16, float16 or float32
  const float* norm;     // [columns], 16-byte aligned: the weights of an RMS norm of x; or null
  float eps;             // of the norm
  const void* values;    // [rows, groups, group - 2]; a dense weight: [rows, K']. 16-byte aligned
  const uint8_t* zeros;  // [rows, groups], z1 | z2 << 4; null for a dense weight
  const float* scale_w;  // [rows]
  const float* bias;     // [rows] or null
  const void* residual;  // [M, out] or null; null with a gate
  DType residual_type;   // bfloat16, float16 or float32
  void* y;               // [M, out]
  DType y_type;          // bfloat16, float16 or float32
  DType type;            // of values: int8, float8_e4m3fn, bfloat16 or float16
  int32_t M, out;
  int32_t gate_rows;
  lift::Activation activation;  // of the gate
  int32_t columns;              // of x
  int32_t group;                // 2N; 0 for a dense weight
  int32_t blocks;               // of 8 groups in a row of the weight; of 32 columns in a dense one
  void* workspace;              // DecodeWorkspace bytes, 16-byte aligned, any contents
};

// Most rows of x that a call takes.
inline constexpr int kDecodeTokens = 16;

// Bytes of workspace for a call, enough for every device.
int64_t DecodeWorkspace(int M, DType type, int group, int blocks);

// Readies the kernels on the current device; call once per device, outside of stream capture.
// Repeating it costs nothing.
cudaError_t DecodeInit();

// Null if the arguments can be run on the current device, else what is wrong with them.
const char* DecodeCheck(const DecodeArgs& args);

cudaError_t Decode(const DecodeArgs& args, cudaStream_t stream);

// `count` calls, each of which may read what the ones before have written. Nothing in them may
// write the weights, scales, biases and norms of another.
cudaError_t DecodeChain(const DecodeArgs* args, int count, cudaStream_t stream);

}  // namespace slidejax::decode

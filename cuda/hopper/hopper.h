// y[m, o] = sum_k lifted[m, k] * W'[o, k] * scale_x[m] * scale_w[o] + bias[o] on Hopper's 2:4
// sparse tensor cores (sm_90a), for (2N-2):2N weights in the packed form of SlideWeight. Weights
// with all their columns are multiplied on the dense tensor cores. docs/hopper-kernel.md says how
// it works.
//
// Nothing here allocates or synchronises, and after Init nothing looks anything up, so that calls
// can be captured in a CUDA graph. Pointers are device pointers.
//
// Where K is split through memory, CTAs wait for each other's partial sums, but only up to a limit.
// Past it, a CTA leaves the reduction unit to whichever CTA arrives last.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "hopper/plan.h"

namespace slidejax::hopper {

// lifted, values and metadata must be 16-byte aligned, zeros 8-byte aligned.
struct Args {
  Problem problem;
  Schedule schedule;
  DType operand;         // of lifted and values: kS8 or kE4M3
  DType result;          // of y: kBF16, kF16, kF32; kS32: the sums of int8 operands as they are
  const void* lifted;    // [M, columns]
  const float* scale_x;  // [M]
  const void* values;    // [out, groups, group - 2], the instruction's compressed operand as it is;
                         // of a dense weight [out, columns]
  const uint8_t* zeros;  // [out, groups], z1 | z2 << 4; null for a dense weight, may be null where
                         // metadata is given
  const uint32_t* metadata;  // from ExpandMetadata; null: the call makes it
  const float* scale_w;      // [out]
  const float* bias;         // [out] or null
  const void* residual;      // [M, out] or null; of at most kResidualTokens rows, or with a dense
                             // weight kDenseResidualTokens
  DType residual_type;       // bfloat16, float16 or float32
  void* y;                   // [M, out]; may be the residual
  // The workspace may hold anything, is 128-byte aligned and has WorkspaceBytes. If it is smaller,
  // K is not split through memory; metadata that is not prepared must fit.
  void* workspace;
  size_t workspace_bytes;
  // True if BeforeLift was called, and the previous launch on the stream is the lift's. The lift
  // then clears the counters and lets this kernel begin early. This kernel loads weights and waits
  // for the activations.
  bool after_lift;
};

// 64-bit words of the workspace that must be zero when the kernel runs.
struct Counters {
  unsigned long long* first;
  int count;
};

// Prepares the kernels on the current device. Call it once for each device, outside of stream
// capture; repeating it costs nothing.
cudaError_t Init();

// Returns null if the arguments can be run, else what is wrong with them. Reads no device memory.
const char* Check(const Args& args);

// Must be called before a lift and a SparseMatmul with `after_lift`, with the same arguments.
// Expands metadata that is not prepared, and says which counters the lift has to clear.
cudaError_t BeforeLift(const Args& args, cudaStream_t stream, Counters* counters);

cudaError_t SparseMatmul(const Args& args, cudaStream_t stream);

// Writes MetadataBytes(problem) bytes: the 2:4 metadata in the order in which the kernel's threads
// read it.
cudaError_t ExpandMetadata(const uint8_t* zeros, uint32_t* metadata, const Problem& problem,
                           cudaStream_t stream);

}  // namespace slidejax::hopper

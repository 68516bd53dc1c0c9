// y[m, o] = sum_k lifted[m, k] * W'[o, k] * scale_x[m] * scale_w[o] + bias[o] on Hopper's 2:4
// sparse tensor cores (sm_90a), for (2N-2):2N weights in the packed form of SlideWeight; and the
// same on the dense tensor cores, for weights with all their columns. docs/hopper-kernel.md says
// how it works.
//
// Nothing here allocates, synchronises or, after Init, looks anything up: calls can be captured in
// a CUDA graph. Pointers are device pointers unless a comment says otherwise.
//
// Where K is split through memory, CTAs wait for each other at the end, but not for ever: a sum
// whose parts do not come is left to the CTA that brings the last one.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "hopper/plan.h"

namespace slidejax::hopper {

// lifted, values and metadata must be 16-byte aligned.
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
  const uint32_t* metadata;  // from ExpandMetadata; null: it is expanded into the workspace
  const float* scale_w;      // [out]
  const float* bias;         // [out] or null
  void* y;                   // [M, out]
  void* workspace;  // of any contents, 128-byte aligned, WorkspaceBytes long. With less, down
  size_t workspace_bytes;  // to what metadata needs, K is not split through memory.
  // Whether BeforeLift was called, and the launch before this one on the stream is the lift's. The
  // lift clears the counters and lets this kernel begin early: it loads weights then, and waits for
  // the activations.
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

// Null if the arguments can be run, else what is wrong with them. Looks at no device memory.
const char* Check(const Args& args);

// Precedes a lift and a SparseMatmul with `after_lift` of the same arguments: expands metadata that
// is not prepared, and says which counters the lift has to clear.
cudaError_t BeforeLift(const Args& args, cudaStream_t stream, Counters* counters);

cudaError_t SparseMatmul(const Args& args, cudaStream_t stream);

// Writes MetadataBytes(problem) bytes: the 2:4 metadata in the order in which the kernel's threads
// read it.
cudaError_t ExpandMetadata(const uint8_t* zeros, uint32_t* metadata, const Problem& problem,
                           cudaStream_t stream);

}  // namespace slidejax::hopper

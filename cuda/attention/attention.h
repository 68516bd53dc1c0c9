// Attention of one new token in each row to a cache of keys and values: the host interface.
//
// One launch turns the queries and the new key by their position, writes the new key and value into
// the cache, and attends. Rows have lengths of their own: a row's position says how many tokens its
// cache holds. docs/attention-kernel.md says how the kernel works.
//
// Nothing here allocates, synchronises or, after AttentionInit, looks anything up: calls can be
// captured in a CUDA graph. Pointers are device pointers, aligned to 16 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax::attention {

struct AttentionArgs {
  const void* q;             // [rows, heads, head_dim], not turned yet
  const void* k;             // [rows, kv_heads, head_dim], not turned yet
  const void* v;             // [rows, kv_heads, head_dim]
  int64_t q_stride;          // elements from a row of q to the next
  int64_t kv_stride;         // of k and v
  DType type;                // of q, k, v and y: bfloat16, float16 or float32
  void* keys;                // [rows, kv_heads, length, head_dim]
  void* values;              // the same
  DType cache_type;          // bfloat16, float16 or float32
  const int32_t* positions;  // [rows]; -1: the row has no new token, and its y is 0
  const float* cosines;      // [rows, head_dim / 2]
  const float* sines;        // [rows, head_dim / 2]
  void* y;                   // [rows, heads, head_dim]
  int32_t rows, heads, kv_heads, length, head_dim;
  float scale;      // of the scores
  int32_t window;   // how many positions back a token sees, its own included; 0 is all. As many as
                    // `length`: a token's slot is its position modulo that
  void* workspace;  // AttentionWorkspace bytes, any contents
};

// Bytes of workspace for a call, enough for every device.
int64_t AttentionWorkspace(const AttentionArgs& args);

// Readies the kernels on the current device; call once per device, outside of stream capture.
// Repeating it costs nothing.
cudaError_t AttentionInit();

cudaError_t Attention(const AttentionArgs& args, cudaStream_t stream);

}  // namespace slidejax::attention

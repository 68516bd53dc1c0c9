// y[m, o] = sum_k lifted[m, k] * W'[o, k] * scale_x[m] * scale_w[o] + bias[o] on Hopper's 2:4
// sparse tensor cores (sm_90a), for (2N-2):2N weights in the packed form of SlideWeight; and the
// same on the dense tensor cores, for weights with all their columns. docs/hopper-kernel.md says
// how it works and what it measures.
//
// Nothing here allocates, synchronises or, after slidejax_hopper_init, looks anything up: calls can
// be captured in a CUDA graph. Pointers are device pointers unless said.
//
// When K is split, clusters wait for each other at the end, but not for ever: a sum whose parts do
// not come is left to the cluster that brings the last one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace slidejax {

enum class HopperInput : int32_t { kE4M3 = 0, kS8 = 1 };
// kS32: the sums of int8 operands as they are; scales and bias are read all the same.
enum class HopperOutput : int32_t { kBF16 = 0, kF16 = 1, kF32 = 2, kS32 = 3 };

// K' = groups * (group - 2) * 2 lifted columns; groups is a multiple of 8, so that rows of lifted
// and values are 16-byte aligned. lifted, values and meta must be 16-byte aligned. A dense weight
// has group = 0: groups is then K, a multiple of 16, lifted are codes [M, K] and values [out, K],
// and there is no metadata.
struct HopperArgs {
  const void* lifted;    // [M, K'], 8 bit
  const float* scale_x;  // [M]
  const void* values;    // [out, groups, group - 2], 8 bit: as it is the compressed operand of the
                         // instruction
  const uint8_t* zeros;  // [out, groups], z1 | z2 << 4; may be null when meta is given
  const uint32_t* meta;  // what slidejax_hopper_expand_metadata wrote, or null: expanded into the
                         // workspace in this call
  const float* scale_w;  // [out]
  const float* bias;     // [out] or null
  void* y;               // [M, out]
  void* workspace;       // slidejax_hopper_workspace bytes, 128-byte aligned, any contents; less is
                         // allowed down to
  size_t workspace_bytes;  //   what meta needs: then K is not split
  int32_t M, out, groups, group;
  HopperInput input;
  HopperOutput output;
  int32_t config;       // index of a tile (slidejax_hopper_tile), or -1: the cost model chooses
  int32_t token_group;  // token tiles kept in L2 while all of W passes; 0: chosen
  int32_t split;    // clusters that share the tiles of the last, partial wave along K; 0: none, -1:
                    // chosen
  int32_t parts;    // teams of blocks in a cluster, which divide K of the last tiles among
                    // themselves; 1: none, 0: chosen
  int32_t abreast;  // teams of blocks in a cluster, which share W and multiply tiles of adjacent
                    // tokens: 2; 1: none, 0: chosen
  // Whether slidejax_hopper_before_lift was called, and the launch before this one on the stream is
  // the lift's, which clears the counters and lets this kernel begin early: it loads weights then,
  // and waits for the activations.
  bool after_lift;
};

// 64-bit words of the workspace that are to be zero when the kernel runs.
struct HopperCounters {
  unsigned long long* first;
  int count;
};

// One way to cut y into pieces. A thread block computes `rows` outputs for `tokens` tokens;
// `cluster` blocks stacked along the outputs share their tokens.
struct HopperTile {
  const char* name;
  int32_t rows, tokens, cluster, warp_groups, stages;
};

}  // namespace slidejax

extern "C" {

// Readies the kernels on the current device; call once per device, outside of stream capture.
// Repeating it costs nothing.
cudaError_t slidejax_hopper_init();

// Null if the arguments can be run, else what is wrong with them. Looks at no device memory.
const char* slidejax_hopper_check(const slidejax::HopperArgs& args);

// What precedes a lift and a product with `after_lift`, of the same arguments: expands metadata
// that is not prepared, and says which counters the lift has to clear.
cudaError_t slidejax_hopper_before_lift(const slidejax::HopperArgs& args, cudaStream_t stream,
                                        slidejax::HopperCounters* counters);

cudaError_t slidejax_hopper_sparse_matmul(const slidejax::HopperArgs& args, cudaStream_t stream);

// Bytes of workspace for these arguments (pointers are only tested for null), on a device of
// `multiprocessors`. Needs no device.
size_t slidejax_hopper_workspace(const slidejax::HopperArgs& args, int multiprocessors);

// 2:4 metadata in the order in which the kernel's threads read it: [ceil(out / 64)][ceil(K' /
// 128)][128][2] words.
size_t slidejax_hopper_metadata_bytes(int out, int groups, int group);
cudaError_t slidejax_hopper_expand_metadata(const uint8_t* zeros, uint32_t* meta, int out,
                                            int groups, int group, cudaStream_t stream);

// The tiles there are, and the one (with token group and split filled in) that the cost model would
// run.
int slidejax_hopper_tile_count();
slidejax::HopperTile slidejax_hopper_tile(int config);
void slidejax_hopper_plan(slidejax::HopperArgs& args, int multiprocessors);

}  // extern "C"

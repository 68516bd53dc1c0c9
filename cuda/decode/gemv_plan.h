// How a call of the kernel for one or two rows of x (gemv.cuh) is laid out: host code, and the
// constants that host and kernel share. docs/decode-kernel.md explains the words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"
#include "decode/plan.h"

namespace slidejax::decode {

constexpr int kGemvWarps = kMaxWarps;  // of a thread block
constexpr int kGemvRows = 2;           // most rows of x
constexpr int kGemvTileRows = 4;       // rows of the weight that a warp multiplies at once
constexpr int kRowLanes = kLanes / kGemvTileRows;  // lanes that share a row of the weight

// The sizes that follow from the windows of a group (N-1; 0 for a dense weight). Values have 8
// bits. In an item each lane has one block of a row: 8 groups, or 64 columns of a dense weight.
struct GemvShape {
  int windows;

  SLIDEJAX_HOST_DEVICE constexpr bool dense() const { return windows == 0; }
  SLIDEJAX_HOST_DEVICE constexpr int block_columns() const {
    return dense() ? 64 : 16 * (windows + 1);
  }
  SLIDEJAX_HOST_DEVICE constexpr int block_bytes() const { return dense() ? 64 : 16 * windows; }
  SLIDEJAX_HOST_DEVICE constexpr int row_bytes() const { return kRowLanes * block_bytes(); }
  SLIDEJAX_HOST_DEVICE constexpr int slot_values() const { return kGemvTileRows * row_bytes(); }
  SLIDEJAX_HOST_DEVICE constexpr int slot_zeros() const { return dense() ? 0 : kLanes * 8; }
  SLIDEJAX_HOST_DEVICE constexpr int slot_bytes() const { return slot_values() + slot_zeros(); }
  // Bytes from the codes of one block of x to those of the next. An odd multiple of 16 puts those
  // that eight lanes read at once into different banks; lanes of a dense weight read what is
  // adjacent.
  SLIDEJAX_HOST_DEVICE constexpr int code_stride() const {
    return dense() ? 64 : 16 * ((windows + 1) | 1);
  }
  // Slots of a warp's ring, all but one of which are on their way: about 60 KB of a
  // multiprocessor, which hide the latency of memory. More delays x, which waits in the same queue.
  // Many small slots take longer to come and go, so there are more of them.
  SLIDEJAX_HOST_DEVICE constexpr int depth() const {
    const int in_flight = (slot_bytes() < 1500 ? 84 : 60) * 1024;
    const int slots = (in_flight / kGemvWarps + slot_bytes() / 2) / slot_bytes();
    return 1 + (slots < 1 ? 1 : slots > 7 ? 7 : slots);
  }
  SLIDEJAX_HOST_DEVICE constexpr int ring_bytes() const {
    return kGemvWarps * depth() * slot_bytes();
  }
};

struct GemvPlan {
  int grid = 0;  // thread blocks; 0: no plan fits
  int steps = 0;
  int block_rows = 0;  // most rows of the weight that a thread block has
  int shared_bytes = 0;
};

// `floats`: sums are float32, not int32. `row_bytes` is what OwnRowBytes says, norm_bytes are those
// of the weights of a norm of x, and blocks are those of plan.h, of 32 columns in a dense weight.
// `rows` are those of the weight.
inline GemvPlan MakeGemvPlan(GemvShape s, bool floats, int M, int rows, int blocks, int row_bytes,
                             int norm_bytes, int multiprocessors, int shared_limit) {
  if (M > kGemvRows || row_bytes == 0) return {};
  const int lane_blocks = s.dense() ? CeilDiv(blocks, 2) : blocks;
  const int tiles = CeilDiv(rows, kGemvTileRows);
  GemvPlan p;
  p.grid = std::min(multiprocessors, tiles);
  p.steps = CeilDiv(lane_blocks, kRowLanes);
  p.block_rows = CeilDiv(tiles, p.grid) * kGemvTileRows;
  const int64_t codes = int64_t{M} * p.steps * kRowLanes * s.code_stride();
  const int64_t bytes = s.ring_bytes() + codes + M * row_bytes + norm_bytes +
                        int64_t{4} * p.block_rows * (M * SumParts(floats, kGemvWarps) + 2) +
                        4 * (2 * kGemvWarps + kGemvRows);
  if (bytes > shared_limit) return {};
  p.shared_bytes = static_cast<int>(bytes);
  return p;
}

}  // namespace slidejax::decode

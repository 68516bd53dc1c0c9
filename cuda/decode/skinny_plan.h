// How a call of the kernel for a few rows of x (skinny.cuh) is laid out: host code, and the
// constants that host and kernel share. docs/decode-kernel.md explains the words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"
#include "decode/plan.h"

namespace slidejax::decode {

constexpr int kSkinnyRows = kTileTokens;  // most rows of x that a thread block multiplies
constexpr int kSkinnyGroups = 2;          // most groups of rows; each has its own thread blocks

// Words of shared memory from the sums of one row of x to those of the next. The four words beyond
// put the sums that a warp adds at once into different banks.
SLIDEJAX_HOST_DEVICE constexpr int SumStride(int block_rows) { return block_rows + 4; }

struct SkinnyPlan {
  int rows = 0;  // of x, of a group
  int groups = 0;
  int grid = 0;   // thread blocks of a group; 0: no plan fits
  int warps = 0;  // of a thread block, those that multiply
  int steps = 0;
  int block_rows = 0;   // most rows of the weight that a thread block has
  bool staged = false;  // whether x waits in shared memory between the passes that convert it
  int shared_bytes = 0;
};

// `floats`: sums are float32, not int32. `row_bytes` is what WholeRowBytes says, norm_bytes are
// those of the weights of a norm of x, and `tiles` are those of the weight.
inline SkinnyPlan MakeSkinnyPlan(Shape s, bool floats, int M, int tiles, int blocks, int row_bytes,
                                 int norm_bytes, int multiprocessors, int shared_limit) {
  SkinnyPlan p;
  p.groups = CeilDiv(M, kSkinnyRows), p.rows = CeilDiv(M, p.groups);
  if (s.wide() || p.groups > kSkinnyGroups || row_bytes == 0) return {};
  p.grid = std::min(std::max(1, multiprocessors / p.groups), tiles);
  p.steps = CeilDiv(blocks, kStepBlocks);
  p.block_rows = CeilDiv(tiles, p.grid) * kTileRows;
  // The fewest warps that multiply a block's items in as many rounds as all of them.
  const int items = p.block_rows / kTileRows * p.steps;
  const int wanted = CeilDiv(items, CeilDiv(items, s.most_warps()));
  const auto fits = [&](int warps, bool staged) {
    const int64_t bytes = int64_t{warps} * s.depth() * s.slot_bytes() +
                          RoundUp<int64_t>(p.rows * TokenBytes(s, p.steps), 128) + norm_bytes +
                          (staged ? p.rows * row_bytes : 0) +
                          int64_t{4} * SumParts(floats, warps) * p.rows * SumStride(p.block_rows) +
                          8 * p.block_rows + 4 * (2 * kMaxWarps + kSkinnyRows);
    p.warps = warps, p.staged = staged, p.shared_bytes = static_cast<int>(bytes);
    return bytes <= shared_limit;
  };
  // Sums of float32 take memory and time for each warp.
  const int most = floats ? wanted : s.most_warps();
  for (int warps = most; warps >= wanted; --warps)
    if (fits(warps, true)) return p;
  // With less than half of them the weights come too slowly.
  for (int warps = most; 2 * warps >= wanted; --warps)
    if (fits(warps, false)) return p;
  return {};
}

}  // namespace slidejax::decode

// How a call of the decode kernel is laid out: host code, and the constants that host and kernel
// share. docs/decode-kernel.md explains the words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"
#include "common/warp.h"

namespace slidejax::decode {

constexpr int kTileRows = 16;   // outputs of one mma
constexpr int kTileTokens = 8;  // tokens of one mma, and the most rows of x
constexpr int kStepBlocks = 4;  // blocks of a row in an item: one for each lane of a quad
constexpr int kMaxWarps = 16;
constexpr int kOwnTokens = 4;   // most rows of x that the kernel quantises itself
constexpr int kHeldWords = 16;  // registers of a thread that hold x
// If no thread block has more outputs than these, their scales and biases lie in shared memory.
constexpr int kCachedRows = 2048;

// The sizes that follow from the windows of a group (N-1; 0 for a dense weight). A block is 8
// groups, or 32 columns of a dense weight.
struct Shape {
  int windows;

  SLIDEJAX_HOST_DEVICE constexpr bool dense() const { return windows == 0; }
  SLIDEJAX_HOST_DEVICE constexpr int block_columns() const {
    return dense() ? 32 : 16 * (windows + 1);
  }
  SLIDEJAX_HOST_DEVICE constexpr int block_bytes() const {
    return dense() ? 32 : 16 * windows;
  }  // of values
  SLIDEJAX_HOST_DEVICE constexpr int block_lifted() const { return dense() ? 32 : 32 * windows; }
  SLIDEJAX_HOST_DEVICE constexpr int step_lifted() const { return kStepBlocks * block_lifted(); }
  SLIDEJAX_HOST_DEVICE constexpr int slot_values() const {
    return kTileRows * kStepBlocks * block_bytes();
  }
  SLIDEJAX_HOST_DEVICE constexpr int slot_zeros() const {
    return dense() ? 0 : kTileRows * kStepBlocks * 8;
  }
  SLIDEJAX_HOST_DEVICE constexpr int slot_bytes() const { return slot_values() + slot_zeros(); }
  // Larger blocks of values take more registers, and more bytes in flight a warp.
  SLIDEJAX_HOST_DEVICE constexpr int most_warps() const {
    return slot_bytes() > 5000 ? kMaxWarps / 2 : kMaxWarps;
  }
  // Slots of a warp's ring, all but one of which are on their way while it multiplies. About 57 KB
  // in flight a multiprocessor hide the latency of memory; more delays x, which waits in the same
  // queue.
  SLIDEJAX_HOST_DEVICE constexpr int depth() const {
    const int in_flight = 56 * 1024 / most_warps();
    const int slots = (in_flight + slot_bytes() - 1) / slot_bytes();
    return 1 + (slots < 1 ? 1 : slots > 4 ? 4 : slots);
  }
};

// What a launch is given beside its operands.
struct Plan {
  int warps = 0;   // of a thread block; 0: no plan fits
  int grid = 0;    // thread blocks
  int slices = 1;  // parts of K, more than one where x of all of K does not fit
  int slice_steps = 0;
  int tile_slots = 0;   // tiles whose sums are kept at once
  bool cached = false;  // whether shared memory keeps scales and biases of a block's outputs
  int shared_bytes = 0;
};

// Bytes of one token's codes in shared memory. The 64 bytes beyond put the tokens of a quarter warp
// into different banks.
SLIDEJAX_HOST_DEVICE constexpr int TokenBytes(Shape s, int steps) {
  return steps * s.step_lifted() + 64;
}

// Bytes of the codes and scales that QuantiseAhead leaves for the decode kernel.
inline int64_t WorkspaceBytes(Shape s, int M, int blocks) {
  return int64_t{M} * CeilDiv(blocks, kStepBlocks) * s.step_lifted() + RoundUp(4 * M, 16);
}

// Bytes of shared memory, in the order in which the Decoder (kernel.cuh) lays them out.
inline int SharedBytes(Shape s, int warps, int M, int slice_steps, int tile_slots, int rows) {
  const int ring = warps * s.depth() * s.slot_bytes();
  const int codes = RoundUp(M * TokenBytes(s, slice_steps), 128);
  const int sums = tile_slots * warps * kTileRows * M * 4;
  const int scales = 2 * 4 * (rows <= kCachedRows ? rows : 0);
  const int rest = 4 * (2 * tile_slots + kMaxWarps + kTileTokens);
  return ring + codes + sums + scales + RoundUp(rest, 16);
}

// Each of M rows has 2^LogShare of the block's warps, or one warp has several rows.
inline int LogShare(int M, int warps) {
  int log = 0;
  while (M << (log + 1) <= warps) ++log;
  return log;
}

// Whether the registers of `warps` warps hold M rows of x, up to `steps` steps of K. Rows are
// read in pieces of eight columns.
inline bool OwnRows(Shape s, int M, int columns, int column_bytes, int steps, int warps) {
  const int64_t pieces = int64_t{steps} * kStepBlocks * s.block_columns() / 8;
  const int64_t held = kHeldWords * 4 / (8 * column_bytes) * (kLanes << LogShare(M, warps));
  return M <= kOwnTokens && columns % 8 == 0 && pieces <= held;
}

inline Plan MakePlan(Shape s, int M, int out, int blocks, int multiprocessors, int shared_limit) {
  const int tiles = CeilDiv(out, kTileRows), steps = CeilDiv(blocks, kStepBlocks);
  const int grid = std::min(multiprocessors, tiles);
  const int block_tiles = CeilDiv(tiles, grid);
  const int most = s.most_warps();
  const auto plan = [&](int warps, int slices) {
    Plan p;
    const int slice_steps = CeilDiv(steps, slices);
    // While no warp stalls, the first warp is at most `depth` items ahead of the last.
    const int wanted = std::max(2, CeilDiv(warps * s.depth(), slice_steps) + 1);
    p.slices = CeilDiv(steps, slice_steps);
    p.tile_slots = p.slices > 1 ? block_tiles : std::min(block_tiles, wanted);
    p.cached = block_tiles * kTileRows <= kCachedRows;
    p.shared_bytes = SharedBytes(s, warps, M, slice_steps, p.tile_slots, block_tiles * kTileRows);
    if (p.shared_bytes > shared_limit) return Plan{};
    p.warps = warps, p.grid = grid, p.slice_steps = slice_steps;
    return p;
  };
  // As many warps as there may be, with K as a whole if it fits; else with fewer.
  for (int warps = most; warps >= 4; warps /= 2) {
    for (int slices = 1; slices <= std::min(steps, 16); ++slices)
      if (const Plan p = plan(warps, slices); p.warps > 0) return p;
  }
  return {};
}

}  // namespace slidejax::decode

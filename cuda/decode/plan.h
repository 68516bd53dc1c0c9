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
constexpr int kTileTokens = 8;  // tokens of one mma
constexpr int kStepBlocks = 4;  // blocks of a row in an item: one for each lane of a quad
constexpr int kMaxWarps = 16;
// Most rows of x that this kernel takes. With values of 8 bits more than one tile of tokens is
// slower than the Hopper kernel, and was not measured on other GPUs
// (docs/journal/2026-11-27-sixteen-rows.md).
SLIDEJAX_HOST_DEVICE constexpr int MostTokens(int value_bytes) {
  return value_bytes == 2 ? 2 * kTileTokens : kTileTokens;
}
// Most rows of x that the kernel converts to codes itself, and most columns; shared memory may hold
// fewer.
constexpr int kOwnTokens = 4, kOwnColumns = 1 << 17;
// If no thread block has more outputs than these, their scales and biases lie in shared memory.
constexpr int kCachedRows = 2048;

// The sizes that follow from the windows of a group (N-1; 0 for a dense weight). A block is 8
// groups, or 32 columns of a dense weight.
struct Shape {
  int windows;
  int value_bytes = 1;  // 2: values and codes have 16 bits

  SLIDEJAX_HOST_DEVICE constexpr bool wide() const { return value_bytes == 2; }

  SLIDEJAX_HOST_DEVICE constexpr bool dense() const { return windows == 0; }
  SLIDEJAX_HOST_DEVICE constexpr int block_columns() const {
    return dense() ? 32 : 16 * (windows + 1);
  }
  SLIDEJAX_HOST_DEVICE constexpr int block_bytes() const {
    return (dense() ? 32 : 16 * windows) * value_bytes;
  }  // of values
  SLIDEJAX_HOST_DEVICE constexpr int block_lifted() const {
    return (dense() ? 32 : 32 * windows) * value_bytes;
  }  // bytes of a token's lifted codes
  SLIDEJAX_HOST_DEVICE constexpr int step_lifted() const { return kStepBlocks * block_lifted(); }
  // With values of 16 bits, eight rows of a slot are read at once. The 16 bytes of padding put them
  // into different banks.
  SLIDEJAX_HOST_DEVICE constexpr int row_bytes() const {
    return kStepBlocks * block_bytes() + (wide() ? 16 : 0);
  }
  SLIDEJAX_HOST_DEVICE constexpr int slot_values() const { return kTileRows * row_bytes(); }
  SLIDEJAX_HOST_DEVICE constexpr int slot_zeros() const {
    return dense() ? 0 : kTileRows * kStepBlocks * 8;
  }
  SLIDEJAX_HOST_DEVICE constexpr int slot_bytes() const { return slot_values() + slot_zeros(); }
  // Warps of a thread block. Larger blocks of values take more registers.
  SLIDEJAX_HOST_DEVICE constexpr int block_warps() const {
    return windows > 4 ? kMaxWarps / 2 : kMaxWarps;
  }
  // Warps that multiply. With larger blocks of values a warp has more bytes in flight.
  SLIDEJAX_HOST_DEVICE constexpr int most_warps() const {
    return slot_bytes() > 10000 ? kMaxWarps / 4 : slot_bytes() > 5000 ? kMaxWarps / 2 : kMaxWarps;
  }
  // Slots of a warp's ring, all but one of which are on their way while it multiplies. About 57 KB
  // in flight a multiprocessor hide the latency of memory; more delays x, which waits in the same
  // queue.
  SLIDEJAX_HOST_DEVICE constexpr int depth() const {
    const int in_flight = 56 * 1024 / most_warps();
    const int copied = slot_bytes() - (wide() ? 16 * kTileRows : 0);
    const int slots = (in_flight + (wide() ? copied / 2 : copied - 1)) / copied;
    return 1 + (slots < 1 ? 1 : slots > 4 ? 4 : slots);
  }
};

// The numbers that a launch is given beside its operands.
struct Plan {
  int warps = 0;   // of a thread block, those that multiply; 0: no plan fits
  int grid = 0;    // thread blocks
  int slices = 1;  // parts of K, more than one where x of all of K does not fit
  int slice_steps = 0;
  int tile_slots = 0;   // tiles whose sums are kept at once
  bool cached = false;  // whether shared memory keeps scales and biases of a block's outputs
  bool own = false;     // whether the kernel converts x itself
  int sums_bytes = 0;   // of shared memory for the sums, and before them for x and its norm
  int shared_bytes = 0;
};

// Bytes of one token's codes in shared memory. The 64 bytes beyond put the tokens of a quarter warp
// into different banks.
SLIDEJAX_HOST_DEVICE constexpr int64_t TokenBytes(Shape s, int steps) {
  return int64_t{steps} * s.step_lifted() + 64;
}

// Bytes of the codes and scales that QuantiseAhead leaves for the decode kernel.
inline int64_t WorkspaceBytes(Shape s, int M, int blocks) {
  return int64_t{M} * CeilDiv(blocks, kStepBlocks) * s.step_lifted() + RoundUp(4 * M, 16);
}

// Bytes for the sums of a block's warps, and for `M` rows of x and the weights of their norm that
// lie there before.
inline int SumsBytes(int warps, int M, int tile_slots, int row_bytes, int norm_bytes) {
  return RoundUp(std::max(tile_slots * warps * kTileRows * M * 4, M * row_bytes + norm_bytes), 16);
}

// Bytes of shared memory, in the order in which the Decoder (kernel.cuh) lays them out. `cached` is
// the number of rows whose scales and biases are kept.
inline int64_t SharedBytes(Shape s, int warps, int M, int slice_steps, int tile_slots, int sums,
                           int cached) {
  const int ring = warps * s.depth() * s.slot_bytes();
  const int64_t codes = RoundUp<int64_t>(M * TokenBytes(s, slice_steps), 128);
  const int rest = 4 * (2 * tile_slots + 2 * kMaxWarps + MostTokens(s.value_bytes));
  return ring + codes + sums + 2 * 4 * cached + RoundUp(rest, 16);
}

// Each of M rows has 2^LogShare of the block's warps, or one warp has several rows.
inline int LogShare(int M, int warps) {
  int log = 0;
  while (M << (log + 1) <= warps) ++log;
  return log;
}

// Sums of float32 depend on their order, so each warp has a place of its own for them.
SLIDEJAX_HOST_DEVICE constexpr int SumParts(bool floats, int warps) { return floats ? warps : 1; }

// Bytes of a row of x if it consists of whole pieces of 16 bytes and is not too long, else 0. `x`
// is the address of the first row.
inline int WholeRowBytes(int columns, int column_bytes, uintptr_t x) {
  const bool whole = columns <= kOwnColumns && columns % 8 == 0 && x % 16 == 0;
  return whole ? columns * column_bytes : 0;
}

// The same if the kernels for the fewest rows may convert all M rows themselves, else 0.
inline int OwnRowBytes(int M, int columns, int column_bytes, uintptr_t x) {
  return M <= kOwnTokens ? WholeRowBytes(columns, column_bytes, x) : 0;
}

// `row_bytes` is what OwnRowBytes says, and norm_bytes are those of the weights of a norm of x. A
// tile has tile_outputs outputs: half of its rows where each output has two of them.
inline Plan MakePlan(Shape s, int M, int out, int blocks, int row_bytes, int multiprocessors,
                     int shared_limit, int norm_bytes = 0, int tile_outputs = kTileRows) {
  const int tiles = CeilDiv(out, tile_outputs), steps = CeilDiv(blocks, kStepBlocks);
  const int grid = std::min(multiprocessors, tiles);
  const int block_tiles = CeilDiv(tiles, grid);
  const auto plan = [&](int warps, int slices, bool own) {
    Plan p;
    const int slice_steps = CeilDiv(steps, slices);
    // While no warp stalls, the first warp is at most `depth` items ahead of the last.
    const int wanted = std::max(2, CeilDiv(warps * s.depth(), slice_steps) + 1);
    p.slices = CeilDiv(steps, slice_steps);
    p.tile_slots = p.slices > 1 ? block_tiles : std::min(block_tiles, wanted);
    p.cached = block_tiles * kTileRows <= kCachedRows;
    p.sums_bytes = SumsBytes(warps, M, p.tile_slots, own ? row_bytes : 0, own ? norm_bytes : 0);
    const int64_t shared = SharedBytes(s, warps, M, slice_steps, p.tile_slots, p.sums_bytes,
                                       p.cached ? block_tiles * kTileRows : 0);
    if (shared > shared_limit) return Plan{};
    p.shared_bytes = static_cast<int>(shared);
    p.warps = warps, p.grid = grid, p.slice_steps = slice_steps, p.own = own;
    return p;
  };
  // As many warps as there may be, with K as a whole if it fits; else with fewer.
  for (int warps = s.most_warps(); warps >= 2; warps /= 2) {
    if (row_bytes > 0)
      if (const Plan p = plan(warps, 1, true); p.warps > 0) return p;
    for (int slices = 1; slices <= std::min(steps, 16 * s.value_bytes); ++slices)
      if (const Plan p = plan(warps, slices, false); p.warps > 0) return p;
  }
  return {};
}

}  // namespace slidejax::decode

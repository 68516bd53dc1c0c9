// How rows are cut into tiles, how much shared memory the tiles take, and how many warps and blocks
// work on them. This is host code, some of which the kernels share. It needs no CUDA header, no
// nvcc and no GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/warp.h"

namespace slidejax::lift {

constexpr int kChunk = 8;       // columns that a lane handles at once
constexpr int kGranule = 16;    // bytes of one asynchronous copy
constexpr int kLine = 128;      // bytes, of memory
constexpr int kMaxWarps = 32;   // of a block
constexpr int kMaxPending = 7;  // groups of asynchronous copies that a wait can leave under way
constexpr int kDefaultSharedBytes = 48 * 1024;  // of a block, for which a launch need not ask

// Returns how many columns lifting gives: four for each of a group's N-1 windows, in whole blocks
// of 8 groups.
inline int64_t LiftedColumns(int64_t columns, int group) {
  const int64_t groups = (columns + 8 * group - 1) / (8 * group) * 8;
  return groups * (group / 2 - 1) * 4;
}

// The odd part of N: chunks of a lane in one tile, so that 256 * TileSteps(N) columns are whole
// groups.
SLIDEJAX_HOST_DEVICE constexpr int TileSteps(int n) { return n % 2 ? n : TileSteps(n / 2); }

// Chunks of a lane in one tile of the ring kernel. A tile of odd part 1 is widened, so that its
// stores fill more lanes.
SLIDEJAX_HOST_DEVICE constexpr int StepsOf(int n) { return TileSteps(n) == 1 ? 4 : TileSteps(n); }

// Bytes of a tile of results, of `steps` chunks a lane: 256 * steps columns are 128 * steps / n
// groups of n-1 windows of four. n = 1: the columns as they are.
SLIDEJAX_HOST_DEVICE constexpr int TileBytes(int n, int steps, int out_bytes) {
  return n == 1 ? kLanes * kChunk * steps * out_bytes : 128 * steps / n * (n - 1) * 4 * out_bytes;
}

struct RowShape {
  int64_t rows;
  int n;             // N of 2N-2:2N; 1: no lifting
  int steps;         // chunks of a lane in a tile
  int tiles;         // of a row, padding included
  bool x_aligned;    // every row starts at a multiple of 16 bytes and ends with a whole chunk
  bool out_aligned;  // n = 1: the same for the result
  bool normed;       // the prologue is a norm
};

// Shared memory begins with two sets of maxima, which alternate, and two of sums, a word a warp.
constexpr int kReductionBytes = 4 * kMaxWarps * 4;

// Bytes of a tile of x in the ring. They are whole lines, which warps copy and read the fastest,
// and one line more where rows are shifted.
SLIDEJAX_HOST_DEVICE inline int SlotBytes(const RowShape& s, int steps, int in_bytes) {
  return kLanes * kChunk * steps * in_bytes + (s.x_aligned ? 0 : kLine);
}
// Bytes of a staged tile of results; 0 where results are stored straight away.
SLIDEJAX_HOST_DEVICE inline int StageBytes(const RowShape& s, int n, int steps, int out_bytes) {
  if (n == 1 && (out_bytes > 1 || s.out_aligned)) return 0;
  return TileBytes(n, steps, out_bytes) + (n == 1 ? kLine : 0);
}

struct DeviceLimits {
  int multiprocessors;
  int shared_of_block;  // bytes
  int shared_of_multiprocessor;
};

struct RingGeometry {
  int warps;   // of a block; 0: a row does not fit
  int blocks;  // of a multiprocessor
  int depth;   // tiles in a warp's part of the ring: at least as many as it has of a row
  int bytes;   // of shared memory of a block
};

// sources: inputs as large as x.
RingGeometry ChooseGeometry(const RowShape& shape, int sources, int in_bytes, int out_bytes,
                            const DeviceLimits& device);

}  // namespace slidejax::lift

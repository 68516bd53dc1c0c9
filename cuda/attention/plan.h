// How a call of the attention kernel is laid out: host code, and the constants that host and kernel
// share. docs/attention-kernel.md explains the words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/host_device.h"
#include "common/integers.h"
#include "common/warp.h"

namespace slidejax::attention {

constexpr int kChannels = 8;  // of a key or value that a lane holds
constexpr int kMaxHeadDim = kChannels * kLanes;
constexpr int kHeadDimMultiple = 2 * kChannels;  // both halves of a head are whole lanes
constexpr int kMaxHeads = 8;                     // query heads that share a reading of the cache
constexpr int kMaxWarps = 8;
constexpr int kMaxSplits = 16;  // parts of a row's cache: the CTAs of one cluster
// Thread blocks that a call should have at least, if the cache can be split that far.
constexpr int kWantedBlocks = 128;
// Bytes in a warp's ring for each 16 bits of an element. Two thirds of them are on their way while
// the warp computes.
constexpr int kRingBytes = 12 * 1024;

// The sizes that follow from a kernel's template arguments.
struct Shape {
  int cache_bytes;  // of an element of the cache
  int lanes;        // that hold one key: 8, 16 or 32
  int heads;        // query heads of a thread block: 4 or 8

  // Keys that a lane holds at once.
  SLIDEJAX_HOST_DEVICE constexpr int keys() const { return heads > 4 ? 2 : 4; }
  // Keys that a warp holds at once.
  SLIDEJAX_HOST_DEVICE constexpr int step_keys() const { return keys() * kLanes / lanes; }
  // 16-byte pieces of a lane's channels of one key.
  SLIDEJAX_HOST_DEVICE constexpr int pieces() const { return kChannels * cache_bytes / 16; }
  SLIDEJAX_HOST_DEVICE constexpr int slot_bytes() const {
    return 2 * keys() * pieces() * 16 * kLanes;
  }
  SLIDEJAX_HOST_DEVICE constexpr int depth() const { return 12 / keys(); }
  SLIDEJAX_HOST_DEVICE constexpr int ring_bytes() const { return depth() * slot_bytes(); }
  // Chunks of four channels in a head.
  SLIDEJAX_HOST_DEVICE constexpr int head_chunks() const { return 2 * lanes; }
  // The turned queries, the new key and the new value.
  SLIDEJAX_HOST_DEVICE constexpr int fresh_floats() const {
    return (heads + 2) * lanes * kChannels;
  }
  // Bytes of shared memory, in the order in which the kernel lays them out: the rings, which later
  // hold the warps' sums; what is fresh; the warps' heads; and what the thread blocks of a cluster
  // send.
  SLIDEJAX_HOST_DEVICE constexpr int shared_bytes(int warps) const {
    return warps * ring_bytes() + 4 * fresh_floats() + 8 * heads * (kMaxWarps + kMaxSplits) +
           16 * heads * head_chunks();
  }
};

// Bytes of workspace for a thread block's part of its heads, and for what it has of their weights.
inline int PartBytes(int heads, int lanes) { return heads * 16 * (2 * lanes + 1); }

struct Plan {
  int lanes = 0;   // that hold one key
  int heads = 0;   // query heads of a thread block
  int chunks = 0;  // thread blocks for the query heads of one key head
  int splits = 0;  // parts of a row's cache
  int warps = 0;   // of a thread block
  int shared_bytes = 0;
};

// How many parts a row's cache has. It does not depend on the device, because the workspace does.
inline int Splits(int64_t blocks, int most) {
  int splits = 1;
  while (2 * splits <= most && splits * blocks < kWantedBlocks) splits *= 2;
  return splits;
}

inline Plan MakePlan(int64_t rows, int heads, int kv_heads, int head_dim, int cache_bytes,
                     int shared_limit, int most_splits) {
  Plan p;
  const int group = heads / kv_heads;
  p.lanes = head_dim <= 8 * kChannels ? 8 : head_dim <= 16 * kChannels ? 16 : 32;
  p.heads = group > 4 ? 8 : 4;
  p.chunks = CeilDiv(group, p.heads);
  const int64_t blocks = rows * kv_heads * p.chunks;
  p.splits = Splits(blocks, most_splits);
  const Shape shape{cache_bytes, p.lanes, p.heads};
  // Few warps have less to add up in the end; more of them turn more heads at once in the
  // beginning.
  p.warps = p.heads > 4 || p.lanes == kLanes ? kMaxWarps : kMaxWarps / 2;
  while (p.warps > 1 && shape.shared_bytes(p.warps) > shared_limit) p.warps /= 2;
  p.shared_bytes = shape.shared_bytes(p.warps);
  return p;
}

}  // namespace slidejax::attention

// The kernel that makes 2:4 metadata, in the order in which wgmma's threads hold it, from the two
// zero positions of each group.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace slidejax::hopper {

// A thread block expands 128 groups of 64 rows, which fill 4 * windows slices exactly. Each 128 of
// its threads write every fourth slice.
inline constexpr int kMetadataGroups = 128, kMetadataThreads = 512;

// The metadata of a group whose zeros are z1 < z2: a nibble first | second << 2 for each window,
// window 0 lowest. Kept value number p of the group is in column p, plus 1 if that reaches z1, plus
// 1 if it then reaches z2. In window w columns are counted from 2 w on.
__host__ __device__ inline uint32_t GroupMetadata(uint32_t zeros, int windows) {
  const uint32_t mask = (1u << (4 * windows)) - 1, z1 = zeros & 15, z2 = zeros >> 4;
  return (0x4444444u & mask) + ((0x5555555u << (2 * z1)) & mask) +
         ((0x5555555u << (2 * ((z2 - 1) & 15))) & mask);
}

// Writes meta[m64 block][slice of 128 lifted columns][thread][k64 step]. Thread 32 q + l of a warp
// group holds row 16 q + l / 4 + 8 (l % 2) and, of each k64 step, the 32 columns from
// 32 (l / 2 % 2) on, as eight nibbles with K ascending. The metadata of a row is that of its groups
// one after another. Beyond the last column and the last row stands 4, which is a legal nibble.
template <int kWindows>
__global__ void __launch_bounds__(kMetadataThreads)
    ExpandMetadataKernel(const uint8_t* zeros, uint2* meta, int out, int groups, int stages) {
  constexpr int kPitch =
      kMetadataGroups +
      4;  // bytes of a row: the 16 rows that a warp reads at a time lie in different banks
  __shared__ __align__(4) uint8_t tile[64 * kPitch];
  const int first_group = blockIdx.x * kMetadataGroups, row = blockIdx.y * 64;
  for (int i = threadIdx.x; i < 64 * (kMetadataGroups / 8);
       i += kMetadataThreads) {  // groups come in eights
    const int r = i / (kMetadataGroups / 8), g = i % (kMetadataGroups / 8) * 8;
    if (row + r >= out || first_group + g >= groups) continue;
    const uint2 v = *reinterpret_cast<const uint2*>(zeros + static_cast<size_t>(row + r) * groups +
                                                    first_group + g);
    uint32_t* to = reinterpret_cast<uint32_t*>(tile + r * kPitch + g);
    to[0] = v.x;
    to[1] = v.y;
  }
  __syncthreads();
  const int thread = threadIdx.x & 127, lane = thread & 31, half = (lane >> 1) & 1;
  const int own = (thread >> 5) * 16 + (lane >> 2) + 8 * (lane & 1);
  const uint8_t* of_row = tile + own * kPitch;
  const int words = row + own < out ? (groups - first_group) * kWindows / 8
                                    : 0;  // that there are, from this block's first
  auto word = [&](int w) -> uint32_t {
    if (w >= words) return 0x44444444u;
    int group = 8 * w / kWindows,
        have = (group + 1) * kWindows - 8 * w;  // windows of `group` from the word's first on
    uint64_t bits = GroupMetadata(of_row[group], kWindows) >> (4 * (kWindows - have));
#pragma unroll
    for (int more = 0; more < (8 + kWindows - 2) / kWindows; ++more, have += kWindows)
      if (have < 8)
        bits |= static_cast<uint64_t>(GroupMetadata(of_row[++group], kWindows)) << (4 * have);
    return static_cast<uint32_t>(bits);
  };
  const int first = blockIdx.x * (kMetadataGroups / 32 * kWindows);
  uint2* to = meta + (static_cast<size_t>(blockIdx.y) * stages + first) * 128 + thread;
  for (int stage = static_cast<int>(threadIdx.x) >> 7;
       stage < kMetadataGroups / 32 * kWindows && first + stage < stages;
       stage += kMetadataThreads / 128)
    to[stage * 128] = make_uint2(word(stage * 4 + half), word(stage * 4 + 2 + half));
}

}  // namespace slidejax::hopper

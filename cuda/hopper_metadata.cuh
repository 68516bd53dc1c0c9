// From the two zero positions of each group to the 2:4 metadata, in the order in which wgmma's threads hold it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace slidejax::hopper {

inline constexpr int kMetadataStagesPerBlock = 8;

// The windows of a group whose zeros are z1 < z2 are `windows` nibbles first | second << 2, window 0 lowest. Kept column
// number p of the group is p, + 1 if that reaches z1, + 1 if it then reaches z2; in window w it is counted from 2 w.
__host__ __device__ inline uint32_t group_metadata(uint32_t zeros, int windows) {
  const uint32_t mask = (1u << (4 * windows)) - 1, z1 = zeros & 15, z2 = zeros >> 4;
  return (0x4444444u & mask) + ((0x5555555u << (2 * z1)) & mask) + ((0x5555555u << (2 * ((z2 - 1) & 15))) & mask);
}

// meta[row block of 64][stage of 128 lifted columns][thread][k64 step]: thread 32 q + l of a warp group holds row
// 16 q + l / 4 + 8 (l % 2), columns 32 (l / 2 % 2) .. + 31 of each k64 step, as eight nibbles, K ascending. A row's metadata is
// the concatenation of its groups'; beyond the last column and the last row stands the legal nibble 4.
__global__ void __launch_bounds__(128) expand_metadata_kernel(const uint8_t* zeros, uint2* meta, int out, int groups, int windows,
                                                              int stages) {
  const int thread = threadIdx.x, lane = thread & 31;
  const int row = blockIdx.y * 64 + (thread >> 5) * 16 + (lane >> 2) + 8 * (lane & 1), half = (lane >> 1) & 1;
  const int words = groups * windows / 8;  // of a row
  const uint8_t* of_row = zeros + static_cast<size_t>(row) * groups;
  auto word = [&](int w) -> uint32_t {
    if (row >= out || w >= words) return 0x44444444u;
    int group = 8 * w / windows, have = windows - (8 * w - group * windows);
    uint64_t bits = group_metadata(of_row[group], windows) >> (4 * (windows - have));
    for (; have < 8; have += windows) bits |= static_cast<uint64_t>(group_metadata(of_row[++group], windows)) << (4 * have);
    return static_cast<uint32_t>(bits);
  };
  const int first = blockIdx.x * kMetadataStagesPerBlock;
  for (int stage = first; stage < min(first + kMetadataStagesPerBlock, stages); ++stage) {
    meta[(static_cast<size_t>(blockIdx.y) * stages + stage) * 128 + thread] =
        make_uint2(word(stage * 4 + half), word(stage * 4 + 2 + half));
  }
}

}  // namespace slidejax::hopper

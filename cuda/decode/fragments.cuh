// Which lane multiplies what. One mma multiplies 16 outputs with 8 tokens over 64 lifted columns.
// The order of K is ours to choose, as long as weights, metadata and codes agree on it, so it is
// chosen such that nothing has to change lanes:
//
//   A step is four blocks of a row, one for each lane t of a quad. The lane's 4-byte words of
//   values are numbered; mma number j takes word j of the block's first half and word j of its
//   second half. So lane t reads its block as it lies, and the metadata of one half of a row,
//   which one lane supplies, comes from four groups of each of the four blocks.
//
// In shared memory a token's codes lie in the order in which lanes read them: for each step and
// mma, 16 bytes for each of the four lanes of a quad.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "decode/plan.h"

namespace slidejax::decode {

// Where window number `within` (four lifted columns, a word of codes) of a block of a token lies.
// For a dense weight a window is four columns.
template <int kWindows>
__device__ inline int WindowOffset(int block, int within) {
  constexpr Shape kShape{kWindows};
  constexpr int kHalf = kShape.block_lifted() / 8;  // windows
  const int step = block / kStepBlocks, t = block % kStepBlocks;
  const int half = within / kHalf, rest = within % kHalf;
  if constexpr (kShape.dense()) {
    // mma j reads a word of each half; two mma share 16 bytes.
    return step * kShape.step_lifted() + rest / 2 * 64 + t * 16 + (rest % 2 * 2 + half) * 4;
  } else {
    return step * kShape.step_lifted() + rest / 2 * 64 + (t % 2 * 2 + rest % 2) * 16 +
           (t / 2 + 2 * half) * 4;
  }
}

// The 2:4 metadata of half a row of four blocks: zeros[b] has the bytes of four groups of block b,
// e[j] gets the eight nibbles that mma j wants of a lane. A group's nibbles are
//   0x444... + (0x555... << 2 z1) + (0x555... << 2 (z2 - 1)),
// a sum without carries between its two-bit fields (docs/design.md).
template <int kWindows>
__device__ inline void ExpandMetadata(const uint32_t (&zeros)[kStepBlocks],
                                      uint32_t (&e)[2 * kWindows]) {
  constexpr int kGroupBits = 4 * kWindows, kWords = (4 * kGroupBits + 31) / 32;
  constexpr uint32_t kMask = (1u << kGroupBits) - 1;
  uint32_t half[kStepBlocks][kWords];
#pragma unroll
  for (int b = 0; b < kStepBlocks; ++b) {
    const uint32_t first = (zeros[b] & 0x0f0f0f0fu) << 1;
    const uint32_t second = ((zeros[b] >> 3) & 0x1e1e1e1eu) - 0x02020202u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) half[b][i] = 0;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      // The funnel shift takes its amount modulo 32, so the other bytes need not be masked out.
      const uint32_t nibbles =
          (0x44444444u + __funnelshift_l(0, 0x55555555u, first >> (8 * group)) +
           __funnelshift_l(0, 0x55555555u, second >> (8 * group))) &
          kMask;
      const int at = group * kGroupBits, word = at / 32, shift = at % 32;
      half[b][word] |= nibbles << shift;
      if (shift + kGroupBits > 32) half[b][word + 1] |= nibbles >> (32 - shift);
    }
  }
#pragma unroll
  for (int j = 0; j < 2 * kWindows; j += 2) {  // byte j of each block, two j at a time
    const int word = j / 4;
    const unsigned pick = j % 4 == 0 ? 0x5140 : 0x7362;
    const uint32_t low = __byte_perm(half[0][word], half[1][word], pick);
    const uint32_t high = __byte_perm(half[2][word], half[3][word], pick);
    e[j] = __byte_perm(low, high, 0x5410);
    e[j + 1] = __byte_perm(low, high, 0x7632);
  }
}

}  // namespace slidejax::decode

// The operands of each lane. One mma multiplies 16 outputs with 8 tokens over 64 lifted columns.
// The order of K is ours to choose, as long as weights, metadata and codes agree on it, so it is
// chosen such that nothing has to change lanes:
//
//   A step is four blocks of a row, one for each lane t of a quad. The lane's 4-byte words of
//   values are numbered; mma number j takes word j of the block's first half and word j of its
//   second half. So lane t reads its block as it lies, and the metadata of one half of a row,
//   which one lane supplies, comes from four groups of each of the four blocks.
//
// With values of 16 bits one mma multiplies 32 lifted columns, and it takes its metadata from two
// lanes of a quad, 2 s and 2 s + 1 for selector s: from each of them that of half a row, for two
// rows. The four blocks of a step have a lane each, which makes the metadata of its block. So mma
// number j of selector s takes the 16-byte chunks number j of blocks 2 s and 2 s + 1. ldmatrix
// brings the chunks, whose four words go to the four lanes of a quad.
//
// In shared memory a token's codes lie in the order in which lanes read them: for each step and
// mma, 16 bytes for each of the four lanes of a quad. Dense mma take half as much: two share it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "decode/plan.h"

namespace slidejax::decode {

// Where window number `within` (four lifted columns, a word of codes) of a block of a token lies.
// For a dense weight a window is four columns. Of values of 16 bits it is where the window's first
// two columns lie; the other two lie kHalfWindow bytes on.
constexpr int kHalfWindow = 16;

template <int kWindows>
__device__ inline int WideWindowOffset(int block, int within) {
  constexpr Shape kShape{kWindows, 2};
  constexpr int kChunkWindows = kShape.dense() ? 2 : 4, kChunks = kShape.block_bytes() / 16;
  const int step = block / kStepBlocks, t = block % kStepBlocks;
  const int chunk = within / kChunkWindows, rest = within % kChunkWindows;
  const int mma = t / 2 * kChunks + chunk;  // of the step
  if constexpr (kShape.dense()) {
    return step * kShape.step_lifted() + mma / 2 * 64 + rest * 32 + (mma % 2 * 2 + t % 2) * 4;
  } else {
    return step * kShape.step_lifted() + mma * 64 + rest % 2 * 32 + (t % 2 * 2 + rest / 2) * 4;
  }
}

// The same of codes of 8 bits, whose windows are a word.
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

// The nibbles of four groups, whose bytes of zeros are `zeros`, one group after the other. Those of
// a group are
//   0x444... + (0x555... << 2 z1) + (0x555... << 2 (z2 - 1)),
// a sum without carries between its two-bit fields (docs/design.md).
template <int kWindows>
struct Nibbles {
  static constexpr int kGroupBits = 4 * kWindows, kWords = (4 * kGroupBits + 31) / 32;
  uint32_t word[kWords];

  __device__ explicit Nibbles(uint32_t zeros) {
    constexpr uint32_t kMask = (1u << kGroupBits) - 1;
    // Beyond the weight there are zeros, which is no pair of places; the values are zero as well.
    if (zeros == 0) zeros = 0x10101010u;
    const uint32_t first = (zeros & 0x0f0f0f0fu) << 1;
    const uint32_t second = ((zeros >> 3) & 0x1e1e1e1eu) - 0x02020202u;
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = 0;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      // The funnel shift takes its amount modulo 32, so the other bytes need not be masked out.
      const uint32_t nibbles =
          (0x44444444u + __funnelshift_l(0, 0x55555555u, first >> (8 * group)) +
           __funnelshift_l(0, 0x55555555u, second >> (8 * group))) &
          kMask;
      const int at = group * kGroupBits, i = at / 32, shift = at % 32;
      word[i] |= nibbles << shift;
      if (shift + kGroupBits > 32) word[i + 1] |= nibbles >> (32 - shift);
    }
  }
};

// The 2:4 metadata of half a row of four blocks: zeros[b] has the bytes of four groups of block b,
// e[j] gets the eight nibbles that mma j wants of a lane.
template <int kWindows>
__device__ inline void ExpandMetadata(const uint32_t (&zeros)[kStepBlocks],
                                      uint32_t (&e)[2 * kWindows]) {
  const Nibbles<kWindows> half[kStepBlocks] = {
      Nibbles<kWindows>(zeros[0]), Nibbles<kWindows>(zeros[1]), Nibbles<kWindows>(zeros[2]),
      Nibbles<kWindows>(zeros[3])};
#pragma unroll
  for (int j = 0; j < 2 * kWindows; j += 2) {  // byte j of each block, two j at a time
    const int word = j / 4;
    const unsigned pick = j % 4 == 0 ? 0x5140 : 0x7362;
    const uint32_t low = __byte_perm(half[0].word[word], half[1].word[word], pick);
    const uint32_t high = __byte_perm(half[2].word[word], half[3].word[word], pick);
    e[j] = __byte_perm(low, high, 0x5410);
    e[j + 1] = __byte_perm(low, high, 0x7632);
  }
}

// The same for values of 16 bits, of one block of two rows whose zeros are `upper` and `lower`:
// e[j] gets the four nibbles of chunk j of each row.
template <int kWindows>
__device__ inline void ExpandWideMetadata(uint2 upper, uint2 lower, uint32_t (&e)[2 * kWindows]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Nibbles<kWindows> u(half ? upper.y : upper.x), l(half ? lower.y : lower.x);
#pragma unroll
    for (int j = 0; j < kWindows; ++j)
      e[half * kWindows + j] = __byte_perm(u.word[j / 2], l.word[j / 2], j % 2 ? 0x7632 : 0x5410);
  }
}

}  // namespace slidejax::decode

// The products of a warp: of the values and zeros in its ring with the codes of x.
#pragma once

#include "decode/fragments.cuh"
#include "decode/plan.h"
#include "decode/ptx.cuh"

namespace slidejax::decode {

template <typename Code>
using SumsFor = std::conditional_t<std::is_same_v<Code, int8_t>, SumsS32, SumsF32>;
template <typename Code>
using SumOf = std::conditional_t<std::is_same_v<Code, int8_t>, int32_t, float>;

// Of kTokenTiles tiles of 8 tokens.
template <typename Code, int kWindows, int kTokenTiles>
class Multiplier {
 public:
  static constexpr Shape kShape{kWindows, sizeof(Code)};

 protected:
  __device__ Multiplier() : lane_(threadIdx.x % kLanes) {}

  // Adds the products of step `step`, which lies in slot `slot`, of M tokens to the warp's sums.
  __device__ void Multiply(int slot, int step, int M) {
    if constexpr (kShape.wide()) {
      MultiplyWide(slot, step, M);
    } else {
      MultiplyNarrow(slot, step, M);
    }
  }

  const int lane_;
  uint8_t* ring_;  // of the warp
  uint32_t ring_address_;
  uint8_t* codes_;
  int token_bytes_;
  // Of each tile of tokens two chains of mma, so that one need not wait for the other.
  SumsFor<Code> sums_of_[kTokenTiles][2];

 private:
  // 16 bytes of the codes of token lane / 4 of a tile, for this lane: number i of a step.
  __device__ uint4 CodesOf(int tile, int step, int i, int M) const {
    const int token = tile * kTileTokens + lane_ / 4, t = lane_ % 4;
    const uint8_t* codes = codes_ + token * token_bytes_ + step * kShape.step_lifted() + t * 16;
    return token < M ? *reinterpret_cast<const uint4*>(codes + i * 64) : uint4{0, 0, 0, 0};
  }

  // Values of 16 bits.
  __device__ void MultiplyWide(int slot, int step, int M) {
    constexpr int kBytes = kShape.block_bytes(), kChunks = kBytes / 16;
    // Lanes 0 to 15 say where the rows of the first block of a pair are, the others the second.
    const uint32_t from = ring_address_ + slot * kShape.slot_bytes() +
                          lane_ % kTileRows * kShape.row_bytes() + lane_ / kTileRows * kBytes;
    const auto values = [&](uint32_t (&to)[4], int pair, int chunk) {
      LoadMatrices(to, from + pair * 2 * kBytes + chunk * 16);
    };
    if constexpr (kShape.dense()) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {  // two mma share 16 bytes of codes
        const int pair = 2 * i / kChunks, chunk = 2 * i % kChunks;
        uint32_t first[4], second[4];
        values(first, pair, chunk), values(second, pair, chunk + 1);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          const uint4 b = CodesOf(tile, step, i, M);
          MultiplyDense<Code>(sums_of_[tile][0], first, b.x, b.y);
          MultiplyDense<Code>(sums_of_[tile][1], second, b.z, b.w);
        }
      }
    } else {
      const int g = lane_ / 4, t = lane_ % 4;
      const auto* zeros =
          reinterpret_cast<const uint2*>(ring_ + slot * kShape.slot_bytes() + kShape.slot_values());
      uint32_t metadata[kChunks];  // of block t of rows g and g + 8
      ExpandWideMetadata<kWindows>(zeros[g * kStepBlocks + t], zeros[(g + 8) * kStepBlocks + t],
                                   metadata);
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        uint32_t first[4], second[4];
        values(first, 0, j), values(second, 1, j);
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          auto& sums = sums_of_[tile];
          MultiplySparse<Code, 0>(sums[0], first, CodesOf(tile, step, j, M), metadata[j]);
          MultiplySparse<Code, 1>(sums[1], second, CodesOf(tile, step, kChunks + j, M),
                                  metadata[j]);
        }
      }
    }
  }

  // Values of 8 bits.
  __device__ void MultiplyNarrow(int slot, int step, int M) {
    static_assert(kTokenTiles == 1 || kShape.wide(), "values of 8 bits meet one tile of tokens");
    const uint8_t* from = ring_ + slot * kShape.slot_bytes();
    auto& sums = sums_of_[0];
    const int g = lane_ / 4, t = lane_ % 4;
    constexpr int kBytes = kShape.block_bytes(), kWords = kBytes / 4;
    uint32_t upper[kWords], lower[kWords];  // the lane's block of rows g and g + 8
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const auto* at = reinterpret_cast<const uint4*>(from + (g * kStepBlocks + t) * kBytes);
      const uint4 u = at[i / 4], l = at[i / 4 + 8 * kStepBlocks * kBytes / 16];
      upper[i] = u.x, upper[i + 1] = u.y, upper[i + 2] = u.z, upper[i + 3] = u.w;
      lower[i] = l.x, lower[i + 1] = l.y, lower[i + 2] = l.z, lower[i + 3] = l.w;
    }
    if constexpr (kShape.dense()) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const uint4 b = CodesOf(0, step, j / 2, M);
        MultiplyDense(sums[0], {upper[j], lower[j], upper[4 + j], lower[4 + j]}, b.x, b.y);
        MultiplyDense(sums[1], {upper[j + 1], lower[j + 1], upper[5 + j], lower[5 + j]}, b.z, b.w);
      }
    } else {
      constexpr int kHalf = 2 * kWindows;
      uint32_t metadata[kHalf];
      LoadMetadata(from + kShape.slot_values(), metadata);
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        MultiplySparse(sums[j % 2], {upper[j], lower[j], upper[kHalf + j], lower[kHalf + j]},
                       CodesOf(0, step, j, M), metadata[j]);
      }
    }
  }

  // Lane (g, t) supplies the metadata of half t / 2 of row g + 8 (t % 2).
  __device__ void LoadMetadata(const uint8_t* from,
                               uint32_t (&metadata)[2 * (kWindows > 0 ? kWindows : 1)]) const {
    const int row = lane_ / 4 + 8 * (lane_ % 2), half = lane_ % 4 / 2;
    const auto* at = reinterpret_cast<const uint4*>(from + row * kStepBlocks * 8);
    const uint4 v = at[0], w = at[1];
    const uint32_t zeros[kStepBlocks] = {half ? v.y : v.x, half ? v.w : v.z, half ? w.y : w.x,
                                         half ? w.w : w.z};
    ExpandMetadata<kWindows>(zeros, metadata);
  }
};

}  // namespace slidejax::decode

// The tiles of the Hopper kernel: their shapes, and what follows from a shape (bytes of shared
// memory, registers, ways to divide K). This is host code, so that the cost model (plan.h) can be
// compiled and tested without nvcc.
#pragma once

#include <algorithm>
#include <cstdint>

namespace slidejax::hopper {

// Every tile there is:
//   F(name, warp groups, m64 blocks, tokens, CTAs, stages of X, stages of W, form,
//     clocks of a stage, clocks of a tile, time with shared W)
// The first seven numbers and the form are the parameters of Tile, below. The others are measured
// (H200):
//   clocks of a stage     of 128 columns of the product, in the full pipeline
//   clocks of a tile      what a tile costs beyond its stages
//   time with shared W    the time where two CTA groups share W by multicast, as a part of the time
//                         where they do not. Sharing saves energy, which limits large products, but
//                         a short stage does not hide the signals between four CTAs. It is 1 for
//                         tiles that cannot share W.
#define SLIDEJAX_HOPPER_TILES(F)                                        \
  F("256x192", 2, 2, 192, 2, 4, 2, kMetadata, 977, 3000, 0.96f)         \
  F("128x256", 2, 1, 256, 2, 4, 3, kMetadata, 665, 2500, 0.98f)         \
  F("256x160", 2, 2, 160, 2, 4, 3, kMetadata, 843, 2600, 0.95f)         \
  F("256x128", 2, 2, 128, 2, 4, 3, kMetadata, 710, 2000, 0.96f)         \
  F("128x128", 2, 1, 128, 2, 6, 4, kMetadata, 400, 1500, 1.08f)         \
  F("128x128 (4 CTAs)", 2, 1, 128, 4, 6, 4, kMetadata, 395, 1500, 1)    \
  F("128x128 (1 CTA)", 2, 1, 128, 1, 5, 5, kMetadata, 400, 1500, 1)     \
  F("64x128", 1, 1, 128, 1, 6, 9, kMetadata, 330, 1000, 1)              \
  F("64x64", 1, 1, 64, 1, 7, 7, kMetadata, 200, 800, 1)                 \
  F("64x32", 1, 1, 32, 1, 7, 7, kMetadata, 200, 800, 1)                 \
  F("64x16", 1, 1, 16, 1, 8, 8, kMetadata, 200, 800, 1)                 \
  F("128x256 (zeros)", 2, 1, 256, 2, 4, 3, kZeros, 665, 2500, 0.98f)    \
  F("128x128 (zeros)", 2, 1, 128, 2, 6, 4, kZeros, 400, 1500, 1.08f)    \
  F("128x128 (1 CTA, zeros)", 2, 1, 128, 1, 5, 5, kZeros, 400, 1500, 1) \
  F("dense 256x192", 2, 2, 192, 2, 3, 3, kDense, 1520, 2900, 0.97f)     \
  F("dense 128x256", 2, 1, 256, 2, 4, 4, kDense, 1040, 2500, 0.96f)     \
  F("dense 128x128", 2, 1, 128, 2, 6, 6, kDense, 560, 1500, 0.97f)      \
  F("dense 128x64", 2, 1, 64, 1, 7, 7, kDense, 340, 1000, 1)            \
  F("dense 128x16", 2, 1, 16, 1, 10, 10, kDense, 400, 800, 1)

// K is walked in steps of two slices. A slice is 128 columns of the product.
inline constexpr int kStepColumns = 2 * 128;

// The numbers of parts into which the CTA groups of a cluster can divide K.
inline constexpr int kClusterSplits[] = {2, 3, 4, 6, 8};
inline constexpr int kMaxClusterCtas = 8;  // what every Hopper GPU can launch

// The largest divisor of `count` that is at most `most`.
constexpr int LargestDivisor(int count, int most) {
  while (count % most) --most;
  return most;
}

// The contents of a stage of W: all columns; those of the packed form and their metadata; those of
// groups of eight and their zeros, of which consumers make the metadata.
enum Form { kDense, kMetadata, kZeros };

template <bool kFp8_, int kWarpGroups_, int kM64Blocks_, int kTokens_, int kCtas_, int kStagesX_,
          int kStagesW_, Form kForm_>
struct Tile {
  static constexpr bool kFp8 = kFp8_;
  static constexpr bool kSparse = kForm_ != kDense;      // W is 2:4; else it has all its columns
  static constexpr bool kHoldsZeros = kForm_ == kZeros;  // in the place of metadata
  static constexpr int kWarpGroups = kWarpGroups_;       // that multiply
  static constexpr int kM64Blocks = kM64Blocks_;         // blocks of 64 rows of each warp group
  static constexpr int kTokens = kTokens_;
  static constexpr int kCtas = kCtas_;        // of a CTA group: they are stacked along the outputs
                                              // and share X by multicast
  static constexpr int kStagesX = kStagesX_;  // of the ring of X
  static constexpr int kStagesW = kStagesW_;  // of the ring of W
  static constexpr int kRows = kWarpGroups * kM64Blocks * 64;
  // Whether the epilogue can add a residual. Tiles with two m64 blocks have no registers for it. Of
  // dense tiles those of few tokens can.
  static constexpr bool kAdds = kM64Blocks == 1 && (kSparse || kTokens <= 64);
  // Whether the kernel makes its metadata from zeros (expand.cuh), in a warp group of its own.
  // Larger tiles have neither the registers for it nor rings that are deep enough.
  static constexpr bool kExpands =
      kForm_ == kMetadata && kRows * kTokens <= 128 * 128 && kCtas == 1;
  // The warp groups are those that multiply, one that loads, and the expanders.
  static constexpr int kThreads = (kWarpGroups + (kExpands ? 2 : 1)) * 128;
  static constexpr int kTokensOfCta = kTokens / kCtas;  // that a CTA copies for its group
  static constexpr bool kCanShareW = kCtas == 2;        // two CTA groups can share W

  // Registers of a thread, for setmaxnreg. Their sum must not exceed what a CTA is launched with,
  // else setmaxnreg waits for ever.
  static constexpr bool kLarge = kM64Blocks * kTokens > 320;
  static constexpr int kConsumerRegisters = kExpands ? (kWarpGroups == 1 ? 168 : 160)
                                            : kLarge ? 240
                                                     : 232;
  static constexpr int kProducerRegisters = kExpands ? 96 : kLarge ? 24 : 40;  // and expanders
  static_assert(kWarpGroups * (kConsumerRegisters - kProducerRegisters) +
                    kThreads / 128 * kProducerRegisters <=
                65536 / kThreads / 8 * 8 * (kThreads / 128));

  // A stage always holds rows of 128 bytes: of X one slice each, of sparse W two. Small tiles take
  // two slices of X into a stage as well.
  static constexpr int kSlicesX = kSparse && kM64Blocks == 1 && kTokens <= 64 ? 2 : 1;
  static constexpr int kSlicesW = kSparse ? 2 : 1;
  static constexpr int kStageBytesX = kSlicesX * kTokens * 128;
  static constexpr int kValueBytes = kRows * 128;  // of W, in a stage
  static constexpr int kMetadataBytes = kSparse ? kSlicesW * kRows * 16 : 0;
  static constexpr int kStageBytesW = kValueBytes + kMetadataBytes;
  static constexpr int kRingBytes = kStagesX * kStageBytesX + kStagesW * kStageBytesW;
  // Both rings hold the same number of slices: consumers keep one position for both.
  static constexpr bool kRingsInStep = kStagesX * kSlicesX == kStagesW * kSlicesW;

  // Results leave in slabs of 64 outputs of a few tokens, for which a warp group has some buffers.
  static constexpr int kSlabTokens = std::min(kTokens, 32);
  static constexpr int kSlabBytes = kSlabTokens * 128;
  static constexpr int kSlabs = LargestDivisor(
      kM64Blocks * kTokens / kSlabTokens,
      (!kSparse || kTokens == 160 ? 8192 : 16384) / kSlabBytes);  // buffers of a warp group
  static constexpr int kStagingBytes = std::max(kSlabs * kSlabBytes / 4, 2048);  // of a warp
  // scale_x, scale_w and bias of a warp group, of which it has two sets.
  static constexpr int kScaleBytes = kTokens * 4 + kM64Blocks * 512;
  // A full and an empty barrier for each stage, and behind them one for the zeros of a stage of W.
  static constexpr int kRingBarrierBytes = 16 * (kStagesX + kStagesW);
  static constexpr int kBarrierBytes = kRingBarrierBytes + (kExpands ? 16 * kStagesW : 0);
  static constexpr int kInfoBytes = 16 * kStagesX;  // work-tile info, one for each stage of X
  static constexpr int kSharedBytes =
      kRingBytes + kWarpGroups * (4 * kStagingBytes + 2 * kScaleBytes) + kBarrierBytes + kInfoBytes;

  // A reduction unit is what one warp stores, or adds up over several CTA groups, at a time. Sums
  // from other groups arrive where the rings were, 16 bytes a lane.
  static constexpr int kUnitTokens = std::min(kTokens, 32);
  static constexpr int kUnits = kWarpGroups * 4 * kM64Blocks * (kTokens / kUnitTokens);
  static constexpr int kUnitBytes = kUnitTokens * 64;
  static constexpr int kMaxUnits = kRingBytes / kUnitBytes;
  static constexpr bool kCanSplitInCluster = kCtas <= 4 && (kUnits + 1) / 2 * 2 <= kMaxUnits;
  static constexpr int kAccumulators = kRows * kTokens;  // of a CTA, 32 bits each

  // Whether `parts` CTA groups of a cluster can divide K.
  static constexpr bool SplitsInto(int parts) {
    return kCanSplitInCluster && parts * kCtas <= kMaxClusterCtas &&
           (kUnits + parts - 1) / parts * parts <= kMaxUnits;
  }

  static_assert(kStageBytesX % 1024 == 0 && kStageBytesW % 1024 == 0 && kStagingBytes % 1024 == 0 &&
                kScaleBytes % 16 == 0 && kSharedBytes <= 227 * 1024);
};

}  // namespace slidejax::hopper

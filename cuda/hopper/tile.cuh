// The shapes of tiles, what a kernel is given, and how the work is dealt out to clusters.
#pragma once

#include <algorithm>

#include "hopper/ptx.cuh"

namespace slidejax::hopper {

// The largest divisor of `count` that is at most `most`.
constexpr int LargestDivisor(int count, int most) {
  while (count % most) --most;
  return most;
}

// Into how many parts the teams of a cluster can divide K.
constexpr int kClusterSplits[] = {2, 3, 4, 6, 8};

// Clusters of four do not fill a device: what they leave over, a second launch of pairs takes,
// which begins as soon as the first has, and ends after it.
enum LaunchRole { kSingle, kPrimary, kSecondary };

struct Params {
  CUtensorMap map_x, map_x_end, map_w, map_e,
      map_y;  // end: of the tokens with which M ends within a block's share
  const float* scale_x;
  const float* scale_w;
  const float* bias;
  void* y;
  float* partials;  // [split_tiles + split_clusters][cluster][rows x tokens], accumulators in
                    // register order
  // [split_tiles][cluster][warps], zero at the start: how many parts are in memory, and from bit 32
  // on the jobs that were left.
  unsigned long long* counters;
  int M, out, steps;           // steps: pairs of stages along K
  int row_tiles, token_tiles;  // of all teams; with pairs() a token tile is that of a pair
  int token_group_tiles;       // token tiles of a group: L2 can hold their X
  int wide_token_groups;       // so many groups, the first, have one more
  int whole_tiles;             // the first tiles, one cluster each
  int stream_k_tiles;  // the others, which split_clusters clusters share; with pairs() a pair of
                       // tiles each
  int stream_k_workers;
  int cluster_groups;  // teams of a launched cluster; with more than one, there are no split_tiles
  int cluster_split_tiles;      // the tiles after whole_tiles, of which the teams of a cluster each
                                // take a part of K, a tile a cluster
  int first_group, cta_groups;  // this launch's first, and all of the call's
  int role;                     // Companion
  int output;                   // HopperOutput
  int vector_stores;            // rows of y are 16-byte aligned
  int bulk_stores;              // y has a tensor map: bfloat16 and such rows

  // 1: teams 2 n and 2 n + 1 multiply the same rows with tokens of adjacent tiles; else 0.
  SJ_DEVICE int paired() const { return role != kSingle; }
};

template <bool kFp8_, int kWarpGroups_, int kM64Blocks_, int kTokens_, int kCtas_, int kStagesX_,
          int kStagesW_, bool kSparse_ = true>
struct Tile {
  static constexpr bool kFp8 = kFp8_;
  static constexpr bool kSparse =
      kSparse_;  // W is 2:4 and has metadata; else all of its columns are there
  static constexpr int kWarpGroups = kWarpGroups_;  // consumers
  static constexpr int kM64Blocks = kM64Blocks_;    // 64-row blocks of each
  static constexpr int kTokens = kTokens_;
  static constexpr int kCtas = kCtas_;
  static constexpr int kStagesX = kStagesX_;  // of X
  static constexpr int kStagesW = kStagesW_;  // of W
  static constexpr int kRows = kWarpGroups * kM64Blocks * 64;
  static constexpr int kThreads = (kWarpGroups + 1) * 128;
  // Of a thread, in the course of the kernel: no more than a block is launched with, or it waits
  // for them for ever.
  static constexpr bool kLarge = kM64Blocks * kTokens > 320;
  static constexpr int kConsumerRegisters = kLarge ? 240 : 232,
                       kProducerRegisters = kLarge ? 24 : 40;
  static_assert(kWarpGroups * kConsumerRegisters + kProducerRegisters <=
                65536 / kThreads / 8 * 8 * (kWarpGroups + 1));
  static constexpr bool kCanShareW = kCtas == 2;  // two teams can share W
  static constexpr int kTokensOfCta =
      kTokens / kCtas;  // tokens that a block copies for its cluster
  // How many times 128 columns of the product a stage of X and a copy of W have. What is copied is
  // a row of 128 bytes, whatever it holds: a row of sparse W has them for 256 columns. A stage of X
  // has as many where tiles are small.
  static constexpr int kSlicesX = kSparse && kM64Blocks == 1 && kTokens <= 64 ? 2 : 1,
                       kSlicesW = kSparse ? 2 : 1;
  static constexpr int kStageBytesX = kSlicesX * kTokens * 128;
  static constexpr int kValueBytes = kRows * 128;
  static constexpr int kMetadataBytes = kSparse ? kSlicesW * kRows * 16 : 0;
  static constexpr int kStageBytesW = kValueBytes + kMetadataBytes;
  static constexpr int kRingBytes = kStagesX * kStageBytesX + kStagesW * kStageBytesW;
  // The rings turn together: consumers keep one place for both.
  static constexpr bool kRingsInStep = kStagesX * kSlicesX == kStagesW * kSlicesW;
  // Of a warp group: slots for slabs of tokens of 64 outputs on their way to y; and twice scale_x,
  // scale_w and bias.
  static constexpr int kSlabTokens = std::min(kTokens, 32);
  static constexpr int kSlabBytes = kSlabTokens * 128;
  static constexpr int kSlabs = LargestDivisor(
      kM64Blocks * kTokens / kSlabTokens, (!kSparse || kTokens == 160 ? 8192 : 16384) / kSlabBytes);
  static constexpr int kStagingBytes = std::max(kSlabs * kSlabBytes / 4, 2048);  // of a warp
  static constexpr int kScaleBytes = kTokens * 4 + kM64Blocks * 512;
  static constexpr int kBarrierBytes = 16 * (kStagesX + kStagesW);
  static constexpr int kSharedBytes = kRingBytes +
                                      kWarpGroups * (4 * kStagingBytes + 2 * kScaleBytes) +
                                      kBarrierBytes + 16 * kStagesX;
  // What a warp stores, or adds up, alone at a time: a job. Sums of jobs from other teams arrive
  // where the rings were, 16 bytes a lane.
  static constexpr int kUnitTokens = std::min(kTokens, 32);
  static constexpr int kUnits = kWarpGroups * 4 * kM64Blocks * (kTokens / kUnitTokens);
  static constexpr int kUnitBytes = kUnitTokens * 64;
  static constexpr int kMaxUnits = kRingBytes / kUnitBytes;
  static constexpr bool kCanSplitInCluster =
      kCtas <= 4 && (kUnits + 1) / 2 * 2 <= kMaxUnits;   // into two parts
  static constexpr int kAccumulators = kRows * kTokens;  // words
  static_assert(kStageBytesX % 1024 == 0 && kStageBytesW % 1024 == 0 && kStagingBytes % 1024 == 0 &&
                kScaleBytes % 16 == 0 && kSharedBytes <= 227 * 1024);
};

// The blocks that share tokens are a team. As a rule they are a cluster; a cluster can also be
// launched of several teams.
//
// What a team does as its i-th piece of work: steps [begin, end) of a tile; none if begin == end.
// split: the tile's index among those that clusters share along K, kWhole for a tile of its own,
// kDivided for one that the teams of its cluster divide.
inline constexpr int kWholeTile = -1, kSplitInCluster = -2;
struct WorkTile {
  int row_tile, token_tile, begin, end, split;
};

// The shared steps [Share(c), Share(c + 1)) are cluster c's; owner is the inverse. Clusters that
// share tiles are teams, or pairs of teams.
SJ_DEVICE int FirstStep(const Params& p, int cluster) {
  return cluster * (p.stream_k_tiles * p.steps) / p.stream_k_workers;
}
SJ_DEVICE int WorkerOfStep(const Params& p, int step) {
  return ((step + 1) * p.stream_k_workers - 1) / (p.stream_k_tiles * p.steps);
}

// Tokens in groups of nearly the same size that L2 can hold, all rows past each group: a last group
// of few tokens would read all of W for them (4 % for one of 2 tiles behind seven of 12).
SJ_DEVICE void LocateTile(const Params& p, int tile, WorkTile& work) {
  const int member = tile & p.paired();
  tile >>= p.paired();
  const int wide = p.wide_token_groups * (p.token_group_tiles + 1), in_wide = wide * p.row_tiles;
  const bool is_wide = tile < in_wide;
  const int width = p.token_group_tiles + is_wide, per_group = width * p.row_tiles,
            from = is_wide ? 0 : wide;
  tile -= is_wide ? 0 : in_wide;
  const int group = tile / per_group, rest = tile - group * per_group;
  work.row_tile = rest / width;
  work.token_tile = ((from + group * width + rest - work.row_tile * width) << p.paired()) + member;
}

SJ_DEVICE WorkTile GetWorkTile(const Params& p, int cta_group, int cta_groups, int i) {
  WorkTile work{0, 0, 0, 0, kWholeTile};
  int tile = cta_group + i * cta_groups;
  if (tile < p.whole_tiles) {
    work.end = p.steps;
  } else if (p.cluster_groups > 1) {  // whole_tiles is a multiple of teams
    const int cluster = cta_group / p.cluster_groups, part = cta_group - cluster * p.cluster_groups;
    if (tile >= p.whole_tiles + cta_groups || cluster >= p.cluster_split_tiles) return work;
    tile = p.whole_tiles + cluster;
    work.begin = part * p.steps / p.cluster_groups;
    work.end = (part + 1) * p.steps / p.cluster_groups;
    work.split = kSplitInCluster;
  } else {
    const int cluster = cta_group >> p.paired();
    if (cluster >= p.stream_k_workers) return work;
    const int begin = FirstStep(p, cluster), end = FirstStep(p, cluster + 1);
    i -= p.whole_tiles / cta_groups;  // a multiple of teams whenever there are shared tiles
    work.split = begin / p.steps + i;
    tile = p.whole_tiles + (work.split << p.paired()) + (cta_group & p.paired());
    work.begin = max(begin - work.split * p.steps, 0);
    work.end = max(min(end - work.split * p.steps, p.steps), work.begin);
    if (work.end - work.begin == p.steps) work.split = kWholeTile;
  }
  LocateTile(p, tile, work);
  return work;
}

// A ring of buffers in shared memory, and where one is in it.
struct Ring {
  uint32_t data, full, empty;  // full[i]: buffer i has arrived; empty[i]: it has been read, in all
                               // blocks that have it in common
};
template <int kSize>
struct RingPosition {
  int stage = 0;
  uint32_t parity;

  SJ_DEVICE void Advance() {
    if (++stage == kSize) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The shared memory of a block, as addresses: the rings, slots and scales (epilogue.cuh), barriers,
// notes.
struct Shared {
  Ring x, w;  // [stage]: X [width][tokens][128 bytes]; [copy]: W [rows][128 bytes], metadata [rows
              // / 64][width][1 KB]
  uint32_t staging;
  uint32_t
      work_info;  // [stage]: first row, first token, steps and split of the work that begins there
};
template <class T>
SJ_DEVICE Shared MakeShared(uint32_t base) {
  const uint32_t staging = base + T::kRingBytes,
                 barriers = staging + T::kWarpGroups * (4 * T::kStagingBytes + 2 * T::kScaleBytes);
  const uint32_t of_w = barriers + 16 * T::kStagesX;
  return {{base, barriers, barriers + 8 * T::kStagesX},
          {base + T::kStagesX * T::kStageBytesX, of_w, of_w + 8 * T::kStagesW},
          staging,
          barriers + T::kBarrierBytes};
}

}  // namespace slidejax::hopper

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
constexpr int kParts[] = {2, 3, 4, 6, 8};

// Clusters of four do not fill a device: what they leave over, a second launch of pairs takes,
// which begins as soon as the first has, and ends after it.
enum Companion { kAlone, kFirst, kSecond };

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
  int group_tokens;            // token tiles of a group: L2 can hold their X
  int wide_groups;             // so many groups, the first, have one more
  int whole_tiles;             // the first tiles, one cluster each
  int split_tiles;  // the others, which split_clusters clusters share; with pairs() a pair of tiles
                    // each
  int split_clusters;
  int parts;          // teams of a launched cluster; with more than one, there are no split_tiles
  int divided_tiles;  // the tiles after whole_tiles, of which the teams of a cluster each take a
                      // part of K, a tile a cluster
  int first_team, teams;  // this launch's first, and all of the call's
  int companion;          // Companion
  int output;             // HopperOutput
  int vector_stores;      // rows of y are 16-byte aligned
  int bulk_stores;        // y has a tensor map: bfloat16 and such rows

  // 1: teams 2 n and 2 n + 1 multiply the same rows with tokens of adjacent tiles; else 0.
  SJ_DEVICE int pairs() const { return companion != kAlone; }
};

template <bool kFp8_, int kWarpGroups_, int kBlocks_, int kTokens_, int kCluster_, int kStages_,
          int kCopies_, bool kSparse_ = true>
struct Tile {
  static constexpr bool kFp8 = kFp8_;
  static constexpr bool kSparse =
      kSparse_;  // W is 2:4 and has metadata; else all of its columns are there
  static constexpr int kWarpGroups = kWarpGroups_;  // consumers
  static constexpr int kBlocks = kBlocks_;          // 64-row blocks of each
  static constexpr int kTokens = kTokens_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kStages = kStages_;  // of X
  static constexpr int kCopies = kCopies_;  // of W
  static constexpr int kRows = kWarpGroups * kBlocks * 64;
  static constexpr int kThreads = (kWarpGroups + 1) * 128;
  // Of a thread, in the course of the kernel: no more than a block is launched with, or it waits
  // for them for ever.
  static constexpr bool kLarge = kBlocks * kTokens > 320;
  static constexpr int kConsumerRegisters = kLarge ? 240 : 232,
                       kProducerRegisters = kLarge ? 24 : 40;
  static_assert(kWarpGroups * kConsumerRegisters + kProducerRegisters <=
                65536 / kThreads / 8 * 8 * (kWarpGroups + 1));
  static constexpr bool kAbreast = kCluster == 2;     // two teams can share W
  static constexpr int kShareX = kTokens / kCluster;  // tokens that a block copies for its cluster
  // How many times 128 columns of the product a stage of X and a copy of W have. What is copied is
  // a row of 128 bytes, whatever it holds: a row of sparse W has them for 256 columns. A stage of X
  // has as many where tiles are small.
  static constexpr int kWidthX = kSparse && kBlocks == 1 && kTokens <= 64 ? 2 : 1,
                       kWidthW = kSparse ? 2 : 1;
  static constexpr int kBytesX = kWidthX * kTokens * 128;
  static constexpr int kBytesW = kRows * 128;
  static constexpr int kBytesE = kSparse ? kWidthW * kRows * 16 : 0;
  static constexpr int kBytesCopy = kBytesW + kBytesE;
  static constexpr int kBytesRings = kStages * kBytesX + kCopies * kBytesCopy;
  // The rings turn together: consumers keep one place for both.
  static constexpr bool kTied = kStages * kWidthX == kCopies * kWidthW;
  // Of a warp group: slots for slabs of tokens of 64 outputs on their way to y; and twice scale_x,
  // scale_w and bias.
  static constexpr int kSlabTokens = std::min(kTokens, 32);
  static constexpr int kSlabBytes = kSlabTokens * 128;
  static constexpr int kSlots = LargestDivisor(
      kBlocks * kTokens / kSlabTokens, (!kSparse || kTokens == 160 ? 8192 : 16384) / kSlabBytes);
  static constexpr int kSlotBytes = std::max(kSlots * kSlabBytes / 4, 2048);  // of a warp
  static constexpr int kScaleBytes = kTokens * 4 + kBlocks * 512;
  static constexpr int kBarrierBytes = 16 * (kStages + kCopies);
  static constexpr int kShared =
      kBytesRings + kWarpGroups * (4 * kSlotBytes + 2 * kScaleBytes) + kBarrierBytes + 16 * kStages;
  // What a warp stores, or adds up, alone at a time: a job. Sums of jobs from other teams arrive
  // where the rings were, 16 bytes a lane.
  static constexpr int kJobTokens = std::min(kTokens, 32);
  static constexpr int kJobs = kWarpGroups * 4 * kBlocks * (kTokens / kJobTokens);
  static constexpr int kPartBytes = kJobTokens * 64;
  static constexpr int kMostJobs = kBytesRings / kPartBytes;
  static constexpr bool kDivides =
      kCluster <= 4 && (kJobs + 1) / 2 * 2 <= kMostJobs;  // into two parts
  static constexpr int kPartial = kRows * kTokens;        // words
  static_assert(kBytesX % 1024 == 0 && kBytesCopy % 1024 == 0 && kSlotBytes % 1024 == 0 &&
                kScaleBytes % 16 == 0 && kShared <= 227 * 1024);
};

// The blocks that share tokens are a team. As a rule they are a cluster; a cluster can also be
// launched of several teams.
//
// What a team does as its i-th piece of work: steps [begin, end) of a tile; none if begin == end.
// split: the tile's index among those that clusters share along K, kWhole for a tile of its own,
// kDivided for one that the teams of its cluster divide.
inline constexpr int kWhole = -1, kDivided = -2;
struct Work {
  int row_tile, token_tile, begin, end, split;
};

// The shared steps [Share(c), Share(c + 1)) are cluster c's; owner is the inverse. Clusters that
// share tiles are teams, or pairs of teams.
SJ_DEVICE int Share(const Params& p, int cluster) {
  return cluster * (p.split_tiles * p.steps) / p.split_clusters;
}
SJ_DEVICE int Owner(const Params& p, int step) {
  return ((step + 1) * p.split_clusters - 1) / (p.split_tiles * p.steps);
}

// Tokens in groups of nearly the same size that L2 can hold, all rows past each group: a last group
// of few tokens would read all of W for them (4 % for one of 2 tiles behind seven of 12).
SJ_DEVICE void Locate(const Params& p, int tile, Work& work) {
  const int member = tile & p.pairs();
  tile >>= p.pairs();
  const int wide = p.wide_groups * (p.group_tokens + 1), in_wide = wide * p.row_tiles;
  const bool is_wide = tile < in_wide;
  const int width = p.group_tokens + is_wide, per_group = width * p.row_tiles,
            from = is_wide ? 0 : wide;
  tile -= is_wide ? 0 : in_wide;
  const int group = tile / per_group, rest = tile - group * per_group;
  work.row_tile = rest / width;
  work.token_tile = ((from + group * width + rest - work.row_tile * width) << p.pairs()) + member;
}

SJ_DEVICE Work FindWork(const Params& p, int team, int teams, int i) {
  Work work{0, 0, 0, 0, kWhole};
  int tile = team + i * teams;
  if (tile < p.whole_tiles) {
    work.end = p.steps;
  } else if (p.parts > 1) {  // whole_tiles is a multiple of teams
    const int cluster = team / p.parts, part = team - cluster * p.parts;
    if (tile >= p.whole_tiles + teams || cluster >= p.divided_tiles) return work;
    tile = p.whole_tiles + cluster;
    work.begin = part * p.steps / p.parts;
    work.end = (part + 1) * p.steps / p.parts;
    work.split = kDivided;
  } else {
    const int cluster = team >> p.pairs();
    if (cluster >= p.split_clusters) return work;
    const int begin = Share(p, cluster), end = Share(p, cluster + 1);
    i -= p.whole_tiles / teams;  // a multiple of teams whenever there are shared tiles
    work.split = begin / p.steps + i;
    tile = p.whole_tiles + (work.split << p.pairs()) + (team & p.pairs());
    work.begin = max(begin - work.split * p.steps, 0);
    work.end = max(min(end - work.split * p.steps, p.steps), work.begin);
    if (work.end - work.begin == p.steps) work.split = kWhole;
  }
  Locate(p, tile, work);
  return work;
}

// A ring of buffers in shared memory, and where one is in it.
struct Ring {
  uint32_t data, full, empty;  // full[i]: buffer i has arrived; empty[i]: it has been read, in all
                               // blocks that have it in common
};
template <int kSize>
struct Position {
  int at = 0;
  uint32_t parity;

  SJ_DEVICE void Advance() {
    if (++at == kSize) {
      at = 0;
      parity ^= 1;
    }
  }
};

// The shared memory of a block, as addresses: the rings, slots and scales (epilogue.cuh), barriers,
// notes.
struct Shared {
  Ring x, w;  // [stage]: X [width][tokens][128 bytes]; [copy]: W [rows][128 bytes], metadata [rows
              // / 64][width][1 KB]
  uint32_t slots;
  uint32_t notes;  // [stage]: first row, first token, steps and split of the work that begins there
};
template <class T>
SJ_DEVICE Shared MakeShared(uint32_t base) {
  const uint32_t slots = base + T::kBytesRings,
                 barriers = slots + T::kWarpGroups * (4 * T::kSlotBytes + 2 * T::kScaleBytes);
  const uint32_t of_w = barriers + 16 * T::kStages;
  return {{base, barriers, barriers + 8 * T::kStages},
          {base + T::kStages * T::kBytesX, of_w, of_w + 8 * T::kCopies},
          slots,
          barriers + T::kBarrierBytes};
}

}  // namespace slidejax::hopper

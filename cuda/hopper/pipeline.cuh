// The rings of X and W in shared memory, and the warps that fill them.
#pragma once

#include "hopper/expand.cuh"

namespace slidejax::hopper {

// A ring of stages in shared memory, as addresses. Barrier full[i]: stage i has arrived. Barrier
// empty[i]: all CTAs that receive it have read it.
struct Ring {
  uint32_t data, full, empty;
};
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity;  // of the barriers, which changes with each turn of the ring

  SJ_DEVICE void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The shared memory of a CTA, as addresses.
struct Shared {
  Ring x;            // [stage][slice][tokens][128 bytes]
  Ring w;            // [stage]: values [rows][128 bytes], metadata [rows / 64][slice][1 KB]
  uint32_t staging;  // results on their way to y, then scales (epilogue.cuh)
  // Barriers: the zeros of a stage of w have arrived where its metadata will be (expand.cuh).
  uint32_t zeros;
  // [stage of x]: first row, first token, steps and split of the work tile that begins there.
  uint32_t work_info;
};
template <class T>
SJ_DEVICE Shared MakeShared(uint32_t base) {
  const uint32_t staging = base + T::kRingBytes;
  const uint32_t barriers = staging + T::kWarpGroups * (4 * T::kStagingBytes + 2 * T::kScaleBytes);
  const uint32_t barriers_w = barriers + 16 * T::kStagesX;
  return {{base, barriers, barriers + 8 * T::kStagesX},
          {base + T::kStagesX * T::kStageBytesX, barriers_w, barriers_w + 8 * T::kStagesW},
          staging,
          barriers + T::kRingBarrierBytes,
          barriers + T::kBarrierBytes};
}

// The place of a CTA in its cluster and in its CTA group (`rank`), and the place of that group in
// the cluster and in the call.
struct CtaPlace {
  uint32_t in_cluster, rank;
  int group_in_cluster, cta_group, cta_groups;
};

// A stage of groups of eight begins 0, 1 or 2 windows within a group, which is the phase. It stands
// above the number of steps in a work tile's description.
inline constexpr int kPhaseShift = 28;

// Copies the X of a CTA group's work tiles, stage after stage. The first stage of each work tile
// carries the tile's description, so that consumers need no division.
template <class T>
SJ_DEVICE void LoadActivations(const Params& p, const Shared& shared, const CtaPlace& place) {
  if (p.role != kSecondary) GridWait();
  if (p.role == kPrimary) GridRelease();
  const int rank = static_cast<int>(place.rank), share = rank * T::kTokensOfCta;
  const uint16_t group_mask = ((1 << T::kCtas) - 1) << (place.in_cluster - place.rank);
  RingPosition<T::kStagesX> to{0, 1};  // the first turn of the ring waits for nothing
  for (int i = 0;; ++i) {
    const WorkTile work = GetWorkTile(p, place.cta_group, place.cta_groups, i);
    const int row = (work.row_tile * T::kCtas + rank) * T::kRows;
    const int token = work.token_tile * T::kTokens;
    // Tokens beyond M are not copied, because copying zeros in their place would take three times
    // as long as copying data. The instructions multiply whatever lies there, and its products are
    // never stored.
    const int inside = min(max(p.M - token, 0), T::kTokens);
    const int mine = min(max(inside - share, 0), T::kTokensOfCta);
    BarrierWait(shared.x.empty + 8 * to.stage, to.parity);
    int steps = work.end - work.begin;
    if constexpr (T::kHoldsZeros) steps |= work.begin % 3 << kPhaseShift;
    StoreShared4(shared.work_info + 16 * to.stage, row, token, steps, work.split);
    if (work.begin == work.end) {  // no more work, which consumers see by 0 steps
      BarrierArrive(shared.x.full + 8 * to.stage);
      return;
    }
#pragma unroll 1
    for (int k = 2 * work.begin; k < 2 * work.end; k += T::kSlicesX) {
      const uint32_t full = shared.x.full + 8 * to.stage;
      const uint32_t stage = shared.x.data + to.stage * T::kStageBytesX;
      BarrierWait(shared.x.empty + 8 * to.stage, to.parity);
      BarrierExpect(full, T::kSlicesX * inside * 128);
      if (mine > 0) {
        const CUtensorMap* const map = mine == T::kTokensOfCta ? &p.map_x : &p.map_x_end;
        if constexpr (T::kCtas == 1) {
#pragma unroll
          for (int slice = 0; slice < T::kSlicesX; ++slice) {
            TmaLoad2d(stage + slice * (T::kTokens * 128), map, (k + slice) * 128, token, full,
                      kEvictLast);
          }
        } else {
          TmaLoad2dMulticast(stage + share * 128, map, k * 128, token + share, full, group_mask,
                             kEvictLast);
        }
      }
      to.Advance();
    }
  }
}

// Copies the W of a CTA group's work tiles, and its metadata or its zeros. It waits for nothing but
// room, and for metadata that the launch before makes: W is under way before the activations exist.
// kSharesW: the other CTA group of the cluster multiplies the same rows, and each of the two copies
// half of the values to both. One lane issues the bulk copies. The whole warp copies zeros.
template <class T, bool kSharesW>
SJ_DEVICE void LoadWeights(const Params& p, const Shared& shared, const CtaPlace& place, int lane) {
  // W stays in L2 when more than one token group passes over it.
  const uint64_t policy = p.token_tiles == p.token_group_tiles ? kEvictFirst : kEvictNormal;
  const int half = static_cast<int>(place.in_cluster / T::kCtas);
  const uint16_t pair_mask = (1 | 1 << T::kCtas) << place.rank;
  const bool copies_metadata = T::kSparse && !ExpandsZeros<T>(p);
  if (p.after_metadata && p.role != kSecondary) GridWait();
  RingPosition<T::kStagesW> to{0, 1};
  for (int i = 0;; ++i) {
    const WorkTile work = GetWorkTile(p, place.cta_group, place.cta_groups, i);
    if (work.begin == work.end) return;
    const int row = (work.row_tile * T::kCtas + static_cast<int>(place.rank)) * T::kRows;
#pragma unroll 1
    for (int k = 2 / T::kSlicesW * work.begin; k < 2 / T::kSlicesW * work.end; ++k) {
      const uint32_t full = shared.w.full + 8 * to.stage;
      const uint32_t values = shared.w.data + to.stage * T::kStageBytesW;
      const uint32_t metadata = values + T::kValueBytes;
      // A tensor copy begins at a multiple of 16 bytes (else: illegal instruction). The first zero
      // of the stage lies 0, 5 or 10 bytes behind (kernel.cuh LoadZeros), the last one within 32.
      [[maybe_unused]] const int zeros_from = (k * kStageWindows / 3) & ~15;
      BarrierWait(shared.w.empty + 8 * to.stage, to.parity);
      if (lane == 0) {
        BarrierExpect(full, copies_metadata ? T::kStageBytesW : T::kValueBytes);
        if constexpr (kSharesW) {
          TmaLoad2dMulticast(values + half * (T::kValueBytes / 2), &p.map_w, k * 128,
                             row + half * (T::kRows / 2), full, pair_mask, policy);
          if constexpr (T::kHoldsZeros) {
            TmaLoad2dMulticast(metadata + half * (T::kMetadataBytes / 2), &p.map_e, zeros_from,
                               row + half * (T::kRows / 2), full, pair_mask, policy);
          } else if (copies_metadata) {
            TmaLoad3dMulticast(metadata + half * (T::kMetadataBytes / 2), &p.map_e, 0,
                               k * T::kSlicesW, row / 64 + half * (T::kRows / 128), full, pair_mask,
                               policy);
          }
        } else {
          TmaLoad2d(values, &p.map_w, k * 128, row, full, policy);
          if constexpr (T::kHoldsZeros) {
            TmaLoad2d(metadata, &p.map_e, zeros_from, row, full, policy);
          } else if (copies_metadata) {
            TmaLoad3d(metadata, &p.map_e, 0, k * T::kSlicesW, row / 64, full, policy);
          }
        }
      }
      if (ExpandsZeros<T>(p)) {
        const StageGroups groups(k, p.windows, p.windows_reciprocal);
        CopyZeros<T>(p, metadata, groups, row, lane);
        CopyAsyncArrive(shared.zeros + 8 * to.stage);
      }
      to.Advance();
    }
  }
}

// Makes the metadata of a CTA group's work tiles, stage after stage. Where a stage has half as many
// rows as there are expanders, they make two stages at a time. `thread`: of the expanders.
template <class T>
SJ_DEVICE void ExpandMetadata(const Params& p, const Shared& shared, const CtaPlace& place,
                              int thread) {
  constexpr int kTurns = kExpanders / T::kRows;
  static_assert(kTurns * T::kRows == kExpanders);
  const int row = thread % T::kRows;
  int turn = thread / T::kRows;  // stages until this thread's next one
  RingPosition<T::kStagesW> at{0, 0};
  for (int i = 0;; ++i) {
    const WorkTile work = GetWorkTile(p, place.cta_group, place.cta_groups, i);
    if (work.begin == work.end) return;
#pragma unroll 1
    for (int stage = work.begin; stage < work.end; ++stage, at.Advance()) {
      if (turn-- > 0) continue;
      turn = kTurns - 1;
      const uint32_t metadata = shared.w.data + at.stage * T::kStageBytesW + T::kValueBytes;
      const StageGroups groups(stage, p.windows, p.windows_reciprocal);
      const int legal = WordsFrom(stage, p.groups, p.windows);
      BarrierWait(shared.zeros + 8 * at.stage, at.parity);
      ExpandRow(metadata + MetadataRowOfStage<T>(row), groups, p.windows, legal);
      __syncwarp();
      if (thread % 32 == 0) BarrierArrive(shared.w.full + 8 * at.stage);
    }
  }
}

}  // namespace slidejax::hopper

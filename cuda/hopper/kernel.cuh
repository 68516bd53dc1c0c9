// The GEMM kernel: a persistent grid of clusters, in each thread block two consumer warp groups
// that issue wgmma.sp and write y, and two producer threads that issue bulk copies, of X and of W.
//
// The sparse operand of wgmma must be A, so a block computes D = W' X^T: rows of D are outputs,
// columns are tokens. X [tokens][128 bytes] comes in stages of 128 lifted columns, in small tiles
// of 256; W [rows][128 bytes] and its metadata [rows / 64][2][1 KB] in copies of 256. The same
// kernel multiplies dense weights: both have 128 columns as they are, and there is no metadata.
// Work is counted in steps of 256 columns: the metadata registers alternate, and ptxas follows
// wgmma's asynchronous use of them only through a loop without other exits.
#pragma once

#include <type_traits>

#include "hopper/epilogue.cuh"
#include "hopper/tile.cuh"
#include "hopper/wgmma.cuh"

namespace slidejax::hopper {

// A block's place in its cluster: `rank` in its team, which is number `part` there and number
// `team` of `teams` in all.
struct CtaPlace {
  uint32_t in_cluster, rank;
  int group_in_cluster, cta_group, cta_groups;
};

// Copies the X of a team's work, stage after stage; with the first of each piece goes a note of
// what it is.
template <class T>
SJ_DEVICE void LoadActivations(const Params& p, const Shared& shared, const CtaPlace& place) {
  if (p.role != kSecondary) GridWait();
  const int rank = static_cast<int>(place.rank), share = rank * T::kTokensOfCta;
  const uint16_t group_mask = ((1 << T::kCtas) - 1) << (place.in_cluster - place.rank);
  RingPosition<T::kStagesX> to{0, 1};  // the first turn of the ring waits for nothing
  for (int i = 0;; ++i) {
    const WorkTile work = GetWorkTile(p, place.cta_group, place.cta_groups, i);
    const int row = (work.row_tile * T::kCtas + rank) * T::kRows,
              token = work.token_tile * T::kTokens;
    // Tokens beyond M are left out: zeros in their place would take three times as long to arrive
    // as data do. What is multiplied instead is whatever lies there, and goes no further.
    const int inside = min(max(p.M - token, 0), T::kTokens),
              mine = min(max(inside - share, 0), T::kTokensOfCta);
    BarrierWait(shared.x.empty + 8 * to.stage, to.parity);
    StoreShared4(shared.work_info + 16 * to.stage, row, token, work.end - work.begin, work.split);
    if (work.begin == work.end) {  // the last note: no more work
      BarrierArrive(shared.x.full + 8 * to.stage);
      return;
    }
#pragma unroll 1
    for (int k = 2 * work.begin; k < 2 * work.end; k += T::kSlicesX) {
      const uint32_t bar = shared.x.full + 8 * to.stage,
                     dst = shared.x.data + to.stage * T::kStageBytesX;
      BarrierWait(shared.x.empty + 8 * to.stage, to.parity);
      BarrierExpect(bar, T::kSlicesX * inside * 128);
      if (mine > 0) {
        const CUtensorMap* const map = mine == T::kTokensOfCta ? &p.map_x : &p.map_x_end;
        if constexpr (T::kCtas == 1) {
#pragma unroll
          for (int h = 0; h < T::kSlicesX; ++h)
            TmaLoad2d(dst + h * (T::kTokens * 128), map, (k + h) * 128, token, bar, kEvictLast);
        } else {
          TmaLoad2dMulticast(dst + share * 128, map, k * 128, token + share, bar, group_mask,
                             kEvictLast);
        }
      }
      to.Advance();
    }
  }
}

// Copies the W of a team's work, and its metadata: weights are there before the activations are.
// kSharesW: the other team of the cluster multiplies the same rows, of which each copies half to
// both.
template <class T, bool kSharesW>
SJ_DEVICE void LoadWeights(const Params& p, const Shared& shared, const CtaPlace& place) {
  // W stays in L2 when more than one group of tokens passes over it.
  const uint64_t policy = p.token_tiles == p.token_group_tiles ? kEvictFirst : kEvictNormal;
  const int part = static_cast<int>(place.in_cluster / T::kCtas);
  const uint16_t pair_mask = (1 | 1 << T::kCtas) << place.rank;
  RingPosition<T::kStagesW> to{0, 1};
  for (int i = 0;; ++i) {
    const WorkTile work = GetWorkTile(p, place.cta_group, place.cta_groups, i);
    if (work.begin == work.end) return;
    const int row = (work.row_tile * T::kCtas + static_cast<int>(place.rank)) * T::kRows;
#pragma unroll 1
    for (int k = 2 / T::kSlicesW * work.begin; k < 2 / T::kSlicesW * work.end; ++k) {
      const uint32_t bar = shared.w.full + 8 * to.stage,
                     dst = shared.w.data + to.stage * T::kStageBytesW;
      BarrierWait(shared.w.empty + 8 * to.stage, to.parity);
      BarrierExpect(bar, T::kStageBytesW);
      if constexpr (kSharesW) {
        TmaLoad2dMulticast(dst + part * (T::kValueBytes / 2), &p.map_w, k * 128,
                           row + part * (T::kRows / 2), bar, pair_mask, policy);
        if constexpr (T::kSparse)
          TmaLoad3dMulticast(dst + T::kValueBytes + part * (T::kMetadataBytes / 2), &p.map_e, 0,
                             k * T::kSlicesW, row / 64 + part * (T::kRows / 128), bar, pair_mask,
                             policy);
      } else {
        TmaLoad2d(dst, &p.map_w, k * 128, row, bar, policy);
        if constexpr (T::kSparse)
          TmaLoad3d(dst + T::kValueBytes, &p.map_e, 0, k * T::kSlicesW, row / 64, bar, policy);
      }
      to.Advance();
    }
  }
}

template <class T>
SJ_DEVICE void Consume(const Params& p, const Shared& shared, const CtaPlace& place) {
  using Instruction = Wgmma<T::kFp8, T::kTokens>;
  using A = typename Instruction::Accumulator;
  const int thread = threadIdx.x & 127;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0), group = warp >> 2;
  RingPosition<T::kStagesX> x{0, 0};
  RingPosition<T::kStagesW> w{0, 0};
  auto copy = [&] { return T::kRingsInStep ? x.stage * T::kSlicesX / T::kSlicesW : w.stage; };

  // One thread for each block that wrote into this one: of X those of the team, whose places differ
  // in their last bits; of W, where it is shared, besides this one that of the same rank in the
  // other team.
  auto release_x = [&](int stage) {
    if constexpr (T::kCtas == 1) {
      if (thread == 0) BarrierArrive(shared.x.empty + 8 * stage);
    } else {
      if (thread < T::kCtas) BarrierArriveAt(shared.x.empty + 8 * stage, place.in_cluster ^ thread);
    }
  };
  auto release_w = [&](int copy) {
    if (thread == 32) BarrierArrive(shared.w.empty + 8 * copy);
    if (T::kCanShareW && thread == 33 && p.role == kPrimary)
      BarrierArriveAt(shared.w.empty + 8 * copy, place.in_cluster ^ T::kCtas);
  };

  auto load_metadata = [&](uint32_t (&meta)[T::kM64Blocks][2], uint32_t from, int half) {
    if constexpr (!T::kSparse) return;
    const uint32_t m =
        from + T::kValueBytes + (group * T::kM64Blocks * T::kSlicesW + half) * 1024 + thread * 8;
#pragma unroll
    for (int b = 0; b < T::kM64Blocks; ++b) {
      const uint2 v = LoadShared2(m + b * T::kSlicesW * 1024);
      meta[b][0] = v.x;
      meta[b][1] = v.y;
    }
  };
  // The k-th instruction of 128 columns for block b: 64 columns, 32 of a dense weight. from_w:
  // those columns in the first row of W.
  constexpr int kInstructions = T::kSparse ? 2 : 4;
  auto multiply = [&](A(&sums)[T::kTokens / 2], uint32_t from_x, uint32_t from_w, int b, int k,
                      const uint32_t (&meta)[2], int add) {
    const uint64_t rows =
        Descriptor<128>(from_w + (group * T::kM64Blocks + b) * (64 * 128) + 32 * k);
    if constexpr (T::kSparse) {
      Instruction::Mma(sums, rows, Descriptor<128>(from_x + 64 * k), meta[k], add);
    } else {
      Instruction::Dense(sums, rows, Descriptor<128>(from_x + 32 * k), add);
    }
  };

  uint32_t inherited = 0;  // sums that other clusters have left to this warp
  int set = 0;             // which scales: those of the tile before may still be in use
  for (bool start = true;; start = false, set ^= 1) {
    BarrierWait(shared.x.full + 8 * x.stage, x.parity);
    const int4 info = LoadShared4I(shared.work_info + 16 * x.stage);
    const int steps = __shfl_sync(~0u, info.z, 0), split = __shfl_sync(~0u, info.w, 0);
    const int row = __shfl_sync(~0u, info.x, 0) + group * T::kM64Blocks * 64,
              token = __shfl_sync(~0u, info.y, 0);
    if (steps == 0) break;
    A d[T::kM64Blocks]
       [T::kTokens / 2];  // in here: carried from tile to tile it would have to be moved about
    uint32_t e[2][T::kM64Blocks][2];  // metadata of two stages: running instructions read one while
                                      // the other is loaded

    // Once, at the start, the second warp group lets the first one get ahead: from then on the
    // epilogue of one runs while the instructions of the other keep the tensor cores busy.
    if (start && group == 1) NamedSync(8, 256);
    // Waits for the 128 columns that are number kIndex of a step, and loads their metadata.
    struct Columns {
      uint32_t x, w;
    };
    auto arrive = [&](uint32_t (&meta)[T::kM64Blocks][2], auto index, auto first) {
      constexpr int kIndex = decltype(index)::value, kSliceX = kIndex % T::kSlicesX,
                    kSliceW = kIndex % T::kSlicesW;
      if (!decltype(first)::value && kSliceX == 0)
        BarrierWait(shared.x.full + 8 * x.stage, x.parity);
      if (kSliceW == 0)
        BarrierWait(shared.w.full + 8 * copy(), T::kRingsInStep ? x.parity : w.parity);
      const uint32_t from_w = shared.w.data + copy() * T::kStageBytesW;
      load_metadata(meta, from_w, kSliceW);
      return Columns{shared.x.data + x.stage * T::kStageBytesX + kSliceX * (T::kTokens * 128),
                     from_w + 64 * kSliceW};
    };
    int previous_x = 0, previous_w = 0;
    // Goes on to the next columns.
    auto advance = [&](auto index) {
      constexpr int kIndex = decltype(index)::value;
      if (kIndex % T::kSlicesW == T::kSlicesW - 1) {
        previous_w = copy();
        if (!T::kRingsInStep) w.Advance();
      }
      if (kIndex % T::kSlicesX == T::kSlicesX - 1) {
        previous_x = x.stage;
        x.Advance();
      }
    };
    // 128 columns.
    auto column_step = [&](uint32_t (&meta)[T::kM64Blocks][2], auto index, auto first) {
      constexpr int kIndex = decltype(index)::value;
      constexpr bool kFirst = decltype(first)::value;
      const Columns at = arrive(meta, index, first);
      WgmmaFence();
#pragma unroll
      for (int k = 0; k < kInstructions; ++k)
#pragma unroll
        for (int b = 0; b < T::kM64Blocks; ++b)
          multiply(d[b], at.x, at.w, b, k, meta[b], kFirst && k == 0 ? 0 : 1);
      WgmmaCommit();
      WgmmaWait<1>();  // the columns before these are done with
      if (!kFirst && kIndex % T::kSlicesX == 0) release_x(previous_x);
      if (!kFirst && kIndex % T::kSlicesW == 0) release_w(previous_w);
      advance(index);
    };
    constexpr std::integral_constant<int, 0> kEven{};
    constexpr std::integral_constant<int, 1> kOdd{};
    column_step(e[0], kEven, std::true_type());
    if (start && group == 0) NamedArrive(8, 256);
    if (split < 0) PrefetchScales<T>(p, ScalesOf<T>(shared, group, set), row, token);
    column_step(e[1], kOdd, std::false_type());
    // With two blocks, a tile's last step is left for below.
    constexpr bool kTail = T::kM64Blocks == 2;
    const int plain = kTail && split == kWholeTile ? steps - 1 : steps;
#pragma unroll 1
    for (int k = 1; k < plain; ++k) {
      column_step(e[0], kEven, std::false_type());
      column_step(e[1], kOdd, std::false_type());
    }
    if (!kTail || split != kWholeTile) {
      WgmmaWait<0>();
      release_x(previous_x);
      release_w(previous_w);
#pragma unroll
      for (int b = 0; b < T::kM64Blocks; ++b) Pin(d[b]);
      if (T::kCanSplitInCluster && split == kSplitInCluster) {
        ClusterSync();  // nobody needs the rings any more
        SendPartials<T>(p, d, shared, place.rank, place.group_in_cluster, warp);
        CopyAsyncWait();
        if (thread == 0) BulkWaitRead<0>();
        ClusterSync();  // all sums and scales are there, and the slots are free
        ReduceInbox<T>(p, shared, place.group_in_cluster, warp, set, row, token);
      } else if (split >= 0) {
        const Worker me = WorkerOf<T>(p, place.cta_group, place.rank);
        inherited |= StorePartial<T>(p, d, split, me, warp)
                     << (split == FirstStep(p, me.index) / p.steps ? 0 : 16);
      } else {
        CopyAsyncWait();
        if (T::kSlabs == 1 && thread == 0) BulkWaitRead<0>();
        NamedSync(1 + group, 128);
        if constexpr (!kTail) StoreBlock<T, 0>(p, d[0], shared, warp, set, row, token);
      }
    } else if constexpr (kTail) {
      // The last step: all of its columns for the first block, then all for the second, under which
      // the first is stored.
      static_assert(T::kSlicesX == 1);
      const int before_x = previous_x, before_w = previous_w;
      const Columns even = arrive(e[0], kEven, std::false_type());
      advance(kEven);
      const int even_x = previous_x, even_w = previous_w;
      const Columns odd = arrive(e[1], kOdd, std::false_type());
      advance(kOdd);
      auto block_step = [&](int b) {
#pragma unroll
        for (int k = 0; k < kInstructions; ++k) multiply(d[b], even.x, even.w, b, k, e[0][b], 1);
#pragma unroll
        for (int k = 0; k < kInstructions; ++k) multiply(d[b], odd.x, odd.w, b, k, e[1][b], 1);
        WgmmaCommit();
      };
      WgmmaFence();
      block_step(0);
      WgmmaWait<1>();
      release_x(before_x);
      release_w(before_w);
      block_step(1);
      CopyAsyncWait();
      NamedSync(1 + group,
                128);  // the scales are there, and all have read those of the tile before
      WgmmaWait<1>();
      Pin(d[0]);
      StoreBlock<T, 0>(p, d[0], shared, warp, set, row, token);
      WgmmaWait<0>();
      Pin(d[1]);
      release_x(even_x);
      release_x(previous_x);
      if (T::kSlicesW == 1) release_w(even_w);
      release_w(previous_w);
      StoreBlock<T, 1>(p, d[1], shared, warp, set, row, token);
    }
  }
  if (const Worker me = WorkerOf<T>(p, place.cta_group, place.rank); me.index < p.stream_k_workers)
    FixUp<T>(p, shared, me, warp, inherited);
  if (thread == 0) BulkWaitRead<0>();  // shared memory must outlive the stores from it
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    SparseMatmulKernel(const __grid_constant__ Params p) {
  SJ_DYNAMIC_SHARED(dynamic);
  const Shared shared = MakeShared<T>(SharedAddress(dynamic));
  const uint32_t in_cluster = T::kCtas > 1 || T::kCanSplitInCluster ? ClusterRank() : 0;
  const CtaPlace place{
      in_cluster, in_cluster % T::kCtas,
      T::kCanSplitInCluster || T::kCanShareW ? static_cast<int>(in_cluster / T::kCtas) : 0,
      p.first_group + static_cast<int>(blockIdx.x / T::kCtas), p.cta_groups};

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStagesX; ++i) {
      BarrierInit(shared.x.full + 8 * i, 1);
      BarrierInit(shared.x.empty + 8 * i, T::kWarpGroups * T::kCtas);
    }
    for (int i = 0; i < T::kStagesW; ++i) {
      BarrierInit(shared.w.full + 8 * i, 1);
      BarrierInit(shared.w.empty + 8 * i, T::kWarpGroups * (p.role == kPrimary ? 2 : 1));
    }
    FenceBarrierInit();
    PrefetchMap(&p.map_x);
    if (p.M % T::kTokensOfCta != 0) PrefetchMap(&p.map_x_end);
    PrefetchMap(&p.map_w);
    if constexpr (T::kSparse) PrefetchMap(&p.map_e);
  }
  __syncthreads();
  if constexpr (T::kCtas > 1) ClusterSync();

  if (threadIdx.x >= T::kWarpGroups * 128) {
    RegistersDecrease<T::kProducerRegisters>();
    if (threadIdx.x == T::kWarpGroups * 128) {
      if (p.role == kPrimary) GridRelease();
      LoadActivations<T>(p, shared, place);
    } else if (threadIdx.x == T::kWarpGroups * 128 + 32) {
      if (T::kCanShareW && p.role == kPrimary) {
        LoadWeights<T, true>(p, shared, place);
      } else {
        LoadWeights<T, false>(p, shared, place);
      }
    }
    __syncwarp();
    if (T::kCanSplitInCluster && p.cluster_groups > 1 &&
        place.cta_group / p.cluster_groups <
            p.cluster_split_tiles) {  // with the consumers, when they hand over their sums
      ClusterSync();
      ClusterSync();
    }
  } else {
    RegistersIncrease<T::kConsumerRegisters>();
    if (p.role != kSecondary) GridWait();
    Consume<T>(p, shared, place);
  }
  __syncwarp();
  // A block may not leave while its neighbour still writes into its shared memory or arrives at its
  // barriers.
  if constexpr (T::kCtas > 1) ClusterSync();
  if (p.role == kSecondary) GridWait();  // whoever waits for this launch waits for both
}

}  // namespace slidejax::hopper

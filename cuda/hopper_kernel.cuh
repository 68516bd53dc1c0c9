// The GEMM kernel: a persistent grid of clusters, in each thread block two consumer warp groups that issue wgmma.sp and write y,
// and one producer thread that issues bulk copies.
//
// The sparse operand of wgmma must be A, so a block computes D = W' X^T: rows of D are outputs, columns are tokens.
// A stage of the pipeline is 128 lifted columns: X [tokens][128 bytes], W [rows][64 bytes], metadata [rows / 64][1 KB]; or both halves of 256:
// X [2][tokens][128 bytes], W [rows][128 bytes], metadata [rows / 64][2][1 KB]. The same kernel
// multiplies dense weights: 128 columns as they are, W [rows][128 bytes], no metadata.
// Work is counted in steps of 256 columns: the metadata registers alternate, and ptxas follows wgmma's asynchronous use of
// them only through a loop without other exits.
#pragma once

#include <type_traits>

#include "hopper_epilogue.cuh"
#include "hopper_tile.cuh"
#include "hopper_wgmma.cuh"

namespace slidejax::hopper {

// A block's place in its cluster: `rank` in its team, which is number `part` there and number `team` of `teams` in all.
struct Place {
  uint32_t in_cluster, rank;
  int part, team, teams;
};

// Copies a team's work, stage after stage. With the first stage of each piece of work goes a note of what it is.
// kShared: the other team of the cluster multiplies the same rows of W, of which each copies half to both.
template <class T, bool kShared>
SJ_DEVICE void produce(const Params& p, const Shared& shared, const Place& place) {
  const int rank = static_cast<int>(place.rank);
  // X stays for the next row tiles. W does too when more than one group of tokens passes over it.
  const uint64_t policy_w = p.token_tiles == p.group_tokens ? kEvictFirst : kEvictNormal;
  auto load_weights = [&](int to, int k, int row) {  // and says what stage `to` waits for
    const uint32_t bar = shared.full + 8 * to, dst = shared.stages + to * T::kBytes;
    barrier_expect(bar, T::kBytes);
    if constexpr (kShared) {
      const uint32_t here = cluster_rank(), part = here / T::kCluster;  // read again: the producer has few registers
      const uint16_t both = (1 | 1 << T::kCluster) << here % T::kCluster;
      tma_load_2d_multicast(dst + T::kBytesX + part * (T::kBytesW / 2), &p.map_w, k * T::kColumnsW, row + part * (T::kRows / 2), bar, both,
                            policy_w);
      if constexpr (T::kSparse)
        tma_load_3d_multicast(dst + T::kBytesX + T::kBytesW + part * (T::kBytesE / 2), &p.map_e, 0, k * T::kHalves,
                              row / 64 + part * (T::kRows / 128), bar, both, policy_w);
    } else {
      tma_load_2d(dst + T::kBytesX, &p.map_w, k * T::kColumnsW, row, bar, policy_w);
      if constexpr (T::kSparse) tma_load_3d(dst + T::kBytesX + T::kBytesW, &p.map_e, 0, k * T::kHalves, row / 64, bar, policy_w);
    }
  };
  auto load_activations = [&](int to, int k, int token) {
    const uint32_t bar = shared.full + 8 * to, dst = shared.stages + to * T::kBytes;
    if constexpr (T::kCluster == 1) {
#pragma unroll
      for (int h = 0; h < T::kHalves; ++h)
        tma_load_2d(dst + h * (T::kTokens * 128), &p.map_x, (k * T::kHalves + h) * 128, token, bar, kEvictLast);
    } else {
      const uint32_t here = kShared ? cluster_rank() : place.in_cluster, share = here % T::kCluster * T::kShareX;
      const uint16_t team = ((1 << T::kCluster) - 1) << here / T::kCluster * T::kCluster;
      tma_load_2d_multicast(dst + share * 128, &p.map_x, k * 128, token + share, bar, team, kEvictLast);
    }
  };
  int early = 0;  // stages whose weights are on their way before the activations are there
  if (!kShared && T::kEarly && p.dependent) {
    const Work work = find_work(p, place.team, place.teams, 0);
    const int row = (work.row_tile * T::kCluster + rank) * T::kRows;
    early = min(T::kStages, T::kStagesOfStep * (work.end - work.begin));
#pragma unroll 1
    for (int i = 0; i < early; ++i) load_weights(i, T::kStagesOfStep * work.begin + i, row);
  }
  if (p.companion != kSecond) grid_wait();
  int stage = 0;
  uint32_t parity = 1;  // the first pass over the stages waits for nothing
  for (int i = 0;; ++i) {
    const Work work = find_work(p, place.team, place.teams, i);
    const int row = (work.row_tile * T::kCluster + rank) * T::kRows, token = work.token_tile * T::kTokens;
    barrier_wait(shared.empty + 8 * stage, parity);
    store_shared_4(shared.notes + 16 * stage, row, token, work.end - work.begin, work.split);
    if (work.begin == work.end) {  // the last note: no more work
      barrier_arrive(shared.full + 8 * stage);
      return;
    }
#pragma unroll 1
    for (int k = T::kStagesOfStep * work.begin; k < T::kStagesOfStep * work.end; ++k) {
      barrier_wait(shared.empty + 8 * stage, parity);
      if (!kShared && T::kEarly && early > 0) {
        --early;
      } else {
        load_weights(stage, k, row);
      }
      load_activations(stage, k, token);
      if (++stage == T::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

template <class T>
SJ_DEVICE void consume(const Params& p, const Shared& shared, const Place& place) {
  using Instruction = Wgmma<T::kFp8, T::kTokens>;
  using A = typename Instruction::Accumulator;
  const int thread = threadIdx.x & 127;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0), group = warp >> 2;
  int stage = 0;
  uint32_t parity = 0;

  // One thread for each block that wrote into this stage: those of the team, whose places differ in their last bits, and where W is shared the
  // one of the same rank in the other team, two places away.
  const int writers = T::kAbreast ? p.writers : T::kCluster;
  auto release = [&](int s) {
    if constexpr (T::kCluster == 1) {
      if (thread == 0) barrier_arrive(shared.empty + 8 * s);
    } else {
      if (thread < writers) barrier_arrive_at(shared.empty + 8 * s, place.in_cluster ^ thread);
    }
  };

  auto stage_address = [&] { return shared.stages + stage * T::kBytes; };
  auto load_metadata = [&](uint32_t (&meta)[T::kBlocks][2], int half) {
    if constexpr (!T::kSparse) return;
    const uint32_t m = stage_address() + T::kBytesX + T::kBytesW + (group * T::kBlocks * T::kHalves + half) * 1024 + thread * 8;
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) {
      const uint2 v = load_shared_2(m + b * 1024);
      meta[b][0] = v.x;
      meta[b][1] = v.y;
    }
  };
  // The k-th instruction of half a stage at x for block b: 64 columns, 32 of a dense weight.
  constexpr int kInstructions = T::kSparse ? 2 : 4;
  auto multiply = [&](A (&sums)[T::kTokens / 2], uint32_t x, int half, int b, int k, const uint32_t (&meta)[2], int add) {
    const uint32_t w = x + T::kBytesX + (group * T::kBlocks + b) * (64 * T::kColumnsW) + 64 * half + 32 * k;
    if constexpr (T::kSparse) {
      Instruction::mma(sums, descriptor<T::kColumnsW>(w), descriptor<128>(x + half * (T::kTokens * 128) + 64 * k), meta[k], add);
    } else {
      Instruction::dense(sums, descriptor<128>(w), descriptor<128>(x + 32 * k), add);
    }
  };
  auto next_stage = [&] {
    if (++stage == T::kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  uint32_t left = 0;  // sums that other clusters have left to this warp
  int set = 0;  // which scales: those of the tile before may still be in use
  for (bool start = true;; start = false, set ^= 1) {
    barrier_wait(shared.full + 8 * stage, parity);
    const int4 note = load_shared_4i(shared.notes + 16 * stage);
    const int steps = __shfl_sync(~0u, note.z, 0), split = __shfl_sync(~0u, note.w, 0);
    const int row = __shfl_sync(~0u, note.x, 0) + group * T::kBlocks * 64, token = __shfl_sync(~0u, note.y, 0);
    if (steps == 0) break;
    A d[T::kBlocks][T::kTokens / 2];  // in here: carried from tile to tile it would have to be moved about
    uint32_t e[2][T::kBlocks][2];     // metadata of two stages: running instructions read one while the other is loaded

    // Once, at the start, the second warp group lets the first one get ahead: from then on the epilogue of one runs while the
    // instructions of the other keep the tensor cores busy.
    if (start && group == 1) named_sync(8, 256);
    int previous = 0;
    // 128 columns, number kIndex of a step.
    auto stage_step = [&](uint32_t (&meta)[T::kBlocks][2], auto index, auto first) {
      constexpr bool kFirst = decltype(first)::value;
      constexpr int kHalf = T::kHalves == 2 ? decltype(index)::value : 0;
      if (!kFirst && kHalf == 0) barrier_wait(shared.full + 8 * stage, parity);
      const uint32_t x = stage_address();
      load_metadata(meta, kHalf);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kInstructions; ++k)
#pragma unroll
        for (int b = 0; b < T::kBlocks; ++b) multiply(d[b], x, kHalf, b, k, meta[b], kFirst && k == 0 ? 0 : 1);
      wgmma_commit();
      wgmma_wait<1>();  // the columns before these are done with
      if (!kFirst && kHalf == 0) release(previous);
      if (kHalf == T::kHalves - 1) {
        previous = stage;
        next_stage();
      }
    };
    constexpr std::integral_constant<int, 0> kEven{};
    constexpr std::integral_constant<int, 1> kOdd{};
    stage_step(e[0], kEven, std::true_type());
    if (start && group == 0) named_arrive(8, 256);
    if (split < 0) prefetch_scales<T>(p, scales<T>(shared, group, set), row, token);
    stage_step(e[1], kOdd, std::false_type());
    // With two blocks, a tile's last step is left for below.
    constexpr bool kTail = T::kBlocks == 2;
    const int plain = kTail && split == kWhole ? steps - 1 : steps;
#pragma unroll 1
    for (int k = 1; k < plain; ++k) {
      stage_step(e[0], kEven, std::false_type());
      stage_step(e[1], kOdd, std::false_type());
    }
    if (!kTail || split != kWhole) {
      wgmma_wait<0>();
      release(previous);
#pragma unroll
      for (int b = 0; b < T::kBlocks; ++b) pin(d[b]);
      if (T::kDivides && split == kDivided) {
        cluster_sync();  // nobody needs the stages any more
        send_parts<T>(p, d, shared, place.rank, place.part, warp);
        copy_async_wait();
        if (thread == 0) bulk_wait_read<0>();
        cluster_sync();  // all sums and scales are there, and the slots are free
        sum_inbox<T>(p, shared, place.part, warp, set, row, token);
      } else if (split >= 0) {
        const Sharer me = sharer<T>(p, place.team, place.rank);
        left |= store_part<T>(p, d, split, me, warp) << (split == share(p, me.cluster) / p.steps ? 0 : 16);
      } else {
        copy_async_wait();
        if (T::kSlots == 1 && thread == 0) bulk_wait_read<0>();
        named_sync(1 + group, 128);
        if constexpr (!kTail) store_block<T, 0>(p, d[0], shared, warp, set, row, token);
      }
    } else if constexpr (kTail) {
      // The last step: both stages for the first block, then both for the second, under which the first is stored.
      uint32_t x[2];
      const int last[2] = {stage, stage + 1 == T::kStages ? 0 : stage + 1};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        barrier_wait(shared.full + 8 * stage, parity);
        x[i] = stage_address();
        load_metadata(e[i], 0);
        next_stage();
      }
      auto block_step = [&](int b) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int k = 0; k < kInstructions; ++k) multiply(d[b], x[i], 0, b, k, e[i][b], 1);
        wgmma_commit();
      };
      wgmma_fence();
      block_step(0);
      wgmma_wait<1>();
      release(previous);
      block_step(1);
      copy_async_wait();
      named_sync(1 + group, 128);  // the scales are there, and all have read those of the tile before
      wgmma_wait<1>();
      pin(d[0]);
      store_block<T, 0>(p, d[0], shared, warp, set, row, token);
      wgmma_wait<0>();
      pin(d[1]);
      release(last[0]);
      release(last[1]);
      store_block<T, 1>(p, d[1], shared, warp, set, row, token);
    }
  }
  if (const Sharer me = sharer<T>(p, place.team, place.rank); me.cluster < p.split_clusters) sum_parts<T>(p, shared, me, warp, left);
  if (thread == 0) bulk_wait_read<0>();  // shared memory must outlive the stores from it
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) sparse_matmul_kernel(const __grid_constant__ Params p) {
  SJ_DYNAMIC_SHARED(dynamic);
  __shared__ uint64_t barriers[2 * T::kStages];
  __shared__ int4 notes[T::kStages];
  Shared shared;
  shared.stages = (shared_address(dynamic) + 1023) & ~1023u;
  shared.full = shared_address(barriers);
  shared.empty = shared.full + 8 * T::kStages;
  shared.notes = shared_address(notes);
  const uint32_t in_cluster = T::kCluster > 1 || T::kDivides ? cluster_rank() : 0;
  const Place place{in_cluster, in_cluster % T::kCluster, T::kDivides || T::kAbreast ? static_cast<int>(in_cluster / T::kCluster) : 0,
                    p.first_team + static_cast<int>(blockIdx.x / T::kCluster), p.teams};

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      barrier_init(shared.full + 8 * i, 1);
      barrier_init(shared.empty + 8 * i, T::kWarpGroups * (T::kAbreast ? p.writers : T::kCluster));
    }
    fence_barrier_init();
    prefetch_map(&p.map_x);
    prefetch_map(&p.map_w);
    if constexpr (T::kSparse) prefetch_map(&p.map_e);
  }
  __syncthreads();
  if constexpr (T::kCluster > 1) cluster_sync();

  if (threadIdx.x >= T::kWarpGroups * 128) {
    registers_decrease<T::kProducerRegisters>();
    if (threadIdx.x == T::kWarpGroups * 128) {
      if (p.companion == kFirst) grid_release();
      if (T::kAbreast && p.writers > T::kCluster) {
        produce<T, true>(p, shared, place);
      } else {
        produce<T, false>(p, shared, place);
      }
    }
    __syncwarp();
    if (T::kDivides && p.parts > 1 && place.team / p.parts < p.divided_tiles) {  // with the consumers, when they hand over their sums
      cluster_sync();
      cluster_sync();
    }
  } else {
    registers_increase<T::kConsumerRegisters>();
    if (p.companion != kSecond) grid_wait();
    consume<T>(p, shared, place);
  }
  __syncwarp();
  // A block may not leave while its neighbour still writes into its shared memory or arrives at its barriers.
  if constexpr (T::kCluster > 1) cluster_sync();
  if (p.companion == kSecond) grid_wait();  // whoever waits for this launch waits for both
}

}  // namespace slidejax::hopper

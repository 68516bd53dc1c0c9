// How partial sums come together where several CTA groups share the K of a tile. There are two
// ways: through memory (stream-K), and through the shared memory of a cluster. Both add in the
// order of K, so that results do not depend on timing.
//
// In both, a reduction unit is what one warp adds up and stores at a time: 16 outputs of up to 32
// tokens.
#pragma once

#include <type_traits>

#include "hopper/epilogue.cuh"

namespace slidejax::hopper {

template <class A>
SJ_DEVICE void AddQuad(A* sum, const uint4& v) {
  sum[0] += reinterpret_cast<const A&>(v.x);
  sum[1] += reinterpret_cast<const A&>(v.y);
  sum[2] += reinterpret_cast<const A&>(v.z);
  sum[3] += reinterpret_cast<const A&>(v.w);
}

// ---- Stream-K. Every warp leaves its partial sums in memory and goes on. When it has no more
// work, it takes its share of the reduction units (the fix-up). It waits for missing partial sums
// only up to a limit, because the worker that owes one may not begin before this one leaves its
// multiprocessor. Past the limit it leaves the unit to the last arriver, the warp that brings the
// last partial sum.

// A CTA among those that share tiles: its worker, which is a CTA group or a pair of them, and its
// rank there, counted from the first group's first CTA on.
struct Worker {
  int index, rank;
};
template <class T>
SJ_DEVICE Worker WorkerOf(const Params& p, int cta_group, uint32_t rank) {
  return {cta_group >> p.paired(), (cta_group & p.paired()) * T::kCtas + static_cast<int>(rank)};
}

// partials[worker + tile][rank][warp][quad][lane], 16 bytes a lane.
template <class T>
SJ_DEVICE uint4* PartialOf(const Params& p, int worker, int tile, int rank, int warp) {
  constexpr int kWarps = T::kWarpGroups * 4, kQuads = T::kM64Blocks * (T::kTokens / 8) * 32;
  static_assert(kQuads * 4 * kWarps == T::kAccumulators);
  const size_t slot =
      (static_cast<size_t>(worker + tile) * (T::kCtas << p.paired()) + rank) * kWarps + warp;
  return reinterpret_cast<uint4*>(p.partials) + slot * kQuads + (FreshThread() & 31);
}
template <class T>
SJ_DEVICE unsigned long long* CounterOf(const Params& p, int tile, int rank, int warp) {
  return p.counters + (tile * (T::kCtas << p.paired()) + rank) * (T::kWarpGroups * 4) + warp;
}

SJ_DEVICE int PartialCount(const Params& p, int tile) {
  return WorkerOfStep(p, (tile + 1) * p.steps - 1) - WorkerOfStep(p, tile * p.steps) + 1;
}

// Leaves a partial sum in memory. If it is the last to arrive, returns the units whose owners have
// given up waiting for it, a bit each.
template <class T, class A>
SJ_DEVICE uint32_t StorePartial(const Params& p, const A (&d)[T::kM64Blocks][T::kTokens / 2],
                                int tile, const Worker& me, int warp) {
  constexpr int kQuads = T::kTokens / 8;
  uint4* mine = PartialOf<T>(p, me.index, tile, me.rank, warp);
#pragma unroll
  for (int b = 0; b < T::kM64Blocks; ++b) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      __stcg(mine + (b * kQuads + i) * 32, reinterpret_cast<const uint4&>(d[b][4 * i]));
    }
  }
  __threadfence();
  __syncwarp();
  unsigned long long before = 0;
  if ((FreshThread() & 31) == 0) before = atomicAdd(CounterOf<T>(p, tile, me.rank, warp), 1ull);
  const bool last = static_cast<int>(before) == PartialCount(p, tile) - 1;
  return __shfl_sync(~0u, last ? static_cast<int>(before >> 32) : 0, 0);
}

// Adds up and stores one unit of a shared tile. All of its partial sums are in memory.
template <class T>
SJ_DEVICE void ReduceUnit(const Params& p, const Shared& shared, int rank, int tile, int unit,
                          int warp) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
  const int lane = FreshThread() & 31, block = unit / kCount, slab = unit % kCount;
  const int first = WorkerOfStep(p, tile * p.steps);
  const int last = WorkerOfStep(p, (tile + 1) * p.steps - 1);
  WorkTile work;
  LocateTile(p, p.whole_tiles + (tile << p.paired()) + rank / T::kCtas, work);
  __threadfence();
  const int group_row =
      ((work.row_tile * T::kCtas + rank % T::kCtas) * T::kWarpGroups + (warp >> 2)) *
      T::kM64Blocks * 64;
  const int row = group_row + block * 64 + (warp & 3) * 16;
  const int token = work.token_tile * T::kTokens + slab * T::kUnitTokens;
  // The warp's staging buffer has 1 KB for transposing, then scale_x of 32 tokens, then scale_w and
  // bias of 16 outputs.
  const uint32_t staging = StagingOf<T>(shared, warp);
  const uint32_t scale_x = staging + 1024, scale_w = staging + 1152;
  if (lane < T::kUnitTokens) {
    CopyAsync4(scale_x + lane * 4, p.scale_x + token + lane, token + lane < p.M);
  }
  const int o = row + (lane & 15);
  if (lane < 16) {
    CopyAsync4(scale_w + lane * 4, p.scale_w + o, o < p.out);
  } else if (p.bias != nullptr) {
    CopyAsync4(scale_w + lane * 4, p.bias + o, o < p.out);
  } else {
    StoreSharedF32(scale_w + lane * 4, -0.0f);
  }
  Residual<T::kUnitTokens> added;
  if constexpr (T::kAdds) added.Load(p, row, token);
  A sum[4 * kQuads] = {};
  const int at = (block * (T::kTokens / 8) + slab * kQuads) * 32;
#pragma unroll 1
  for (int worker = first; worker <= last; worker += 4) {  // four load side by side
    uint4 v[4][kQuads];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        v[i][q] = worker + i <= last
                      ? __ldcg(PartialOf<T>(p, worker + i, tile, rank, warp) + at + q * 32)
                      : uint4{};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, v[i][q]);
    }
  }
  CopyAsyncWait();
  __syncwarp();
  const Fragment f = MakeFragment(scale_x, scale_w, scale_w + 64, row, token);
  float residual[4 * kQuads];
  if constexpr (T::kAdds) added.Get(p, residual);
  StoreSlab<T::kUnitTokens, T::kAdds>(p, sum, residual, f, 0, staging);
}

// The fix-up of a warp. inherited: the units that StorePartial has returned, in the low 16 bits for
// the worker's first shared tile, in the high 16 bits for a second one.
template <class T>
SJ_DEVICE void FixUp(const Params& p, const Shared& shared, const Worker& me, int warp,
                     uint32_t inherited) {
  constexpr int kPerTile = T::kM64Blocks * (T::kTokens / T::kUnitTokens);
  static_assert(kPerTile <= 16);
  const int lane = FreshThread() & 31;
  if ((warp & 3) == 0 && lane == 0) BulkWaitRead<0>();  // the staging buffers are free
  NamedSync(1 + (warp >> 2), 128);
  // The units of all tiles are numbered, and a worker takes every stream_k_workers-th.
  int spins = kSpinLimit, next = me.index;
#pragma unroll 1
  while (next < p.stream_k_tiles * kPerTile || inherited != 0) {
    int tile, unit;
    bool mine = true;
    if (next < p.stream_k_tiles * kPerTile) {
      tile = next / kPerTile;
      unit = next % kPerTile;
      next += p.stream_k_workers;
      const int wanted = PartialCount(p, tile);
      if (wanted == 1) continue;  // one worker had all of the tile
      if (lane == 0) {
        unsigned long long* counter = CounterOf<T>(p, tile, me.rank, warp);
        mine = WaitCount(reinterpret_cast<int*>(counter), wanted, spins);
        // The last arriver will see this bit, unless it has arrived just now.
        if (!mine) mine = static_cast<int>(atomicOr(counter, 1ull << (32 + unit))) == wanted;
      }
      mine = __shfl_sync(~0u, mine, 0);
      if (!mine) spins = 1;
    } else {
      const int bit = __ffs(static_cast<int>(inherited)) - 1;
      inherited &= inherited - 1;
      tile = FirstStep(p, me.index) / p.steps + bit / 16;
      unit = bit % 16;
    }
    if (mine) ReduceUnit<T>(p, shared, me.rank, tile, unit, warp);
  }
}

// ---- Within a cluster. The units of all warps are dealt out to the CTA groups. Each group sends
// its partial sum of a unit to the unit's owner. When all have arrived, the warp there that has the
// same number as the senders adds them up.

// Returns where the partial sum of CTA group `from` for a unit arrives in its owner's shared
// memory: in place of the rings, which no group needs any more by then.
template <class T>
SJ_DEVICE uint32_t InboxAddress(const Shared& shared, int groups, int unit, int from) {
  return shared.x.data + (unit / groups * groups + from) * T::kUnitBytes +
         (FreshThread() & 31) * 16;
}

template <class T, class A>
SJ_DEVICE void SendPartials(const Params& p, const A (&d)[T::kM64Blocks][T::kTokens / 2],
                            const Shared& shared, uint32_t rank, int group_in_cluster, int warp) {
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
#pragma unroll
  for (int b = 0; b < T::kM64Blocks; ++b) {
#pragma unroll
    for (int slab = 0; slab < kCount; ++slab) {
      const int unit = (warp * T::kM64Blocks + b) * kCount + slab;
      const int owner = unit % p.cluster_groups;
      const uint32_t to = InboxAddress<T>(shared, p.cluster_groups, unit, group_in_cluster);
      auto quad = [&](int q) {
        return reinterpret_cast<const uint4&>(d[b][(slab * kQuads + q) * 4]);
      };
      if (owner == group_in_cluster) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) StoreShared4(to + q * 512, quad(q));
      } else {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          StoreRemote4(to + q * 512, owner * T::kCtas + rank, quad(q));
        }
      }
    }
  }
}

// Adds up and stores the units of this warp that its CTA group owns. row, token: the warp group's
// first output, the tile's first token. set: where its scales are.
template <class T>
SJ_DEVICE void ReduceInbox(const Params& p, const Shared& shared, int group_in_cluster, int warp,
                           int set, int row, int token) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
#pragma unroll 1
  for (int i = 0; i < T::kM64Blocks * kCount; ++i) {
    const int unit = warp * T::kM64Blocks * kCount + i, block = i / kCount, slab = i % kCount;
    if (unit % p.cluster_groups != group_in_cluster) continue;
    const Fragment f = FragmentOf<T>(shared, warp, set, block, slab * T::kUnitTokens, row, token);
    Residual<T::kUnitTokens> added;
    if constexpr (T::kAdds) added.Load(p, f.row, f.token);
    A sum[4 * kQuads] = {};
#pragma unroll 1
    for (int from = 0; from < p.cluster_groups; ++from) {
      const uint32_t at = InboxAddress<T>(shared, p.cluster_groups, unit, from);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, LoadShared4(at + q * 512));
    }
    float residual[4 * kQuads];
    if constexpr (T::kAdds) added.Get(p, residual);
    StoreSlab<T::kUnitTokens, T::kAdds>(p, sum, residual, f, 0, StagingOf<T>(shared, warp));
  }
}

}  // namespace slidejax::hopper

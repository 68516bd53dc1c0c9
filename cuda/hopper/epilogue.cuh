// From accumulators to y: scales, bias, conversion, transposition, stores; and sums over clusters
// that share a tile.
//
// Of every 8 tokens j a lane holds outputs g and g + 8 of its warp's 16, for tokens 8 j + 2 c and +
// 1, where g = lane / 4 and c = lane % 4: D is [outputs][tokens], y is [tokens][outputs].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper/tile.cuh"

namespace slidejax::hopper {

SJ_DEVICE float ToFloat(float v) { return v; }
SJ_DEVICE float ToFloat(int v) { return __int2float_rn(v); }

// One rounding each, never contracted: the result is the reference's, bit for bit.
template <bool kBias = true, class A>
SJ_DEVICE float Dequantize(A acc, float scale_x, float scale_w, float bias) {
  const float y = __fmul_rn(__fmul_rn(ToFloat(acc), scale_x), scale_w);
  return kBias ? __fadd_rn(y, bias) : y;
}

template <bool kBf16>
SJ_DEVICE uint32_t PackPair(float low, float high) {
  if constexpr (kBf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

// Shared memory behind the rings: a warp's slots, 1 KB aligned, and a warp group's scales, of which
// there are two sets.
template <class T>
SJ_DEVICE uint32_t StagingOf(const Shared& shared, int warp) {
  return shared.staging + warp * T::kStagingBytes;
}
template <class T>
SJ_DEVICE uint32_t ScalesOf(const Shared& shared, int group, int set) {
  return shared.staging + T::kWarpGroups * 4 * T::kStagingBytes +
         (group * 2 + set) * T::kScaleBytes;
}

// Starts copying a tile's scale_x [tokens], scale_w and bias [outputs of the warp group]; all of
// its threads take part.
template <class T>
SJ_DEVICE void PrefetchScales(const Params& p, uint32_t scale_x, int row, int token) {
  const int thread = FreshThread() & 127;
#pragma unroll
  for (int i = 0; i < (T::kTokens + 127) / 128; ++i) {
    const int t = i * 128 + thread;
    if (t < T::kTokens) CopyAsync4(scale_x + 4 * t, p.scale_x + token + t, token + t < p.M);
  }
  if (thread < T::kM64Blocks * 64) {
    const uint32_t scale_w = scale_x + T::kTokens * 4 + thread * 4;
    const bool inside = row + thread < p.out;
    CopyAsync4(scale_w, p.scale_w + row + thread, inside);
    if (p.bias != nullptr) {
      CopyAsync4(scale_w + T::kM64Blocks * 256, p.bias + row + thread, inside);
    } else {
      StoreSharedF32(scale_w + T::kM64Blocks * 256,
                     -0.0f);  // adding it changes nothing, not even the sign of a zero
    }
  }
}

// What a warp's 16 outputs are multiplied by, and where they go.
struct Fragment {
  float w0, w1, b0, b1;  // scale_w and bias of outputs g and g + 8
  uint32_t scale_x;      // shared memory: the lane's first two
  int row, token, lane;  // first output of the warp, first token
};

SJ_DEVICE Fragment MakeFragment(uint32_t scale_x, uint32_t scale_w, uint32_t bias, int row,
                                int token) {
  const int lane = FreshThread() & 31, at = (lane >> 2) * 4;
  return {LoadSharedF32(scale_w + at),
          LoadSharedF32(scale_w + at + 32),
          LoadSharedF32(bias + at),
          LoadSharedF32(bias + at + 32),
          scale_x + (lane & 3) * 8,
          row,
          token,
          lane};
}

// The same for block `block` of a warp group, whose scales prefetch_scales has brought, from its
// token number `first` on. row, token: the warp group's first output, the tile's first token.
template <class T>
SJ_DEVICE Fragment FragmentOf(const Shared& shared, int warp, int set, int block, int first,
                              int row, int token) {
  const uint32_t scale_x = ScalesOf<T>(shared, warp >> 2, set),
                 scale_w = scale_x + T::kTokens * 4 + block * 256 + (warp & 3) * 64;
  return MakeFragment(scale_x + first * 4, scale_w, scale_w + T::kM64Blocks * 256,
                      row + block * 64 + (warp & 3) * 16, token + first);
}

// Converts 16 tokens to the fragments of four transposed 8x8 matrices; s: the scales of the lane's
// tokens.
template <bool kBf16, bool kBias, class A>
SJ_DEVICE void Convert(const A* d, const Fragment& fragment, const float2* s, uint32_t (&r)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    r[2 * h] = PackPair<kBf16>(Dequantize<kBias>(d[4 * h], s[h].x, fragment.w0, fragment.b0),
                               Dequantize<kBias>(d[4 * h + 1], s[h].y, fragment.w0, fragment.b0));
    r[2 * h + 1] =
        PackPair<kBf16>(Dequantize<kBias>(d[4 * h + 2], s[h].x, fragment.w1, fragment.b1),
                        Dequantize<kBias>(d[4 * h + 3], s[h].y, fragment.w1, fragment.b1));
  }
}
template <int kTokens>
SJ_DEVICE void LoadScales(const Fragment& fragment, int first, float2 (&s)[kTokens / 8]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) s[j] = LoadShared2F(fragment.scale_x + (first + 8 * j) * 4);
}

// Stores up to 32 tokens by the warp alone; `own`: 1 KB of shared memory. Any output type and
// alignment.
template <int kTokens, class A>
SJ_DEVICE void StoreSlab(const Params& p, const A (&d)[kTokens / 2], const Fragment& fragment,
                         int first, uint32_t staging) {
  const int g = fragment.lane >> 2, c = fragment.lane & 3;
  if (p.output >=
      2) {  // 32 bits, float32 or the sums themselves: a warp's store covers whole sectors as it is
    float* y = static_cast<float*>(p.y);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 s = LoadShared2F(fragment.scale_x + (first + 8 * j) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = fragment.token + first + 8 * j + 2 * c + (i & 1),
                  o = fragment.row + g + (i & 2) * 4;
        const float v =
            Dequantize(d[4 * j + i], i & 1 ? s.y : s.x, i & 2 ? fragment.w1 : fragment.w0,
                       i & 2 ? fragment.b1 : fragment.b0);
        if (t < p.M && o < p.out)
          y[static_cast<size_t>(t) * p.out + o] =
              p.output == 2 ? v : reinterpret_cast<const float&>(d[4 * j + i]);
      }
    }
    __syncwarp();  // before the scales are overwritten
    return;
  }
  // 16 bit: through shared memory, 32 bytes a token, whose halves change places every 4 tokens
  // against bank conflicts.
  float2 s[kTokens / 8];
  LoadScales<kTokens>(fragment, first, s);
  const int matrix = fragment.lane >> 3, in = fragment.lane & 7;
  const uint32_t put = staging + ((matrix >> 1) * 8 + in) * 32 + (((matrix & 1) ^ (in >> 2)) << 4);
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    uint32_t r[4];
    if (p.output == 0) {
      Convert<true, true>(d + 8 * i, fragment, s + 2 * i, r);
    } else {
      Convert<false, true>(d + 8 * i, fragment, s + 2 * i, r);
    }
    StoreMatricesTransposed(put + i * 512, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const int take = fragment.lane >> 1, half = fragment.lane & 1, o = fragment.row + half * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    const uint4 v = LoadShared4(staging + i * 512 + take * 32 + ((half ^ ((take >> 2) & 1)) << 4));
    const int t = fragment.token + first + i * 16 + take;
    if (t >= p.M || o >= p.out) continue;
    uint16_t* to = static_cast<uint16_t*>(p.y) + static_cast<size_t>(t) * p.out + o;
    if (p.vector_stores) {
      *reinterpret_cast<uint4*>(to) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (o + k < p.out) to[k] = static_cast<uint16_t>(words[k / 2] >> (16 * (k & 1)));
    }
  }
  __syncwarp();
}

// Stores a warp group's 64 outputs of block kBlock as bfloat16 by bulk copies: whole lines of y,
// written behind its back. `ring`: the slots of the warp group.
template <class T, int kM64Block, bool kBias, class A>
SJ_DEVICE void StoreBulk(const Params& p, const A (&d)[T::kTokens / 2], const Fragment& fragment,
                         uint32_t ring, int warp) {
  constexpr int kSlab = T::kSlabTokens, kCount = T::kTokens / kSlab;
  const int matrix = fragment.lane >> 3, in = fragment.lane & 7;
  const uint32_t put = ring + ((matrix >> 1) * 8 + in) * 128 +
                       (((2 * (warp & 3) + (matrix & 1)) ^ in) << 4);  // 128-byte swizzle
  const bool leader = (warp & 3) == 0 && fragment.lane == 0;
  float2 s[2][kSlab / 8];
  LoadScales<kSlab>(fragment, 0, s[0]);
#pragma unroll
  for (int slab = 0; slab < kCount; ++slab) {
    const int at = (kM64Block * kCount + slab) % T::kSlabs * T::kSlabBytes;
    if (slab + 1 < kCount) LoadScales<kSlab>(fragment, (slab + 1) * kSlab, s[(slab + 1) & 1]);
#pragma unroll
    for (int i = 0; i < kSlab / 16; ++i) {
      uint32_t r[4];
      Convert<true, kBias>(d + slab * (kSlab / 2) + 8 * i, fragment, s[slab & 1] + 2 * i, r);
      StoreMatricesTransposed(put + at + i * 2048, r[0], r[1], r[2], r[3]);
    }
    FenceAsyncShared();
    if (leader)
      BulkWaitRead<(T::kSlabs > 1 ? T::kSlabs - 2 : 0)>();  // the slot after this one has been read
    NamedSync(1 + (warp >> 2), 128);
    if (leader) {
      TmaStore2d(&p.map_y, ring + at, fragment.row, fragment.token + slab * kSlab, kEvictFirst);
      BulkCommit();
    }
  }
}

// The sums of a warp group's block kBlock to y.
template <class T, int kM64Block, class A>
SJ_DEVICE void StoreBlock(const Params& p, const A (&d)[T::kTokens / 2], const Shared& shared,
                          int warp, int set, int row, int token) {
  const Fragment fragment = FragmentOf<T>(shared, warp, set, kM64Block, 0, row, token);
  if (p.bulk_stores && p.bias != nullptr) {
    StoreBulk<T, kM64Block, true>(p, d, fragment, StagingOf<T>(shared, warp & ~3), warp);
  } else if (p.bulk_stores) {
    StoreBulk<T, kM64Block, false>(p, d, fragment, StagingOf<T>(shared, warp & ~3), warp);
  } else {
#pragma unroll
    for (int first = 0; first < T::kTokens; first += T::kUnitTokens)
      StoreSlab<T::kUnitTokens>(p, reinterpret_cast<const A(&)[T::kUnitTokens / 2]>(d[first / 2]),
                                fragment, first, StagingOf<T>(shared, warp));
  }
}

// ---- Tiles that several clusters share: every warp leaves its sums in memory and goes on; when it
// has no more work, it adds up its share of all such sums, in the order of K, and stores the
// results. It does not wait for ever, since what it waits for may be a cluster that has not begun,
// for want of the room that this one takes: then it leaves the sum to the bringer of the last part.

// A block among those that share tiles: its cluster, a team or a pair of teams, and its seat there,
// from the first team's first block on.
struct Worker {
  int index, rank;
};
template <class T>
SJ_DEVICE Worker WorkerOf(const Params& p, int cta_group, uint32_t rank) {
  return {cta_group >> p.paired(), (cta_group & p.paired()) * T::kCtas + static_cast<int>(rank)};
}

// [split_clusters + split_tiles][seats][warps][quads][lane]: part `cluster` + tile of a tile's
// owners, 16 bytes a lane.
template <class T>
SJ_DEVICE uint4* PartialOf(const Params& p, int cluster, int tile, int rank, int warp) {
  constexpr int kWarps = T::kWarpGroups * 4, kUnit = T::kM64Blocks * (T::kTokens / 8) * 32;
  static_assert(kUnit * 4 * kWarps == T::kAccumulators);
  const size_t slot =
      (static_cast<size_t>(cluster + tile) * (T::kCtas << p.paired()) + rank) * kWarps + warp;
  return reinterpret_cast<uint4*>(p.partials) + slot * kUnit + (FreshThread() & 31);
}
template <class T>
SJ_DEVICE unsigned long long* CounterOf(const Params& p, int tile, int rank, int warp) {
  return p.counters + (tile * (T::kCtas << p.paired()) + rank) * (T::kWarpGroups * 4) + warp;
}

SJ_DEVICE int PartialCount(const Params& p, int tile) {
  return WorkerOfStep(p, (tile + 1) * p.steps - 1) - WorkerOfStep(p, tile * p.steps) + 1;
}

// Returns the jobs, a bit each, whose owners have given up waiting for this part, the last one.
template <class T, class A>
SJ_DEVICE uint32_t StorePartial(const Params& p, const A (&d)[T::kM64Blocks][T::kTokens / 2],
                                int tile, const Worker& me, int warp) {
  constexpr int kQuads = T::kTokens / 8;
  uint4* mine = PartialOf<T>(p, me.index, tile, me.rank, warp);
#pragma unroll
  for (int b = 0; b < T::kM64Blocks; ++b)
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      __stcg(mine + (b * kQuads + i) * 32, reinterpret_cast<const uint4&>(d[b][4 * i]));
  __threadfence();
  __syncwarp();
  unsigned long long before = 0;
  if ((FreshThread() & 31) == 0) before = atomicAdd(CounterOf<T>(p, tile, me.rank, warp), 1ull);
  const bool last = static_cast<int>(before) == PartialCount(p, tile) - 1;
  return __shfl_sync(~0u, last ? static_cast<int>(before >> 32) : 0, 0);
}

template <class A>
SJ_DEVICE void AddQuad(A* sum, const uint4& v) {
  sum[0] += reinterpret_cast<const A&>(v.x);
  sum[1] += reinterpret_cast<const A&>(v.y);
  sum[2] += reinterpret_cast<const A&>(v.z);
  sum[3] += reinterpret_cast<const A&>(v.w);
}

// Adds up and stores job `job` of a shared tile, of whose parts all are in memory.
template <class T>
SJ_DEVICE void ReduceUnit(const Params& p, const Shared& shared, int rank, int tile, int unit,
                          int warp) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
  const int lane = FreshThread() & 31, block = unit / kCount, slab = unit % kCount;
  const int first = WorkerOfStep(p, tile * p.steps),
            last = WorkerOfStep(p, (tile + 1) * p.steps - 1);
  WorkTile work;
  LocateTile(p, p.whole_tiles + (tile << p.paired()) + rank / T::kCtas, work);
  __threadfence();
  const int group_row =
      ((work.row_tile * T::kCtas + rank % T::kCtas) * T::kWarpGroups + (warp >> 2)) *
      T::kM64Blocks * 64;
  const int row = group_row + block * 64 + (warp & 3) * 16,
            token = work.token_tile * T::kTokens + slab * T::kUnitTokens;
  // Of the warp: 1 KB to transpose in, scale_x of 32 tokens, scale_w and bias of 16 outputs.
  const uint32_t staging = StagingOf<T>(shared, warp), scale_x = staging + 1024,
                 scale_w = staging + 1152;
  if (lane < T::kUnitTokens)
    CopyAsync4(scale_x + lane * 4, p.scale_x + token + lane, token + lane < p.M);
  const int o = row + (lane & 15);
  if (lane < 16) {
    CopyAsync4(scale_w + lane * 4, p.scale_w + o, o < p.out);
  } else if (p.bias != nullptr) {
    CopyAsync4(scale_w + lane * 4, p.bias + o, o < p.out);
  } else {
    StoreSharedF32(scale_w + lane * 4, -0.0f);
  }
  A sum[4 * kQuads] = {};
  const int at = (block * (T::kTokens / 8) + slab * kQuads) * 32;
#pragma unroll 1
  for (int who = first; who <= last;
       who += 4) {  // four parts at a time: their loads are under way together
    uint4 v[4][kQuads];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        v[i][q] = who + i <= last ? __ldcg(PartialOf<T>(p, who + i, tile, rank, warp) + at + q * 32)
                                  : uint4{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, v[i][q]);
  }
  CopyAsyncWait();
  __syncwarp();
  StoreSlab<T::kUnitTokens>(p, sum, MakeFragment(scale_x, scale_w, scale_w + 64, row, token), 0,
                            staging);
}

// `left`: what store_part has returned for the first shared tile of the cluster, and for another
// one 16 bits further up.
template <class T>
SJ_DEVICE void FixUp(const Params& p, const Shared& shared, const Worker& me, int warp,
                     uint32_t inherited) {
  constexpr int kPerTile = T::kM64Blocks * (T::kTokens / T::kUnitTokens);
  static_assert(kPerTile <= 16);
  const int lane = FreshThread() & 31;
  if ((warp & 3) == 0 && lane == 0) BulkWaitRead<0>();  // the slots are free
  NamedSync(1 + (warp >> 2), 128);
  int spins = kSpinLimit,
      next = me.index;  // of all jobs of all tiles, every so manieth is this cluster's
#pragma unroll 1
  while (next < p.stream_k_tiles * kPerTile || inherited != 0) {
    int tile, unit;
    bool mine = true;
    if (next < p.stream_k_tiles * kPerTile) {
      tile = next / kPerTile;
      unit = next % kPerTile;
      next += p.stream_k_workers;
      const int wanted = PartialCount(p, tile);
      if (wanted == 1) continue;  // it was one cluster's alone
      if (lane == 0) {
        unsigned long long* counter = CounterOf<T>(p, tile, me.rank, warp);
        mine = WaitCount(reinterpret_cast<int*>(counter), wanted, spins);
        // Unless the last part has come just now, whoever brings it will see this.
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

// ---- Tiles whose K the teams of a cluster divide among themselves: their sums meet in shared
// memory. The jobs of all warps are dealt out to the teams; each team sends its part of a job to
// the job's owner, and when all have, the same warp there adds up in the order of K.

// Where part `part` of a job arrives in its owner's shared memory: in place of the rings, which no
// team needs any more by then.
template <class T>
SJ_DEVICE uint32_t InboxAddress(const Shared& shared, int parts, int unit, int part) {
  return shared.x.data + (unit / parts * parts + part) * T::kUnitBytes + (FreshThread() & 31) * 16;
}

template <class T, class A>
SJ_DEVICE void SendPartials(const Params& p, const A (&d)[T::kM64Blocks][T::kTokens / 2],
                            const Shared& shared, uint32_t rank, int part, int warp) {
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
#pragma unroll
  for (int b = 0; b < T::kM64Blocks; ++b)
#pragma unroll
    for (int slab = 0; slab < kCount; ++slab) {
      const int unit = (warp * T::kM64Blocks + b) * kCount + slab;
      const int owner = unit % p.cluster_groups;
      const uint32_t to = InboxAddress<T>(shared, p.cluster_groups, unit, part);
      auto quad = [&](int q) {
        return reinterpret_cast<const uint4&>(d[b][(slab * kQuads + q) * 4]);
      };
      if (owner == part) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) StoreShared4(to + q * 512, quad(q));
      } else {
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
          StoreRemote4(to + q * 512, owner * T::kCtas + rank, quad(q));
      }
    }
}

// row, token: of the warp group's outputs; set: where its scales are.
template <class T>
SJ_DEVICE void ReduceInbox(const Params& p, const Shared& shared, int part, int warp, int set,
                           int row, int token) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kUnitTokens, kQuads = T::kUnitTokens / 8;
#pragma unroll 1
  for (int i = 0; i < T::kM64Blocks * kCount; ++i) {
    const int unit = warp * T::kM64Blocks * kCount + i, block = i / kCount, slab = i % kCount;
    if (unit % p.cluster_groups != part) continue;
    A sum[4 * kQuads] = {};
#pragma unroll 1
    for (int from = 0; from < p.cluster_groups; ++from) {
      const uint32_t at = InboxAddress<T>(shared, p.cluster_groups, unit, from);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, LoadShared4(at + q * 512));
    }
    const Fragment fragment =
        FragmentOf<T>(shared, warp, set, block, slab * T::kUnitTokens, row, token);
    StoreSlab<T::kUnitTokens>(p, sum, fragment, 0, StagingOf<T>(shared, warp));
  }
}

}  // namespace slidejax::hopper

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
SJ_DEVICE uint32_t Pack(float low, float high) {
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
SJ_DEVICE uint32_t Slots(const Shared& shared, int warp) {
  return shared.slots + warp * T::kSlotBytes;
}
template <class T>
SJ_DEVICE uint32_t Scales(const Shared& shared, int group, int set) {
  return shared.slots + T::kWarpGroups * 4 * T::kSlotBytes + (group * 2 + set) * T::kScaleBytes;
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
  if (thread < T::kBlocks * 64) {
    const uint32_t scale_w = scale_x + T::kTokens * 4 + thread * 4;
    const bool inside = row + thread < p.out;
    CopyAsync4(scale_w, p.scale_w + row + thread, inside);
    if (p.bias != nullptr) {
      CopyAsync4(scale_w + T::kBlocks * 256, p.bias + row + thread, inside);
    } else {
      StoreSharedF32(scale_w + T::kBlocks * 256,
                     -0.0f);  // adding it changes nothing, not even the sign of a zero
    }
  }
}

// What a warp's 16 outputs are multiplied by, and where they go.
struct Column {
  float w0, w1, b0, b1;  // scale_w and bias of outputs g and g + 8
  uint32_t scale_x;      // shared memory: the lane's first two
  int row, token, lane;  // first output of the warp, first token
};

SJ_DEVICE Column MakeColumn(uint32_t scale_x, uint32_t scale_w, uint32_t bias, int row, int token) {
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
SJ_DEVICE Column ColumnOf(const Shared& shared, int warp, int set, int block, int first, int row,
                          int token) {
  const uint32_t scale_x = Scales<T>(shared, warp >> 2, set),
                 scale_w = scale_x + T::kTokens * 4 + block * 256 + (warp & 3) * 64;
  return MakeColumn(scale_x + first * 4, scale_w, scale_w + T::kBlocks * 256,
                    row + block * 64 + (warp & 3) * 16, token + first);
}

// Converts 16 tokens to the fragments of four transposed 8x8 matrices; s: the scales of the lane's
// tokens.
template <bool kBf16, bool kBias, class A>
SJ_DEVICE void Convert(const A* d, const Column& col, const float2* s, uint32_t (&r)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    r[2 * h] = Pack<kBf16>(Dequantize<kBias>(d[4 * h], s[h].x, col.w0, col.b0),
                           Dequantize<kBias>(d[4 * h + 1], s[h].y, col.w0, col.b0));
    r[2 * h + 1] = Pack<kBf16>(Dequantize<kBias>(d[4 * h + 2], s[h].x, col.w1, col.b1),
                               Dequantize<kBias>(d[4 * h + 3], s[h].y, col.w1, col.b1));
  }
}
template <int kTokens>
SJ_DEVICE void LoadScales(const Column& col, int first, float2 (&s)[kTokens / 8]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) s[j] = LoadShared2F(col.scale_x + (first + 8 * j) * 4);
}

// Stores up to 32 tokens by the warp alone; `own`: 1 KB of shared memory. Any output type and
// alignment.
template <int kTokens, class A>
SJ_DEVICE void StoreSlab(const Params& p, const A (&d)[kTokens / 2], const Column& col, int first,
                         uint32_t own) {
  const int g = col.lane >> 2, c = col.lane & 3;
  if (p.output >=
      2) {  // 32 bits, float32 or the sums themselves: a warp's store covers whole sectors as it is
    float* y = static_cast<float*>(p.y);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 s = LoadShared2F(col.scale_x + (first + 8 * j) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = col.token + first + 8 * j + 2 * c + (i & 1), o = col.row + g + (i & 2) * 4;
        const float v = Dequantize(d[4 * j + i], i & 1 ? s.y : s.x, i & 2 ? col.w1 : col.w0,
                                   i & 2 ? col.b1 : col.b0);
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
  LoadScales<kTokens>(col, first, s);
  const int matrix = col.lane >> 3, in = col.lane & 7;
  const uint32_t put = own + ((matrix >> 1) * 8 + in) * 32 + (((matrix & 1) ^ (in >> 2)) << 4);
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    uint32_t r[4];
    if (p.output == 0) {
      Convert<true, true>(d + 8 * i, col, s + 2 * i, r);
    } else {
      Convert<false, true>(d + 8 * i, col, s + 2 * i, r);
    }
    StoreMatricesTransposed(put + i * 512, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const int take = col.lane >> 1, half = col.lane & 1, o = col.row + half * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    const uint4 v = LoadShared4(own + i * 512 + take * 32 + ((half ^ ((take >> 2) & 1)) << 4));
    const int t = col.token + first + i * 16 + take;
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
template <class T, int kBlock, bool kBias, class A>
SJ_DEVICE void StoreBulk(const Params& p, const A (&d)[T::kTokens / 2], const Column& col,
                         uint32_t ring, int warp) {
  constexpr int kSlab = T::kSlabTokens, kCount = T::kTokens / kSlab;
  const int matrix = col.lane >> 3, in = col.lane & 7;
  const uint32_t put = ring + ((matrix >> 1) * 8 + in) * 128 +
                       (((2 * (warp & 3) + (matrix & 1)) ^ in) << 4);  // 128-byte swizzle
  const bool leader = (warp & 3) == 0 && col.lane == 0;
  float2 s[2][kSlab / 8];
  LoadScales<kSlab>(col, 0, s[0]);
#pragma unroll
  for (int slab = 0; slab < kCount; ++slab) {
    const int at = (kBlock * kCount + slab) % T::kSlots * T::kSlabBytes;
    if (slab + 1 < kCount) LoadScales<kSlab>(col, (slab + 1) * kSlab, s[(slab + 1) & 1]);
#pragma unroll
    for (int i = 0; i < kSlab / 16; ++i) {
      uint32_t r[4];
      Convert<true, kBias>(d + slab * (kSlab / 2) + 8 * i, col, s[slab & 1] + 2 * i, r);
      StoreMatricesTransposed(put + at + i * 2048, r[0], r[1], r[2], r[3]);
    }
    FenceAsyncShared();
    if (leader)
      BulkWaitRead<(T::kSlots > 1 ? T::kSlots - 2 : 0)>();  // the slot after this one has been read
    NamedSync(1 + (warp >> 2), 128);
    if (leader) {
      TmaStore2d(&p.map_y, ring + at, col.row, col.token + slab * kSlab, kEvictFirst);
      BulkCommit();
    }
  }
}

// The sums of a warp group's block kBlock to y.
template <class T, int kBlock, class A>
SJ_DEVICE void StoreBlock(const Params& p, const A (&d)[T::kTokens / 2], const Shared& shared,
                          int warp, int set, int row, int token) {
  const Column col = ColumnOf<T>(shared, warp, set, kBlock, 0, row, token);
  if (p.bulk_stores && p.bias != nullptr) {
    StoreBulk<T, kBlock, true>(p, d, col, Slots<T>(shared, warp & ~3), warp);
  } else if (p.bulk_stores) {
    StoreBulk<T, kBlock, false>(p, d, col, Slots<T>(shared, warp & ~3), warp);
  } else {
#pragma unroll
    for (int first = 0; first < T::kTokens; first += T::kJobTokens)
      StoreSlab<T::kJobTokens>(p, reinterpret_cast<const A(&)[T::kJobTokens / 2]>(d[first / 2]),
                               col, first, Slots<T>(shared, warp));
  }
}

// ---- Tiles that several clusters share: every warp leaves its sums in memory and goes on; when it
// has no more work, it adds up its share of all such sums, in the order of K, and stores the
// results. It does not wait for ever, since what it waits for may be a cluster that has not begun,
// for want of the room that this one takes: then it leaves the sum to the bringer of the last part.

// A block among those that share tiles: its cluster, a team or a pair of teams, and its seat there,
// from the first team's first block on.
struct Sharer {
  int cluster, seat;
};
template <class T>
SJ_DEVICE Sharer SharerOf(const Params& p, int team, uint32_t rank) {
  return {team >> p.pairs(), (team & p.pairs()) * T::kCluster + static_cast<int>(rank)};
}

// [split_clusters + split_tiles][seats][warps][quads][lane]: part `cluster` + tile of a tile's
// owners, 16 bytes a lane.
template <class T>
SJ_DEVICE uint4* PartOf(const Params& p, int cluster, int tile, int seat, int warp) {
  constexpr int kWarps = T::kWarpGroups * 4, kUnit = T::kBlocks * (T::kTokens / 8) * 32;
  static_assert(kUnit * 4 * kWarps == T::kPartial);
  const size_t slot =
      (static_cast<size_t>(cluster + tile) * (T::kCluster << p.pairs()) + seat) * kWarps + warp;
  return reinterpret_cast<uint4*>(p.partials) + slot * kUnit + (FreshThread() & 31);
}
template <class T>
SJ_DEVICE unsigned long long* CounterOf(const Params& p, int tile, int seat, int warp) {
  return p.counters + (tile * (T::kCluster << p.pairs()) + seat) * (T::kWarpGroups * 4) + warp;
}

SJ_DEVICE int PartCount(const Params& p, int tile) {
  return Owner(p, (tile + 1) * p.steps - 1) - Owner(p, tile * p.steps) + 1;
}

// Returns the jobs, a bit each, whose owners have given up waiting for this part, the last one.
template <class T, class A>
SJ_DEVICE uint32_t StorePart(const Params& p, const A (&d)[T::kBlocks][T::kTokens / 2], int tile,
                             const Sharer& me, int warp) {
  constexpr int kQuads = T::kTokens / 8;
  uint4* mine = PartOf<T>(p, me.cluster, tile, me.seat, warp);
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      __stcg(mine + (b * kQuads + i) * 32, reinterpret_cast<const uint4&>(d[b][4 * i]));
  __threadfence();
  __syncwarp();
  unsigned long long before = 0;
  if ((FreshThread() & 31) == 0) before = atomicAdd(CounterOf<T>(p, tile, me.seat, warp), 1ull);
  const bool last = static_cast<int>(before) == PartCount(p, tile) - 1;
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
SJ_DEVICE void SumJob(const Params& p, const Shared& shared, int seat, int tile, int job,
                      int warp) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kJobTokens, kQuads = T::kJobTokens / 8;
  const int lane = FreshThread() & 31, block = job / kCount, slab = job % kCount;
  const int first = Owner(p, tile * p.steps), last = Owner(p, (tile + 1) * p.steps - 1);
  Work work;
  Locate(p, p.whole_tiles + (tile << p.pairs()) + seat / T::kCluster, work);
  __threadfence();
  const int group_row =
      ((work.row_tile * T::kCluster + seat % T::kCluster) * T::kWarpGroups + (warp >> 2)) *
      T::kBlocks * 64;
  const int row = group_row + block * 64 + (warp & 3) * 16,
            token = work.token_tile * T::kTokens + slab * T::kJobTokens;
  // Of the warp: 1 KB to transpose in, scale_x of 32 tokens, scale_w and bias of 16 outputs.
  const uint32_t own = Slots<T>(shared, warp), scale_x = own + 1024, scale_w = own + 1152;
  if (lane < T::kJobTokens)
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
        v[i][q] = who + i <= last ? __ldcg(PartOf<T>(p, who + i, tile, seat, warp) + at + q * 32)
                                  : uint4{};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, v[i][q]);
  }
  CopyAsyncWait();
  __syncwarp();
  StoreSlab<T::kJobTokens>(p, sum, MakeColumn(scale_x, scale_w, scale_w + 64, row, token), 0, own);
}

// `left`: what store_part has returned for the first shared tile of the cluster, and for another
// one 16 bits further up.
template <class T>
SJ_DEVICE void SumParts(const Params& p, const Shared& shared, const Sharer& me, int warp,
                        uint32_t left) {
  constexpr int kPerTile = T::kBlocks * (T::kTokens / T::kJobTokens);
  static_assert(kPerTile <= 16);
  const int lane = FreshThread() & 31;
  if ((warp & 3) == 0 && lane == 0) BulkWaitRead<0>();  // the slots are free
  NamedSync(1 + (warp >> 2), 128);
  int patience = kPatience,
      next = me.cluster;  // of all jobs of all tiles, every so manieth is this cluster's
#pragma unroll 1
  while (next < p.split_tiles * kPerTile || left != 0) {
    int tile, job;
    bool mine = true;
    if (next < p.split_tiles * kPerTile) {
      tile = next / kPerTile;
      job = next % kPerTile;
      next += p.split_clusters;
      const int wanted = PartCount(p, tile);
      if (wanted == 1) continue;  // it was one cluster's alone
      if (lane == 0) {
        unsigned long long* counter = CounterOf<T>(p, tile, me.seat, warp);
        mine = WaitCount(reinterpret_cast<int*>(counter), wanted, patience);
        // Unless the last part has come just now, whoever brings it will see this.
        if (!mine) mine = static_cast<int>(atomicOr(counter, 1ull << (32 + job))) == wanted;
      }
      mine = __shfl_sync(~0u, mine, 0);
      if (!mine) patience = 1;
    } else {
      const int bit = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      tile = Share(p, me.cluster) / p.steps + bit / 16;
      job = bit % 16;
    }
    if (mine) SumJob<T>(p, shared, me.seat, tile, job, warp);
  }
}

// ---- Tiles whose K the teams of a cluster divide among themselves: their sums meet in shared
// memory. The jobs of all warps are dealt out to the teams; each team sends its part of a job to
// the job's owner, and when all have, the same warp there adds up in the order of K.

// Where part `part` of a job arrives in its owner's shared memory: in place of the rings, which no
// team needs any more by then.
template <class T>
SJ_DEVICE uint32_t Inbox(const Shared& shared, int parts, int job, int part) {
  return shared.x.data + (job / parts * parts + part) * T::kPartBytes + (FreshThread() & 31) * 16;
}

template <class T, class A>
SJ_DEVICE void SendParts(const Params& p, const A (&d)[T::kBlocks][T::kTokens / 2],
                         const Shared& shared, uint32_t rank, int part, int warp) {
  constexpr int kCount = T::kTokens / T::kJobTokens, kQuads = T::kJobTokens / 8;
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int slab = 0; slab < kCount; ++slab) {
      const int job = (warp * T::kBlocks + b) * kCount + slab;
      const int owner = job % p.parts;
      const uint32_t to = Inbox<T>(shared, p.parts, job, part);
      auto quad = [&](int q) {
        return reinterpret_cast<const uint4&>(d[b][(slab * kQuads + q) * 4]);
      };
      if (owner == part) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) StoreShared4(to + q * 512, quad(q));
      } else {
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
          StoreRemote4(to + q * 512, owner * T::kCluster + rank, quad(q));
      }
    }
}

// row, token: of the warp group's outputs; set: where its scales are.
template <class T>
SJ_DEVICE void SumInbox(const Params& p, const Shared& shared, int part, int warp, int set, int row,
                        int token) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / T::kJobTokens, kQuads = T::kJobTokens / 8;
#pragma unroll 1
  for (int i = 0; i < T::kBlocks * kCount; ++i) {
    const int job = warp * T::kBlocks * kCount + i, block = i / kCount, slab = i % kCount;
    if (job % p.parts != part) continue;
    A sum[4 * kQuads] = {};
#pragma unroll 1
    for (int from = 0; from < p.parts; ++from) {
      const uint32_t at = Inbox<T>(shared, p.parts, job, from);
#pragma unroll
      for (int q = 0; q < kQuads; ++q) AddQuad(sum + 4 * q, LoadShared4(at + q * 512));
    }
    const Column col = ColumnOf<T>(shared, warp, set, block, slab * T::kJobTokens, row, token);
    StoreSlab<T::kJobTokens>(p, sum, col, 0, Slots<T>(shared, warp));
  }
}

}  // namespace slidejax::hopper

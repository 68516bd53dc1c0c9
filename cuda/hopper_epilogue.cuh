// From accumulators to y: scales, bias, conversion, transposition, stores; and sums over clusters that share a tile.
//
// Of every 8 tokens j a lane holds outputs g and g + 8 of its warp's 16, for tokens 8 j + 2 c and + 1, where g = lane / 4 and
// c = lane % 4: D is [outputs][tokens], y is [tokens][outputs].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "hopper_tile.cuh"

namespace slidejax::hopper {

SJ_DEVICE float to_float(float v) { return v; }
SJ_DEVICE float to_float(int v) { return __int2float_rn(v); }

// One rounding each, never contracted: the result is the reference's, bit for bit.
template <bool kBias = true, class A>
SJ_DEVICE float dequantize(A acc, float scale_x, float scale_w, float bias) {
  const float y = __fmul_rn(__fmul_rn(to_float(acc), scale_x), scale_w);
  return kBias ? __fadd_rn(y, bias) : y;
}

template <bool kBf16>
SJ_DEVICE uint32_t pack(float low, float high) {
  if constexpr (kBf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

// A warp group's shared memory behind the stages: slabs, 1 KB aligned, and scales.
template <class T>
SJ_DEVICE uint32_t slabs(const Shared& shared, int group) {
  return shared.stages + T::kStages * T::kBytes + group * (2 * T::kSlabBytes);
}
template <class T>
SJ_DEVICE uint32_t scales(const Shared& shared, int group) {
  return shared.stages + T::kStages * T::kBytes + T::kWarpGroups * 2 * T::kSlabBytes + group * T::kScaleBytes;
}

// Starts copying a tile's scale_x [tokens], scale_w and bias [outputs of the warp group]; all of its threads take part.
template <class T>
SJ_DEVICE void prefetch_scales(const Params& p, uint32_t scale_x, int row, int token) {
  const int thread = fresh_thread() & 127;
#pragma unroll
  for (int i = 0; i < (T::kTokens + 127) / 128; ++i) {
    const int t = i * 128 + thread;
    if (t < T::kTokens) copy_async_4(scale_x + 4 * t, p.scale_x + token + t, token + t < p.M);
  }
  if (thread < T::kBlocks * 64) {
    const uint32_t scale_w = scale_x + T::kTokens * 4 + thread * 4;
    const bool inside = row + thread < p.out;
    copy_async_4(scale_w, p.scale_w + row + thread, inside);
    if (p.bias != nullptr) {
      copy_async_4(scale_w + T::kBlocks * 256, p.bias + row + thread, inside);
    } else {
      store_shared_f32(scale_w + T::kBlocks * 256, -0.0f);  // adding it changes nothing, not even the sign of a zero
    }
  }
}

// What a warp's 16 outputs are multiplied by, and where they go.
struct Column {
  float w0, w1, b0, b1;  // scale_w and bias of outputs g and g + 8
  uint32_t scale_x;      // shared memory: the lane's first two
  int row, token, lane;  // first output of the warp, first token
};

SJ_DEVICE Column make_column(uint32_t scale_x, uint32_t scale_w, uint32_t bias, int row, int token) {
  const int lane = fresh_thread() & 31, at = (lane >> 2) * 4;
  return {load_shared_f32(scale_w + at), load_shared_f32(scale_w + at + 32), load_shared_f32(bias + at),
          load_shared_f32(bias + at + 32), scale_x + (lane & 3) * 8, row, token, lane};
}

// Converts 16 tokens, the first of them `first` after the column's first, to the fragments of four transposed 8x8 matrices.
template <bool kBf16, bool kBias, class A>
SJ_DEVICE void convert(const A* d, const Column& col, int first, uint32_t (&r)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 s = load_shared_2f(col.scale_x + (first + 8 * h) * 4);
    r[2 * h] = pack<kBf16>(dequantize<kBias>(d[4 * h], s.x, col.w0, col.b0), dequantize<kBias>(d[4 * h + 1], s.y, col.w0, col.b0));
    r[2 * h + 1] =
        pack<kBf16>(dequantize<kBias>(d[4 * h + 2], s.x, col.w1, col.b1), dequantize<kBias>(d[4 * h + 3], s.y, col.w1, col.b1));
  }
}

// What a warp stores, or adds up, alone at a time.
template <class T>
inline constexpr int kJobTokens = T::kTokens < 32 ? T::kTokens : 32;

// Stores up to 32 tokens by the warp alone; `own`: 1 KB of shared memory. Any output type and alignment.
template <int kTokens, class A>
SJ_DEVICE void store_slab(const Params& p, const A (&d)[kTokens / 2], const Column& col, int first, uint32_t own) {
  const int g = col.lane >> 2, c = col.lane & 3;
  if (p.output == 2) {  // float32: a warp's store covers whole sectors as it is
    float* y = static_cast<float*>(p.y);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 s = load_shared_2f(col.scale_x + (first + 8 * j) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = col.token + first + 8 * j + 2 * c + (i & 1), o = col.row + g + (i & 2) * 4;
        if (t < p.M && o < p.out)
          y[static_cast<size_t>(t) * p.out + o] =
              dequantize(d[4 * j + i], i & 1 ? s.y : s.x, i & 2 ? col.w1 : col.w0, i & 2 ? col.b1 : col.b0);
      }
    }
    __syncwarp();  // before the scales are overwritten
    return;
  }
  // 16 bit: through shared memory, 32 bytes a token, whose halves change places every 4 tokens against bank conflicts.
  const int matrix = col.lane >> 3, in = col.lane & 7;
  const uint32_t put = own + ((matrix >> 1) * 8 + in) * 32 + (((matrix & 1) ^ (in >> 2)) << 4);
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    uint32_t r[4];
    if (p.output == 0) {
      convert<true, true>(d + 8 * i, col, first + 16 * i, r);
    } else {
      convert<false, true>(d + 8 * i, col, first + 16 * i, r);
    }
    store_matrices_transposed(put + i * 512, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const int take = col.lane >> 1, half = col.lane & 1, o = col.row + half * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    const uint4 v = load_shared_4(own + i * 512 + take * 32 + ((half ^ ((take >> 2) & 1)) << 4));
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

// Stores a block of 64 outputs as bfloat16 by bulk copies: whole lines of y, written behind the warp group's back, from two slabs in turn.
template <class T, bool kBias, class A>
SJ_DEVICE void store_block(const Params& p, const A (&d)[T::kTokens / 2], const Column& col, uint32_t ring, int group, int row,
                           int block) {
  constexpr int kCount = T::kTokens / T::kSlabTokens;
  const int warp = fresh_thread() >> 5 & 3, matrix = col.lane >> 3, in = col.lane & 7;
  const uint32_t put = ring + ((matrix >> 1) * 8 + in) * 128 + (((2 * warp + (matrix & 1)) ^ in) << 4);  // 128-byte swizzle
#pragma unroll
  for (int slab = 0; slab < kCount; ++slab) {
    const int at = (block * kCount + slab) % 2 * T::kSlabBytes;
#pragma unroll
    for (int i = 0; i < T::kSlabTokens / 16; ++i) {
      uint32_t r[4];
      convert<true, kBias>(d + slab * (T::kSlabTokens / 2) + 8 * i, col, slab * T::kSlabTokens + 16 * i, r);
      store_matrices_transposed(put + at + i * 2048, r[0], r[1], r[2], r[3]);
    }
    fence_async_shared();
    const bool leader = (fresh_thread() & 127) == 0;
    if (leader) bulk_wait_read<0>();  // the slab to be written after this one is free
    named_sync(1 + group, 128);
    if (leader) {
      tma_store_2d(&p.map_y, ring + at, row, col.token + slab * T::kSlabTokens, kEvictFirst);
      bulk_commit();
    }
  }
}

// A whole tile's sums to y.
template <class T, class A>
SJ_DEVICE void store_tile(const Params& p, const A (&d)[T::kBlocks][T::kTokens / 2], const Shared& shared, int group, int row,
                          int token) {
  const uint32_t ring = slabs<T>(shared, group), scale_x = scales<T>(shared, group), scale_w = scale_x + T::kTokens * 4;
  const int warp = fresh_thread() >> 5 & 3;
  copy_async_wait();
  named_sync(1 + group, 128);
  auto column = [&](int block) {
    const uint32_t w = scale_w + block * 256 + warp * 64;
    return make_column(scale_x, w, w + T::kBlocks * 256, row + block * 64 + warp * 16, token);
  };
  // Blocks are written out: a loop this large would not unroll, and registers have no index.
  if (p.bulk_stores && p.bias != nullptr) {
    store_block<T, true>(p, d[0], column(0), ring, group, row, 0);
    if constexpr (T::kBlocks == 2) store_block<T, true>(p, d[1], column(1), ring, group, row + 64, 1);
  } else if (p.bulk_stores) {
    store_block<T, false>(p, d[0], column(0), ring, group, row, 0);
    if constexpr (T::kBlocks == 2) store_block<T, false>(p, d[1], column(1), ring, group, row + 64, 1);
  } else {
    auto block = [&](const A(&sums)[T::kTokens / 2], const Column& col) {
#pragma unroll
      for (int first = 0; first < T::kTokens; first += kJobTokens<T>)
        store_slab<kJobTokens<T>>(p, reinterpret_cast<const A(&)[kJobTokens<T> / 2]>(sums[first / 2]), col, first,
                                  ring + warp * 1024);
    };
    block(d[0], column(0));
    if constexpr (T::kBlocks == 2) block(d[1], column(1));
    named_sync(1 + group, 128);  // all have read the scales
  }
}

// ---- Tiles that several clusters share: every warp leaves its sums in memory and goes on; when it has no more work, it adds
// up its share of all such sums, in the order of K, and stores the results.

// [split_clusters + split_tiles][cluster][warps][quads][lane]: part `cluster` + tile of a tile's owners, 16 bytes a lane.
template <class T>
SJ_DEVICE uint4* part_of(const Params& p, int cluster, int tile, uint32_t rank, int warp) {
  constexpr int kWarps = T::kWarpGroups * 4, kUnit = T::kBlocks * (T::kTokens / 8) * 32;
  static_assert(kUnit * 4 * kWarps == T::kPartial);
  const size_t slot = (static_cast<size_t>(cluster + tile) * T::kCluster + rank) * kWarps + warp;
  return reinterpret_cast<uint4*>(p.partials) + slot * kUnit + (fresh_thread() & 31);
}
template <class T>
SJ_DEVICE int* counter_of(const Params& p, int tile, uint32_t rank, int warp) {
  return p.counters + (tile * T::kCluster + rank) * (T::kWarpGroups * 4) + warp;
}

template <class T, class A>
SJ_DEVICE void store_part(const Params& p, const A (&d)[T::kBlocks][T::kTokens / 2], int tile, int cluster, uint32_t rank,
                          int warp) {
  constexpr int kQuads = T::kTokens / 8;
  uint4* mine = part_of<T>(p, cluster, tile, rank, warp);
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < kQuads; ++i) __stcg(mine + (b * kQuads + i) * 32, reinterpret_cast<const uint4&>(d[b][4 * i]));
  __threadfence();
  __syncwarp();
  if ((fresh_thread() & 31) == 0) atomicAdd(counter_of<T>(p, tile, rank, warp), 1);
}

template <class T>
SJ_DEVICE void sum_parts(const Params& p, const Shared& shared, uint32_t rank, int cluster, int warp) {
  using A = std::conditional_t<T::kFp8, float, int>;
  constexpr int kCount = T::kTokens / kJobTokens<T>, kPerTile = T::kBlocks * kCount, kQuads = kJobTokens<T> / 8;
  const int group = warp >> 2, lane = fresh_thread() & 31;
  if ((fresh_thread() & 127) == 0) bulk_wait_read<0>();
  named_sync(1 + group, 128);  // the slabs are free
  // Of the warp: 1 KB to transpose in, scale_x of 32 tokens, scale_w and bias of 16 outputs.
  const uint32_t own = slabs<T>(shared, group) + (warp & 3) * 2048, scale_x = own + 1024, scale_w = own + 1152;
#pragma unroll 1
  for (int job = cluster; job < p.split_tiles * kPerTile; job += p.split_clusters) {
    const int tile = job / kPerTile, block = job % kPerTile / kCount, slab = job % kCount;
    const int first = owner(p, tile * p.steps), last = owner(p, (tile + 1) * p.steps - 1);
    if (first == last) continue;  // it was one cluster's alone
    Work work;
    locate(p, p.whole_tiles + tile, work);
    const int row = ((work.row_tile * T::kCluster + static_cast<int>(rank)) * T::kWarpGroups + group) * T::kBlocks * 64 +
                    block * 64 + (warp & 3) * 16;
    const int token = work.token_tile * T::kTokens + slab * kJobTokens<T>;
    if (lane < kJobTokens<T>) copy_async_4(scale_x + lane * 4, p.scale_x + token + lane, token + lane < p.M);
    const int o = row + (lane & 15);
    if (lane < 16) {
      copy_async_4(scale_w + lane * 4, p.scale_w + o, o < p.out);
    } else if (p.bias != nullptr) {
      copy_async_4(scale_w + lane * 4, p.bias + o, o < p.out);
    } else {
      store_shared_f32(scale_w + lane * 4, -0.0f);
    }
    if (lane == 0) wait_count(counter_of<T>(p, tile, rank, warp), last - first + 1);
    __syncwarp();
    __threadfence();
    A sum[4 * kQuads] = {};
    const int at = (block * (T::kTokens / 8) + slab * kQuads) * 32;
#pragma unroll 1
    for (int who = first; who <= last; who += 4) {  // four parts at a time: their loads are under way together
      uint4 v[4][kQuads];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int q = 0; q < kQuads; ++q)
          v[i][q] = who + i <= last ? __ldcg(part_of<T>(p, who + i, tile, rank, warp) + at + q * 32) : uint4{};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          sum[4 * q] += reinterpret_cast<const A&>(v[i][q].x);
          sum[4 * q + 1] += reinterpret_cast<const A&>(v[i][q].y);
          sum[4 * q + 2] += reinterpret_cast<const A&>(v[i][q].z);
          sum[4 * q + 3] += reinterpret_cast<const A&>(v[i][q].w);
        }
    }
    copy_async_wait();
    __syncwarp();
    store_slab<kJobTokens<T>>(p, sum, make_column(scale_x, scale_w, scale_w + 64, row, token), 0, own);
  }
}

}  // namespace slidejax::hopper

// The GEMM kernel: a persistent grid of clusters, in each thread block two consumer warp groups that issue wgmma.sp and write
// y, and one producer thread that issues bulk copies; or three consumer warp groups, one thread of which issues the copies too
// (a fourth group would leave none of them the registers for 256 tokens).
//
// The sparse operand of wgmma must be A, so a block computes D = W' X^T: rows of D are outputs, columns are tokens.
// A stage of the pipeline is 128 lifted columns: X [tokens][128 bytes], W [rows][64 bytes], metadata [rows / 64][1 KB].
// Work is counted in steps of two stages: the metadata registers alternate, and ptxas follows wgmma's asynchronous use of
// them only through a loop without other exits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "hopper_ptx.cuh"
#include "hopper_wgmma.cuh"

namespace slidejax::hopper {

struct Params {
  CUtensorMap x, w, e;
  const float* scale_x;
  const float* scale_w;
  const float* bias;
  void* y;
  float* partials;      // [split_tiles + split_clusters][cluster][rows x tokens], accumulators in register order
  int* counters;        // [split_tiles][cluster][warps], zero at the start
  int M, out, steps;    // steps: pairs of stages along K
  int row_tiles, token_tiles, token_group;
  int whole_tiles;      // the first tiles, one cluster each
  int split_tiles;      // the others, which split_clusters clusters share
  int split_clusters;
  int output;           // HopperOutput
  int vector_stores;    // rows of y are 16-byte aligned
};

template <bool kFp8_, int kWarpGroups_, int kBlocks_, int kTokens_, int kCluster_, int kStages_>
struct Tile {
  static constexpr bool kFp8 = kFp8_;
  static constexpr int kWarpGroups = kWarpGroups_;  // consumers
  static constexpr int kBlocks = kBlocks_;          // 64-row blocks of each
  static constexpr int kTokens = kTokens_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kStages = kStages_;
  static constexpr int kRows = kWarpGroups * kBlocks * 64;
  static constexpr bool kProducer = kWarpGroups < 3;  // a warp group of its own for the copies
  static constexpr int kThreads = (kWarpGroups + kProducer) * 128;
  static constexpr int kAhead = 2;  // without a producer: how many stages ahead copies are issued
  static constexpr int kShareX = kTokens / kCluster;  // tokens that a block copies for its cluster
  static constexpr int kBytesX = kTokens * 128;
  static constexpr int kBytesW = kRows * 64;
  static constexpr int kBytesE = kRows * 16;
  static constexpr int kBytes = kBytesX + kBytesW + kBytesE;
  // Of a warp, private, so that the epilogue needs no barrier: 32 tokens of 16 outputs, scale_x, and scale_w and bias.
  static constexpr int kSlab = 1024;
  static constexpr int kWarpBytes = kSlab + kTokens * 4 + kBlocks * 128;
  static constexpr int kShared = 1024 + kStages * kBytes + kWarpGroups * 4 * kWarpBytes;  // 1024: alignment
  static constexpr int kPartial = kRows * kTokens;                                        // words
  static_assert(kBytes % 1024 == 0 && kShared + 2 * 8 * kStages + 32 <= 227 * 1024);
};

// What a cluster does as its i-th piece of work: steps [begin, end) of a tile; none if begin == end. split: the tile's index
// among those that are shared along K, or -1.
struct Work {
  int row_tile, token_tile, begin, end, split;
};

// The shared steps [share(c), share(c + 1)) are cluster c's; owner is the inverse.
SJ_DEVICE int share(const Params& p, int cluster) { return cluster * (p.split_tiles * p.steps) / p.split_clusters; }
SJ_DEVICE int owner(const Params& p, int step) { return ((step + 1) * p.split_clusters - 1) / (p.split_tiles * p.steps); }

// Computed afresh by whoever needs it: producer and consumers walk the same sequence, and registers are scarce.
SJ_DEVICE Work find_work(const Params& p, int cluster, int clusters, int i) {
  Work work{0, 0, 0, 0, -1};
  int tile = cluster + i * clusters;
  if (tile < p.whole_tiles) {
    work.end = p.steps;
  } else {
    if (cluster >= p.split_clusters) return work;
    const int begin = share(p, cluster), end = share(p, cluster + 1);
    i -= p.whole_tiles / clusters;  // a multiple of clusters whenever there are shared tiles
    work.split = begin / p.steps + i;
    tile = p.whole_tiles + work.split;
    work.begin = max(begin - work.split * p.steps, 0);
    work.end = max(min(end - work.split * p.steps, p.steps), work.begin);
    if (work.end - work.begin == p.steps) work.split = -1;
  }
  // Tokens in groups that L2 can hold, all rows past each group.
  const int per_group = p.token_group * p.row_tiles, group = tile / per_group, rest = tile - group * per_group;
  const int width = min(p.token_group, p.token_tiles - group * p.token_group);
  work.row_tile = rest / width;
  work.token_tile = group * p.token_group + rest - work.row_tile * width;
  return work;
}

// The shared memory of a block, as addresses.
struct Shared {
  uint32_t stages, full, empty;  // full[s]: stage s has arrived; empty[s]: it has been read, in all blocks that share X
  uint32_t issue;                // without a producer: what is being copied, and what comes after it
};

// Copies one stage. k: its index along K; row, token: the first ones of this block and of its share of X.
template <class T>
SJ_DEVICE void copy_stage(const Params& p, const Shared& shared, int stage, uint32_t parity, int k, int row, int token,
                          uint32_t rank) {
  constexpr uint16_t kAll = (1 << T::kCluster) - 1;
  const uint32_t bar = shared.full + 8 * stage, dst = shared.stages + stage * T::kBytes;
  // X stays for the next row tiles. W does too when more than one group of tokens passes over it.
  const uint64_t policy_w = p.token_tiles <= p.token_group ? kEvictFirst : kEvictNormal;
  barrier_wait(shared.empty + 8 * stage, parity);
  barrier_expect(bar, T::kBytes);
  if constexpr (T::kCluster == 1) {
    tma_load_2d(dst, &p.x, k * 128, token, bar, kEvictLast);
  } else {
    tma_load_2d_multicast(dst + rank * (T::kShareX * 128), &p.x, k * 128, token, bar, kAll, kEvictLast);
  }
  tma_load_2d(dst + T::kBytesX, &p.w, k * 64, row, bar, policy_w);
  tma_load_3d(dst + T::kBytesX + T::kBytesW, &p.e, 0, k, row / 64, bar, policy_w);
}

template <class T>
SJ_DEVICE int first_row(const Work& work, uint32_t rank) {
  return (work.row_tile * T::kCluster + static_cast<int>(rank)) * T::kRows;
}
template <class T>
SJ_DEVICE int first_token(const Work& work, uint32_t rank) {  // of this block's share of X
  return work.token_tile * T::kTokens + static_cast<int>(rank) * T::kShareX;
}

template <class T>
SJ_DEVICE void produce(const Params& p, const Shared& shared, uint32_t rank, int cluster, int clusters) {
  int stage = 0;
  uint32_t parity = 1;  // the first pass over the stages waits for nothing
  for (int i = 0;; ++i) {
    const Work work = find_work(p, cluster, clusters, i);
    if (work.begin == work.end) break;
    const int row = first_row<T>(work, rank), token = first_token<T>(work, rank);
#pragma unroll 1
    for (int k = 2 * work.begin; k < 2 * work.end; ++k) {
      copy_stage<T>(p, shared, stage, parity, k, row, token, rank);
      if (++stage == T::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// Without a producer: one consumer thread copies stage j + kAhead when it has issued the instructions of stage j. What to
// copy next lives in shared memory, {k, end, row, token} of the current and of the next piece of work.
template <class T>
SJ_DEVICE void set_issue(const Params& p, uint32_t at, uint32_t rank, int cluster, int clusters, int i) {
  const Work work = find_work(p, cluster, clusters, i);
  store_shared_4(at, 2 * work.begin, 2 * work.end, first_row<T>(work, rank), first_token<T>(work, rank));
}

template <class T>
SJ_DEVICE void issue_next(const Params& p, const Shared& shared, uint32_t rank, int stage, uint32_t parity) {
  int4 now = load_shared_4i(shared.issue);
  if (now.x == now.y) now = load_shared_4i(shared.issue + 16);
  if (now.x == now.y) return;
  copy_stage<T>(p, shared, stage, parity, now.x, now.z, now.w, rank);
  store_shared_4(shared.issue, now.x + 1, now.y, now.z, now.w);
}

SJ_DEVICE float to_float(float v) { return v; }
SJ_DEVICE float to_float(int v) { return __int2float_rn(v); }

// One rounding each, never contracted: the result is the reference's, bit for bit.
template <class A>
SJ_DEVICE float dequantize(A acc, float scale_x, float scale_w, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(to_float(acc), scale_x), scale_w), bias);
}

SJ_DEVICE uint32_t pack(float low, float high, bool bf16) {
  if (bf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

// The compiler does not know that wgmma still writes d after its asm statement: no read of d may move above this.
template <int kSize>
SJ_DEVICE void pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
SJ_DEVICE void pin(int (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Starts copying what the epilogue will need into the warp's own shared memory. row: the warp's first output in block 0.
template <class T>
SJ_DEVICE void prefetch_scales(const Params& p, uint32_t own, int row, int token) {
  const int lane = fresh_lane();
  const uint32_t scale_x = own + T::kSlab, scale_w = scale_x + T::kTokens * 4;
#pragma unroll
  for (int i = 0; i < (T::kTokens + 31) / 32; ++i) {
    const int t = i * 32 + lane;
    if (T::kTokens % 32 == 0 || t < T::kTokens) copy_async_4(scale_x + 4 * t, p.scale_x + token + t, token + t < p.M);
  }
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b) {
    const int o = row + b * 64 + (lane & 15);
    const uint32_t dst = scale_w + b * 128 + lane * 4;
    if (lane < 16) {
      copy_async_4(dst, p.scale_w + o, o < p.out);
    } else if (p.bias != nullptr) {
      copy_async_4(dst, p.bias + o, o < p.out);
    } else {
      store_shared_f32(dst, -0.0f);  // adding it changes nothing, not even the sign of a zero
    }
  }
}

// Where a warp's 16 outputs of one block go, and by what they are multiplied. A lane holds, of every 8 tokens j, outputs
// g and g + 8 of tokens 8 j + 2 c and + 1, where g = lane / 4 and c = lane % 4.
struct Column {
  float w0, w1, b0, b1;  // scale_w and bias of outputs g and g + 8
  uint32_t own;          // the warp's shared memory
  int row, token, lane;  // row: the warp's first output; token: the tile's first
};

template <class T>
SJ_DEVICE Column make_column(uint32_t own, int block, int row, int token) {
  const int lane = fresh_lane();
  const uint32_t scale_w = own + T::kSlab + T::kTokens * 4 + block * 128 + (lane >> 2) * 4;
  return {load_shared_f32(scale_w), load_shared_f32(scale_w + 32), load_shared_f32(scale_w + 64), load_shared_f32(scale_w + 96),
          own, row + block * 64, token, lane};
}

// Scales, converts and stores kSlabTokens tokens, the first of them `first` after the tile's first.
template <class T>
inline constexpr int kSlabTokens = T::kTokens < 32 ? T::kTokens : 32;

template <class T, class A>
SJ_DEVICE void store_slab(const Params& p, const A (&d)[kSlabTokens<T> / 2], const Column& col, int first) {
  const int g = col.lane >> 2, c = col.lane & 3;
  const uint32_t scale_x = col.own + T::kSlab + (first + 2 * c) * 4;

  if (p.output == 2) {  // float32: a warp's store covers whole sectors as it is
    float* y = static_cast<float*>(p.y);
#pragma unroll
    for (int j = 0; j < kSlabTokens<T> / 8; ++j) {
      const float2 s = load_shared_2f(scale_x + j * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = col.token + first + 8 * j + 2 * c + (i & 1), o = col.row + g + (i & 2) * 4;
        if (t < p.M && o < p.out)
          y[static_cast<size_t>(t) * p.out + o] =
              dequantize(d[4 * j + i], i & 1 ? s.y : s.x, i & 2 ? col.w1 : col.w0, i & 2 ? col.b1 : col.b0);
      }
    }
    return;
  }

  // 16 bit: through shared memory to sectors of 16 outputs. The 16-byte halves of a token's 32 bytes change places every 4
  // tokens, so that no two of a phase's accesses meet in a bank.
  const bool bf16 = p.output == 0;
  const int matrix = col.lane >> 3, in = col.lane & 7;
  const uint32_t put = col.own + ((matrix >> 1) * 8 + in) * 32 + (((matrix & 1) ^ (in >> 2)) << 4);
#pragma unroll
  for (int pair = 0; pair < kSlabTokens<T> / 16; ++pair) {
    uint32_t r[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = pair * 2 + h;
      const float2 s = load_shared_2f(scale_x + j * 32);
      r[2 * h] = pack(dequantize(d[4 * j], s.x, col.w0, col.b0), dequantize(d[4 * j + 1], s.y, col.w0, col.b0), bf16);
      r[2 * h + 1] = pack(dequantize(d[4 * j + 2], s.x, col.w1, col.b1), dequantize(d[4 * j + 3], s.y, col.w1, col.b1), bf16);
    }
    store_matrices_transposed(put + pair * 512, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const int take = col.lane >> 1, half = col.lane & 1, o = col.row + half * 8;
#pragma unroll
  for (int pair = 0; pair < kSlabTokens<T> / 16; ++pair) {
    const uint4 v = load_shared_4(col.own + pair * 512 + take * 32 + ((half ^ ((take >> 2) & 1)) << 4));
    const int t = col.token + first + pair * 16 + take;
    if (t >= p.M || o >= p.out) continue;
    uint16_t* to = static_cast<uint16_t*>(p.y) + static_cast<size_t>(t) * p.out + o;
    if (p.vector_stores) {
      __stcs(reinterpret_cast<uint4*>(to), v);
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (o + i < p.out) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
    }
  }
  __syncwarp();
}

template <class T, class A>
SJ_DEVICE void store_block(const Params& p, const A (&d)[T::kTokens / 2], const Column& col) {
#pragma unroll
  for (int slab = 0; slab < T::kTokens / kSlabTokens<T>; ++slab)
    store_slab<T>(p, reinterpret_cast<const A(&)[kSlabTokens<T> / 2]>(d[slab * (kSlabTokens<T> / 2)]), col, slab * kSlabTokens<T>);
}

// A tile that several clusters share. Every warp leaves its sums in memory; the last one to do so adds them up, in the order
// of K, and stores the result. Nobody waits for anybody.
template <class T, class A>
SJ_DEVICE void store_shared_tile(const Params& p, const A (&d)[T::kBlocks][T::kTokens / 2], uint32_t own, const Work& work,
                                 int cluster, uint32_t rank, int warp, int row, int token) {
  const int lane = fresh_lane();
  constexpr int kWarps = T::kWarpGroups * 4, kQuads = T::kTokens / 8, kUnit = T::kBlocks * kQuads * 32;
  static_assert(kUnit * 4 * kWarps == T::kPartial);
  auto part = [&](int who) {
    const size_t slot = (static_cast<size_t>(who + work.split) * T::kCluster + rank) * kWarps + warp;
    return reinterpret_cast<uint4*>(p.partials) + slot * kUnit + lane;
  };
  uint4* mine = part(cluster);
#pragma unroll
  for (int b = 0; b < T::kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < kQuads; ++i) __stcg(mine + (b * kQuads + i) * 32, reinterpret_cast<const uint4&>(d[b][4 * i]));
  __threadfence();
  __syncwarp();
  const int first = owner(p, work.split * p.steps), last = owner(p, (work.split + 1) * p.steps - 1);
  int arrived = 0;
  if (lane == 0) arrived = atomicAdd(p.counters + (work.split * T::kCluster + rank) * kWarps + warp, 1);
  if (__shfl_sync(~0u, arrived, 0) != last - first) return;
  __threadfence();

  constexpr int kSlabQuads = kSlabTokens<T> / 8;
#pragma unroll 1
  for (int b = 0; b < T::kBlocks; ++b) {
    const Column col = make_column<T>(own, b, row, token);
#pragma unroll 1
    for (int i = 0; i < kQuads; i += kSlabQuads) {
      A sum[4 * kSlabQuads] = {};
#pragma unroll 4
      for (int who = first; who <= last; ++who) {
        const uint4* theirs = part(who) + (b * kQuads + i) * 32;
#pragma unroll
        for (int q = 0; q < kSlabQuads; ++q) {
          const uint4 v = __ldcg(theirs + q * 32);
          sum[4 * q] += reinterpret_cast<const A&>(v.x);
          sum[4 * q + 1] += reinterpret_cast<const A&>(v.y);
          sum[4 * q + 2] += reinterpret_cast<const A&>(v.z);
          sum[4 * q + 3] += reinterpret_cast<const A&>(v.w);
        }
      }
      store_slab<T>(p, sum, col, i * 8);
    }
  }
}

template <class T>
SJ_DEVICE void consume(const Params& p, const Shared& shared, uint32_t rank, int cluster, int clusters) {
  using Instruction = Wgmma<T::kFp8, T::kTokens>;
  using A = typename Instruction::Accumulator;
  const int thread = threadIdx.x & 127;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0), group = warp >> 2;
  int stage = 0;
  uint32_t parity = 0;

  auto release = [&](int s) {  // one thread for each block of the cluster: both wrote into this stage
    if constexpr (T::kCluster == 1) {
      if (thread == 0) barrier_arrive(shared.empty + 8 * s);
    } else {
      if (thread < T::kCluster) barrier_arrive_at(shared.empty + 8 * s, thread);
    }
  };

  if constexpr (!T::kProducer) {
    if (threadIdx.x == 0) {
      set_issue<T>(p, shared.issue, rank, cluster, clusters, 0);
      store_shared_4(shared.issue + 16, 0, 0, 0, 0);
#pragma unroll 1
      for (int s = 0; s < T::kAhead; ++s) issue_next<T>(p, shared, rank, s, 1);
    }
    __syncwarp();
  }

  for (int i = 0;; ++i) {
    const Work work = find_work(p, cluster, clusters, i);
    if (work.begin == work.end) break;
    A d[T::kBlocks][T::kTokens / 2];  // in here: carried from tile to tile it would have to be moved about
    uint32_t e[2][T::kBlocks][2];     // metadata of two stages: running instructions read one while the other is loaded
    const uint32_t own = shared.stages + T::kStages * T::kBytes + warp * T::kWarpBytes;
    const int row = first_row<T>(work, rank) + group * T::kBlocks * 64 + (warp & 3) * 16, token = work.token_tile * T::kTokens;
    prefetch_scales<T>(p, own, row, token);
    if constexpr (!T::kProducer) {
      if (threadIdx.x == 0) set_issue<T>(p, shared.issue + 16, rank, cluster, clusters, i + 1);
      __syncwarp();
    }

    int previous = 0;
    auto stage_step = [&](uint32_t (&meta)[T::kBlocks][2], auto first_stage) {
      constexpr bool kFirst = decltype(first_stage)::value;
      barrier_wait(shared.full + 8 * stage, parity);
      const uint32_t x = shared.stages + stage * T::kBytes, w = x + T::kBytesX + group * T::kBlocks * 4096;
      const uint32_t m = x + T::kBytesX + T::kBytesW + group * T::kBlocks * 1024 + thread * 8;
#pragma unroll
      for (int b = 0; b < T::kBlocks; ++b) {
        const uint2 v = load_shared_2(m + b * 1024);
        meta[b][0] = v.x;
        meta[b][1] = v.y;
      }
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int b = 0; b < T::kBlocks; ++b)
          Instruction::mma(d[b], descriptor<64>(w + b * 4096 + 32 * k), descriptor<128>(x + 64 * k), meta[b][k],
                           kFirst && k == 0 ? 0 : 1);
      wgmma_commit();
      wgmma_wait<1>();  // the stage before this one is done with
      if (!kFirst) release(previous);
      if constexpr (!T::kProducer) {
        if (threadIdx.x == 0) {
          const int next = stage + T::kAhead, wrap = next >= T::kStages;
          issue_next<T>(p, shared, rank, wrap ? next - T::kStages : next, parity ^ 1 ^ wrap);
        }
        __syncwarp();
      }
      previous = stage;
      if (++stage == T::kStages) {
        stage = 0;
        parity ^= 1;
      }
    };
    stage_step(e[0], std::true_type());
    stage_step(e[1], std::false_type());
#pragma unroll 1
    for (int k = work.begin + 1; k < work.end; ++k) {
      stage_step(e[0], std::false_type());
      stage_step(e[1], std::false_type());
    }
    wgmma_wait<0>();
    release(previous);
#pragma unroll
    for (int b = 0; b < T::kBlocks; ++b) pin(d[b]);

    copy_async_wait();
    __syncwarp();
    if (work.split >= 0) {
      store_shared_tile<T>(p, d, own, work, cluster, rank, warp, row, token);
    } else {
      store_block<T>(p, d[0], make_column<T>(own, 0, row, token));
      if constexpr (T::kBlocks == 2) store_block<T>(p, d[1], make_column<T>(own, 1, row, token));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) sparse_matmul_kernel(const __grid_constant__ Params p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t barriers[2 * T::kStages];
  __shared__ int4 issue[2];
  Shared shared;
  shared.stages = (shared_address(dynamic) + 1023) & ~1023u;
  shared.full = shared_address(barriers);
  shared.empty = shared.full + 8 * T::kStages;
  shared.issue = shared_address(issue);
  const uint32_t rank = T::kCluster > 1 ? cluster_rank() : 0;
  const int cluster = blockIdx.x / T::kCluster, clusters = gridDim.x / T::kCluster;

  if (threadIdx.x == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      barrier_init(shared.full + 8 * i, 1);
      barrier_init(shared.empty + 8 * i, T::kWarpGroups * T::kCluster);
    }
    fence_barrier_init();
    prefetch_map(&p.x);
    prefetch_map(&p.w);
    prefetch_map(&p.e);
  }
  __syncthreads();
  if constexpr (T::kCluster > 1) cluster_sync();

  if constexpr (!T::kProducer) {
    consume<T>(p, shared, rank, cluster, clusters);
  } else if (threadIdx.x >= T::kWarpGroups * 128) {
    registers_decrease<24>();
    if (threadIdx.x == T::kWarpGroups * 128) produce<T>(p, shared, rank, cluster, clusters);
  } else {
    registers_increase<240>();
    consume<T>(p, shared, rank, cluster, clusters);
  }
  __syncwarp();
  // A block may not leave while its neighbour still writes into its shared memory or arrives at its barriers.
  if constexpr (T::kCluster > 1) cluster_sync();
}

}  // namespace slidejax::hopper

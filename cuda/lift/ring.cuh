// The kernel of lift.cu and fused.cu: rows pass through a ring in shared memory, where a prologue
// is applied in place.
//
// Everything is bytes moved, so x is read once and its memory never rests: thread blocks are
// persistent, take rows in turn, and hold a ring of rows. A row's *tiles* (store.cuh) are dealt out
// to the block's warps. For each row a warp
//   1. waits for its tiles of the row (asynchronous copies, which a lane waits for and reads
//   itself: no barrier),
//   2. applies the prologue, if there is one, and finds absmax,
//   3. agrees on it with the block's other warps: the one barrier of a row (two for norms),
//   4. converts, lifts and stores its tiles, and as soon as a tile is read, asks for the one that
//   comes `depth` tiles later, of this
//      row's successors. Reading thus goes on under the conversion and the stores.
// Rows that start at any address arrive as the 16-byte granules that cover them, from the beginning
// of a line on so that each copy of a warp is whole lines, and are shifted into place in step 2.
#pragma once

#include <algorithm>

#include "lift/lift.h"
#include "lift/prologue.cuh"
#include "lift/ptx.cuh"
#include "lift/store.cuh"

namespace slidejax {

struct RingParams {
  const void* x;
  void* lifted;
  float* scale;
  int64_t rows;
  int columns;
  int lifted_columns;
  int n;             // N of 2N-2:2N; 1: no lifting
  int steps;         // chunks of a lane in a tile
  int tiles;         // of a row, padding included
  int depth;         // tiles in a warp's part of the ring: at least as many as it has of a row
  bool x_aligned;    // every row starts at a multiple of 16 bytes and ends with a whole chunk
  bool out_aligned;  // n = 1: the same for the result
  PrologueParams prologue;
  unsigned long long* counters;  // for the next kernel
  int counter_count;
};

// What both kernels do first.
__device__ inline void Begin(const RingParams& p) {
  LetNextBegin();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.counter_count; i += blockDim.x) p.counters[i] = 0;
  }
}

// A tile of odd part 1 is widened, so that its stores fill more lanes.
__host__ __device__ constexpr int StepsOf(int n) { return TileSteps(n) == 1 ? 4 : TileSteps(n); }

// ---- Shared memory ------------------------------------------------------------------------------

constexpr int kMaxWarps = 32;
constexpr int kMaxStages = 3;                       // rows in the ring
constexpr int kReductionBytes = 4 * kMaxWarps * 4;  // two of maxima, in turn, and two sums

// A tile of x in the ring, and one of results: whole lines, which warps copy and read the fastest.
// One more where they are shifted.
constexpr int kLine = 128;
__host__ __device__ inline int SlotBytes(const RingParams& p, int steps, int in_bytes) {
  return kLanes * kChunk * steps * in_bytes + (p.x_aligned ? 0 : kLine);
}
__host__ __device__ inline int StageBytes(const RingParams& p, int n, int steps, int out_bytes) {
  if (n == 1 && (out_bytes > 1 || p.out_aligned)) return 0;  // not staged
  return TileBytes(n, steps, out_bytes) + (n == 1 ? kLine : 0);
}

inline int64_t BlockBytes(const RingParams& p, int warps, int sources, int in_bytes, int out_bytes,
                          int depth) {
  const int64_t of_warp = static_cast<int64_t>(depth) * sources * SlotBytes(p, p.steps, in_bytes) +
                          StageBytes(p, p.n, p.steps, out_bytes);
  return kReductionBytes + warps * of_warp;
}

// ---- Reductions over a thread block -------------------------------------------------------------

__device__ inline float WarpSum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullMask, v, offset);
  return v;
}

__device__ inline uint32_t BlockMax(uint32_t bits, uint32_t* words) {
  bits = __reduce_max_sync(kFullMask, bits);
  const int warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  if (warps == 1) return bits;
  if (lane == 0) words[threadIdx.x / kLanes] = bits;
  __syncthreads();
  return __reduce_max_sync(kFullMask, lane < warps ? words[lane] : 0);
}

template <int kSums>
__device__ inline void BlockSum(float (&sums)[kSums], float* words) {
  const int warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = WarpSum(sums[i]);
    if (warps > 1 && lane == 0) words[i * kMaxWarps + threadIdx.x / kLanes] = sums[i];
  }
  if (warps == 1) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    sums[i] = WarpSum(lane < warps ? words[i * kMaxWarps + lane] : 0.0f);
}

// ---- Ring kernel --------------------------------------------------------------------------------

// Writes one tile of results. `chunk(index)` gives the tile's chunk of that number, `stage` is the
// warp's own shared memory. kN: N where it is known, and 8-bit results; 1 for no lifting; 0 for
// p.n.
template <int kN, int kSteps, bool kClip, typename In, typename Out, typename ChunkOf>
__device__ inline void EmitTile(const RingParams& p, int64_t row, int tile, char* stage,
                                float factor, const ChunkOf& chunk) {
  const int n = kN ? kN : p.n, steps = kSteps ? kSteps : p.steps;
  const int lane = threadIdx.x % kLanes;
  const auto at = [&](int step) { return chunk(step * kLanes + lane); };
  Out* const out = static_cast<Out*>(p.lifted) + row * p.lifted_columns;
  if (n == 1 && (sizeof(Out) > 1 || p.out_aligned)) {
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const int column = (tile * steps + step) * kLanes * kChunk + lane * kChunk;
      StoreChunk(out, column, Convert<In, Out, kClip>(at(step), factor), p.lifted_columns,
                 p.out_aligned);
    }
    return;
  }
  __syncwarp();  // the tile before has left shared memory
  if constexpr (kN > 1) {
    constexpr int kChunks = LaneChunks(kN);
#pragma unroll
    for (int part = 0; part < kSteps / kChunks; ++part) {
      uint32_t codes[2 * kChunks];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const Chunk<Out> eight =
            Convert<In, Out, kClip>(chunk((part * kLanes + lane) * kChunks + i), factor);
        codes[2 * i] = eight.word[0], codes[2 * i + 1] = eight.word[1];
      }
      StageGroups<kN>(stage, part * kLanes + lane, codes);
    }
  } else {
    Chunk<Out> next = Convert<In, Out, kClip>(at(0), factor);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const Chunk<Out> codes = next;
      if (step + 1 < steps) next = Convert<In, Out, kClip>(at(step + 1), factor);
      StageLifted(stage, step * kLanes + lane, codes, next, n);
    }
  }
  __syncwarp();
  const int bytes = TileBytes(n, steps, sizeof(Out));
  const int rest = p.lifted_columns * static_cast<int>(sizeof(Out)) -
                   tile * bytes;  // of the row, from this tile on
  char* const to = reinterpret_cast<char*>(out) + static_cast<int64_t>(tile) * bytes;
  if (n == 1)
    StoreTileAnywhere(to, stage, min(rest, bytes));
  else
    StoreTile(to + 16 * lane, stage + 16 * lane, rest - 16 * lane, bytes - 16 * lane, bytes);
}

// One row to a thread block of `warps` warps. kN: N, 1 for no lifting, 0 for p.n.
template <typename In, typename Out, int kN, typename Prologue>
__global__ void __launch_bounds__(kLanes* kMaxWarps) RingKernel(const RingParams p) {
  extern __shared__ __align__(16) char shared[];
  constexpr int kSteps = kN ? StepsOf(kN ? kN : 1) : 0;
  constexpr bool kChanges = !std::is_same_v<Prologue, NoPrologue>;
  static_assert(kQuantised<Out>);
  constexpr int kSources = Prologue::kSources;
  constexpr int kChunkBytes = kChunk * sizeof(In);
  constexpr bool kOthersChunks =
      kN > 1 && LaneChunks(kN) > 1;  // a lane converts chunks that another one has looked at
  constexpr bool kOwnCopies =
      kChunkBytes == kGranule && !kOthersChunks;  // it reads nothing but what it copied itself
  const int steps = kSteps ? kSteps : p.steps;
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int count = warp < p.tiles ? (p.tiles - warp - 1) / warps + 1
                                   : 0;  // of this warp's tiles: warp, warp + warps, ...
  const int slot_bytes = SlotBytes(p, steps, sizeof(In)), tile_bytes = kLanes * kChunkBytes * steps;
  const int64_t row_bytes = static_cast<int64_t>(p.columns) * sizeof(In);

  Begin(p);
  uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared);
  float* const sum_words = reinterpret_cast<float*>(shared) + 2 * kMaxWarps;
  char* const ring = shared + kReductionBytes + warp * p.depth * kSources * slot_bytes;
  char* const stage_tile = shared + kReductionBytes + warps * p.depth * kSources * slot_bytes +
                           warp * StageBytes(p, kN ? kN : p.n, steps, sizeof(Out));

  // Where a row begins, in its first line.
  const auto row_of = [&](int source, int64_t row) {
    return static_cast<const char*>(source == 0 ? p.x : p.prologue.second) + row * row_bytes;
  };
  const auto shift_of = [](const char* x) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(x) % kLine);
  };
  // Asks for this warp's tile number `i` of a row, if there is such a row. A group of copies in any
  // case.
  const auto fill = [&](int slot, int i, int64_t row) {
    if (row < p.rows) {
#pragma unroll
      for (int source = 0; source < kSources; ++source) {
        const char* const x = row_of(source, row);
        const int shift = p.x_aligned ? 0 : shift_of(x);
        const int first = shift / kGranule * kGranule,
                  end =
                      shift + static_cast<int>(row_bytes);  // these granules hold a byte of the row
        const int begin = (warp + i * warps) * tile_bytes;
        char* const to = ring + (slot * kSources + source) * slot_bytes;
        const auto copy = [&](int offset) {
          const bool wanted =
              static_cast<unsigned>(begin + offset - first) < static_cast<unsigned>(end - first);
          CopyGranule(to + offset, x - shift + (wanted ? begin + offset : first), wanted);
        };
#pragma unroll
        for (int step = 0; step < steps; ++step) {
#pragma unroll
          for (int part = 0; part < kChunkBytes; part += kGranule)
            copy(step * kLanes * kChunkBytes + part * kLanes + lane * kGranule);
        }
        if (!p.x_aligned && lane < kLine / kGranule) copy(tile_bytes + lane * kGranule);
      }
    }
    CommitCopies();
  };
  // The granules of chunk number `index` of the tile in a slot.
  const auto chunk_at = [&](int slot, int source, int index) {
    return reinterpret_cast<uint4*>(ring + (slot * kSources + source) * slot_bytes +
                                    index * kChunkBytes);
  };
  const auto read = [](const uint4* from) {
    Chunk<In> chunk;
#pragma unroll
    for (int i = 0; i < Chunk<In>::kWords / 4; ++i) {
      const uint4 v = from[i];
      chunk.word[4 * i] = v.x, chunk.word[4 * i + 1] = v.y, chunk.word[4 * i + 2] = v.z,
                     chunk.word[4 * i + 3] = v.w;
    }
    return chunk;
  };
  const auto write = [](uint4* to, const Chunk<In>& chunk) {
#pragma unroll
    for (int i = 0; i < Chunk<In>::kWords / 4; ++i) {
      to[i] = {chunk.word[4 * i], chunk.word[4 * i + 1], chunk.word[4 * i + 2],
               chunk.word[4 * i + 3]};
    }
  };
  const auto column_of = [&](int i, int index) {
    return ((warp + i * warps) * steps * kLanes + index) * kChunk;
  };

  const int64_t stride = gridDim.x;
  int next = 0;  // what is to be asked for: this tile of this row
  int64_t next_row = blockIdx.x;
  const auto refill = [&](int slot) {
    fill(slot, next, next_row);
    if (++next == count) next = 0, next_row += stride;
  };
  for (int slot = 0; slot < p.depth; ++slot) refill(slot);
  const auto after = [&](int slot) { return slot + 1 == p.depth ? 0 : slot + 1; };
  int first = 0, turn = 0;  // slot of the row's first tile
  for (int64_t row = blockIdx.x; row < p.rows; row += stride) {
    WaitForCopies(min(p.depth - count, kMaxPending));
    if (!kOwnCopies || !p.x_aligned) __syncwarp();
    // A chunk of the row's i-th tile as x has it.
    const auto raw = [&](int slot, int i, int source, int index) {
      const uint4* at = chunk_at(slot, source, index);
      if (p.x_aligned) return read(at);
      const int shift = shift_of(row_of(source, row));
      at += shift / kGranule;
      return Masked(Shifted<In>(shift % kGranule, [&](int granule) { return at[granule]; }),
                    p.columns - column_of(i, index));
    };
    // Puts the lane's chunk where `raw` read it, from now on in place.
    const auto put = [&](int slot, int index, const Chunk<In>& chunk) {
      if (!p.x_aligned) __syncwarp();
      write(chunk_at(slot, 0, index), chunk);
    };

    Prologue prologue;
    int slot = first;
    if constexpr (Prologue::kSums > 0) {
      float sums[Prologue::kSums] = {};
      for (int i = 0; i < count; ++i, slot = after(slot)) {
#pragma unroll
        for (int step = 0; step < steps; ++step) {
          const int index = step * kLanes + lane;
          const Chunk<In> x = raw(slot, i, 0, index);
          prologue.Sum(x, sums);
          if (!p.x_aligned) put(slot, index, x);
        }
      }
      BlockSum(sums, sum_words);
      prologue.Finish(sums, p.prologue);
      slot = first;
    }
    AbsMax<In> absmax;
    for (int i = 0; i < count; ++i, slot = after(slot)) {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int index = step * kLanes + lane;
        Chunk<In> x = Prologue::kSums > 0 ? read(chunk_at(slot, 0, index)) : raw(slot, i, 0, index);
        if constexpr (kChanges) {
          Chunk<In> second = {};
          if constexpr (kSources > 1) second = raw(slot, i, 1, index);
          x = prologue.Apply(x, second, column_of(i, index), p.prologue);
        }
        absmax.Add(x);
        if (kChanges || !p.x_aligned) put(slot, index, x);
      }
    }
    if (kOthersChunks) __syncwarp();
    const RowScale s = ScaleOf<Out>(BlockMax(absmax.Bits(), maxima + turn * kMaxWarps));
    if (threadIdx.x == 0) p.scale[row] = s.scale;

    slot = first;
    for (int i = 0; i < count; ++i, slot = after(slot)) {
      EmitTile<kN, kSteps, false, In, Out>(
          p, row, warp + i * warps, stage_tile, s.factor,
          [&](int index) { return read(chunk_at(slot, 0, index)); });
      if (!kOwnCopies) __syncwarp();
      refill(slot);
    }
    first = slot;
    turn ^= 1;
  }
}

// ---- Launching ----------------------------------------------------------------------------------

struct RingDevice {
  int multiprocessors;
  int shared_of_block;
  int shared_of_multiprocessor;
};

inline cudaError_t CurrentDevice(RingDevice* device) {
  thread_local int known = -1;  // asked for once; again where a thread changes devices
  thread_local RingDevice copy;
  int current = 0;
  if (const cudaError_t status = cudaGetDevice(&current); status != cudaSuccess) return status;
  if (current != known) {
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, current);
    };
    cudaError_t status = ask(&copy.multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status == cudaSuccess)
      status = ask(&copy.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (status == cudaSuccess)
      status = ask(&copy.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    if (status != cudaSuccess) return status;
    known = current;
  }
  *device = copy;
  return cudaSuccess;
}

// Tiles of a row that a warp has, at most; and no more warps than share them evenly.
inline int TilesOfWarp(const RingParams& p, int warps) { return (p.tiles + warps - 1) / warps; }
inline int EvenWarps(const RingParams& p, int warps) {
  return TilesOfWarp(p, TilesOfWarp(p, std::max(1, std::min(warps, p.tiles))));
}

// What a multiprocessor works best with if all of it fits: measured,
// docs/journal/2026-11-24-lift.md. It wants enough bytes on their way, and what is asked for
// further ahead only comes between the stores.
struct RingWish {
  int blocks;
  int warps;      // of a block
  int rows;       // of a block that are in the ring at once, at most
  int64_t ahead;  // bytes of the rings of all blocks, at most
};

inline RingWish WishFor(const RingParams& p, int sources, int64_t row_bytes,
                        const RingDevice& device) {
  constexpr int kWarps = 32;
  constexpr int kManyRows = 16;
  const int64_t all = device.shared_of_multiprocessor,
                fewest_rows = p.rows / device.multiprocessors;
  const auto even = [&](int warps) { return EvenWarps(p, warps); };
  RingWish wish = {1, 1, kMaxStages, all};
  const bool normed = p.prologue.weight != nullptr;
  if (normed || sources > 1 || !p.x_aligned) {
    // Rows are shifted, gated or normed before they are converted: all warps work, on a row for
    // each block.
    wish.warps = even(std::min(p.tiles > 7 * sources ? (p.tiles + 1) / 2 : p.tiles, kWarps));
    wish.blocks = kWarps / wish.warps;
    if (normed && p.x_aligned) wish.rows = 1;
  } else if (fewest_rows >= kManyRows) {
    // One block of rows that are long, three of shorter ones, else as many as hold 64 KB.
    const bool fours = p.n % 4 == 0;  // N: it decides how a warp's chunks fall on its lanes
    wish.ahead = 88 << 10;
    if (row_bytes >= (fours ? 21 : 32) << 10) {
      const bool two_are_too_many = row_bytes <= wish.ahead && 2 * row_bytes > wish.ahead;
      wish.warps = even(two_are_too_many ? kWarps / 3 : kWarps / 2);
      if (two_are_too_many) wish.ahead = 104 << 10;
    } else if (row_bytes >= (fours ? 16 : 20) << 10) {
      wish.blocks = 3;
      wish.warps = even((p.tiles + 1) / 2);
    } else {
      wish.blocks =
          static_cast<int>(std::min<int64_t>(((64 << 10) + row_bytes / 2) / row_bytes, kWarps));
      wish.warps = even(kWarps / wish.blocks);
      wish.rows = 1;
    }
  } else {
    // As many blocks as leave each two rows. Four hide each other's copies.
    while (wish.blocks < kWarps && 4 * wish.blocks * row_bytes <= all) wish.blocks *= 2;
    wish.warps = even(kWarps / wish.blocks);
    if (wish.blocks >= 4) wish.rows = 1;
  }
  if (fewest_rows < wish.blocks)
    wish.warps = even(static_cast<int>(kWarps / std::max<int64_t>(1, fewest_rows)));
  return wish;
}

// Warps of a block, and blocks of a multiprocessor. Fills p.depth; returns 0 warps if a row does
// not fit.
struct RingGeometry {
  int warps;
  int blocks;
  int bytes;
};

inline RingGeometry ChooseGeometry(RingParams& p, int sources, int in_bytes, int out_bytes,
                                   const RingDevice& device) {
  constexpr int kReserved = 1024;  // of shared memory, for each block
  constexpr int kFewWarps = 8;
  const int64_t tile_bytes = sources * SlotBytes(p, p.steps, in_bytes);
  const RingWish wish = WishFor(p, sources, p.tiles * tile_bytes, device);
  int blocks = wish.blocks, warps = wish.warps, rows;  // rows: of a block, in the ring at once
  const auto bytes = [&](int warps, int depth) {
    return BlockBytes(p, warps, sources, in_bytes, out_bytes, depth);
  };
  const auto fits = [&](int64_t needed) {
    return needed <= device.shared_of_block &&
           blocks * (needed + kReserved) <= device.shared_of_multiprocessor;
  };
  const auto deepest = [&] {
    const int own = TilesOfWarp(p, warps);
    while (!fits(bytes(warps, own)) && blocks > 1) --blocks;
    const int64_t waves =
        (p.rows + device.multiprocessors * blocks - 1) / (device.multiprocessors * blocks);
    rows = static_cast<int>(std::min<int64_t>(wish.rows, waves));
    p.depth = std::min(rows * own, own + kMaxPending);
    const auto too_deep = [&] {
      const bool nothing_ahead = blocks == 1 && p.depth <= own + 1;  // if it were less
      return !fits(bytes(warps, p.depth)) ||
             (!nothing_ahead && blocks * warps * p.depth * tile_bytes > wish.ahead);
    };
    while (p.depth > own && too_deep()) --p.depth;
  };
  const auto half = [&] { return EvenWarps(p, warps / 2); };
  const auto halve = [&] { warps = half(), deepest(); };
  deepest();
  // Where a row leaves room for no more, fewer staged tiles.
  while (warps > 1 && !fits(bytes(warps, p.depth))) halve();
  const auto halved_fits = [&] { return fits(bytes(half(), TilesOfWarp(p, half()))); };
  while (blocks == 1 && warps > kFewWarps && rows > 1 && p.depth == TilesOfWarp(p, warps) &&
         halved_fits())
    halve();
  const int64_t needed = bytes(warps, p.depth);
  if (needed > device.shared_of_block) return {0, 0, 0};
  return {warps, blocks, static_cast<int>(needed)};
}

template <typename In, typename Out, int kN, typename Prologue>
cudaError_t LaunchRing(RingParams p, const RingDevice& device, const RingGeometry& geometry,
                       cudaStream_t stream) {
  const auto kernel = RingKernel<In, Out, kN, Prologue>;
  if (geometry.bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.bytes);
    if (status != cudaSuccess) return status;
  }
  const int64_t blocks =
      std::min<int64_t>(p.rows, static_cast<int64_t>(device.multiprocessors) * geometry.blocks);
  void* arguments[] = {&p};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(kLanes * geometry.warps), arguments, geometry.bytes, stream);
}

// The kernel for p.n: one of its own where models use it, else the one that reads N.
template <typename In, typename Out, typename Prologue>
cudaError_t LaunchRingForN(const RingParams& p, const RingDevice& device,
                           const RingGeometry& geometry, cudaStream_t stream) {
  constexpr bool kPlain = std::is_same_v<Prologue, NoPrologue>;
  if constexpr (kPlain || std::is_same_v<In, __nv_bfloat16>) {
    if (p.n == 1) return LaunchRing<In, Out, 1, Prologue>(p, device, geometry, stream);
    if (p.n == 4) return LaunchRing<In, Out, 4, Prologue>(p, device, geometry, stream);
  }
  if constexpr (kPlain && sizeof(In) == 2) {
    switch (p.n) {
      case 2: return LaunchRing<In, Out, 2, Prologue>(p, device, geometry, stream);
      case 3: return LaunchRing<In, Out, 3, Prologue>(p, device, geometry, stream);
      case 5: return LaunchRing<In, Out, 5, Prologue>(p, device, geometry, stream);
      case 6: return LaunchRing<In, Out, 6, Prologue>(p, device, geometry, stream);
      case 7: return LaunchRing<In, Out, 7, Prologue>(p, device, geometry, stream);
      case 8: return LaunchRing<In, Out, 8, Prologue>(p, device, geometry, stream);
      default: break;
    }
  }
  return LaunchRing<In, Out, 0, Prologue>(p, device, geometry, stream);
}

// launch(T{}) with the C++ type of a dtype: of x and of casts, and of codes.
template <typename Launch>
cudaError_t WithFloat(DType type, const Launch& launch) {
  switch (type) {
    case DType::kBF16: return launch(__nv_bfloat16{});
    case DType::kF16: return launch(__half{});
    case DType::kF32: return launch(float{});
    default: return cudaErrorInvalidValue;
  }
}
template <typename Launch>
cudaError_t WithCode(DType type, const Launch& launch) {
  switch (type) {
    case DType::kS8: return launch(int8_t{});
    case DType::kE4M3: return launch(__nv_fp8_e4m3{});
    default: return cudaErrorInvalidValue;
  }
}

inline RingParams RingParamsOf(const LiftArgs& a) {
  RingParams p = {};
  p.x = a.x, p.lifted = a.lifted, p.scale = a.scale, p.rows = a.rows;
  p.columns = static_cast<int>(a.columns), p.lifted_columns = static_cast<int>(a.lifted_columns);
  p.n = a.group == 0 ? 1 : a.group / 2;
  p.steps = StepsOf(p.n);
  const int64_t tile_columns = kLanes * kChunk * p.steps;
  const int64_t padded = p.n == 1 ? a.lifted_columns : a.lifted_columns / (4 * (p.n - 1)) * 2 * p.n;
  p.tiles = static_cast<int>(std::max<int64_t>(1, (padded + tile_columns - 1) / tile_columns));
  const auto aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kGranule == 0;
  };
  p.x_aligned = a.columns % kChunk == 0 && aligned(a.x) &&
                aligned(a.up);  // up is nullptr where there is none
  p.out_aligned = a.lifted_columns % kChunk == 0 && aligned(a.lifted);
  p.prologue = {a.up,      a.weight,    a.bias, a.eps, 1.0f / static_cast<float>(a.columns),
                p.columns, a.activation};
  p.counters = a.counters, p.counter_count = a.counter_count;
  return p;
}

}  // namespace slidejax

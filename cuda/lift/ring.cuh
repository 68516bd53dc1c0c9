// The ring kernel: rows pass through a ring in shared memory, where a prologue is applied in place.
//
// The time is that of the bytes moved, so x is read once, and reading never pauses. Thread blocks
// are persistent, take rows in turn, and hold a ring of rows. A row's *tiles* (store.cuh) are dealt
// out to the block's warps. For each row a warp
//   1. waits for its tiles of the row (asynchronous copies; a lane mostly reads what it has copied
//      itself, without a barrier),
//   2. applies the prologue, if there is one, and finds absmax,
//   3. agrees on absmax with the block's other warps, at the one barrier of a row (norms have two),
//   4. converts, lifts and stores its tiles. As soon as a tile is read, it asks for the tile that
//      comes `depth` tiles later, so that reading goes on under the conversion and the stores.
// Rows that start at any address arrive as the 16-byte granules that cover them, from the beginning
// of a line on so that each copy of a warp is whole lines. They are shifted into place in step 2.
#pragma once

#include "lift/chunk.cuh"
#include "lift/geometry.h"
#include "lift/prologue.cuh"
#include "lift/ptx.cuh"
#include "lift/store.cuh"

namespace slidejax::lift {

struct RingParams : RowShape {
  const void* x;
  void* lifted;
  float* scale;
  int columns;
  int lifted_columns;
  int64_t x_stride;  // bytes from a row of each source to the next
  int depth;         // RingGeometry::depth
  PrologueParams prologue;
  unsigned long long* counters;  // for the next kernel
  int counter_count;
  bool behind;  // Args::behind
};

// Both kernels begin with this. The counters are those of the next kernel alone, so they need not
// wait. Every block waits for the kernel ahead, so that the end of this one means the end of all
// before it.
__device__ inline void Begin(const RingParams& p) {
  GridRelease();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.counter_count; i += blockDim.x) p.counters[i] = 0;
  }
  if (p.behind) GridWait();
}

// ---- Reductions over a thread block -------------------------------------------------------------

__device__ inline float WarpSum(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__device__ inline uint32_t BlockMax(uint32_t bits, uint32_t* words) {
  bits = __reduce_max_sync(kAllLanes, bits);
  const int warps = blockDim.x / kLanes, lane = threadIdx.x % kLanes;
  if (warps == 1) return bits;
  if (lane == 0) words[threadIdx.x / kLanes] = bits;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < warps ? words[lane] : 0);
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

// Writes one tile of results. chunk(index) gives the tile's chunk of that number; stage is the
// warp's own shared memory. kN: N where it is known and results are 8-bit, 1 for no lifting, 0 for
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
  // Bytes of the row from this tile on.
  const int rest = p.lifted_columns * static_cast<int>(sizeof(Out)) - tile * bytes;
  char* const to = reinterpret_cast<char*>(out) + static_cast<int64_t>(tile) * bytes;
  if (n == 1)
    StoreTileAnywhere(to, stage, min(rest, bytes));
  else
    StoreTile(to + 16 * lane, stage + 16 * lane, rest - 16 * lane, bytes - 16 * lane, bytes);
}

// A warp's part of the ring. Its tiles of a row are number warp, warp + warps, ...; tile number i
// of the warp is tile warp + i * warps of the row. A slot of the ring holds one tile of each
// source. kSteps: RowShape::steps where it is known, else 0.
template <typename In, int kSources, int kSteps>
class WarpRing {
 public:
  static constexpr int kChunkBytes = kChunk * sizeof(In);

  __device__ __forceinline__ WarpRing(const RingParams& p, char* rings)
      : p_(p),
        steps_(kSteps ? kSteps : p.steps),
        warps_(blockDim.x / kLanes),
        warp_(threadIdx.x / kLanes),
        lane_(threadIdx.x % kLanes),
        count_(warp_ < p.tiles ? (p.tiles - warp_ - 1) / warps_ + 1 : 0),
        slot_bytes_(SlotBytes(p, steps_, sizeof(In))),
        tile_bytes_(kLanes * kChunkBytes * steps_),
        row_bytes_(static_cast<int64_t>(p.columns) * sizeof(In)),
        ring_(rings + warp_ * p.depth * kSources * slot_bytes_),
        stride_(gridDim.x),
        next_row_(blockIdx.x) {}

  __device__ __forceinline__ int count() const { return count_; }  // tiles of a row
  __device__ __forceinline__ int After(int slot) const {
    return slot + 1 == p_.depth ? 0 : slot + 1;
  }
  __device__ __forceinline__ int ColumnOf(int i, int index) const {
    return ((warp_ + i * warps_) * steps_ * kLanes + index) * kChunk;
  }

  // Asks for the next tile, into a slot.
  __device__ __forceinline__ void Refill(int slot) {
    Fill(slot, next_, next_row_);
    if (++next_ == count_) next_ = 0, next_row_ += stride_;
  }

  // Returns chunk number `index` of the tile in a slot, as Put has written it. Where nothing
  // was put, that is as it has arrived.
  __device__ __forceinline__ Chunk<In> Read(int slot, int index) const {
    return ReadAt(ChunkAt(slot, 0, index));
  }
  // Returns that chunk as it has arrived. The tile in the slot is the warp's i-th of the row.
  __device__ __forceinline__ Chunk<In> ReadRaw(int64_t row, int slot, int i, int source,
                                               int index) const {
    const uint4* at = ChunkAt(slot, source, index);
    if (p_.x_aligned) return ReadAt(at);
    const int shift = ShiftOf(RowOf(source, row));
    at += shift / kGranule;
    return Masked(Shifted<In>(shift % kGranule, [&](int granule) { return at[granule]; }),
                  p_.columns - ColumnOf(i, index));
  }
  // Writes the lane's chunk to the place where ReadRaw has found it. From then on Read finds it.
  __device__ __forceinline__ void Put(int slot, int index, const Chunk<In>& chunk) {
    if (!p_.x_aligned) __syncwarp();
    uint4* const to = ChunkAt(slot, 0, index);
#pragma unroll
    for (int i = 0; i < Chunk<In>::kWords / 4; ++i) {
      to[i] = {chunk.word[4 * i], chunk.word[4 * i + 1], chunk.word[4 * i + 2],
               chunk.word[4 * i + 3]};
    }
  }

 private:
  __device__ __forceinline__ const char* RowOf(int source, int64_t row) const {
    return static_cast<const char*>(source == 0 ? p_.x : p_.prologue.second) + row * p_.x_stride;
  }
  // Bytes from the beginning of a row's first line to the row.
  __device__ __forceinline__ static int ShiftOf(const char* x) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(x) % kLine);
  }
  // The granules of chunk number `index` of the tile in a slot.
  __device__ __forceinline__ uint4* ChunkAt(int slot, int source, int index) const {
    return reinterpret_cast<uint4*>(ring_ + (slot * kSources + source) * slot_bytes_ +
                                    index * kChunkBytes);
  }
  __device__ __forceinline__ static Chunk<In> ReadAt(const uint4* from) {
    Chunk<In> chunk;
#pragma unroll
    for (int i = 0; i < Chunk<In>::kWords / 4; ++i) {
      const uint4 v = from[i];
      chunk.word[4 * i] = v.x, chunk.word[4 * i + 1] = v.y;
      chunk.word[4 * i + 2] = v.z, chunk.word[4 * i + 3] = v.w;
    }
    return chunk;
  }

  // Asks for tile number `i` of a row, if there is such a row. Commits a group of copies even if
  // there is none.
  __device__ __forceinline__ void Fill(int slot, int i, int64_t row) {
    if (row < p_.rows) {
#pragma unroll
      for (int source = 0; source < kSources; ++source) {
        const char* const x = RowOf(source, row);
        const int shift = p_.x_aligned ? 0 : ShiftOf(x);
        // The granules from `first` on and before `end` hold a byte of the row.
        const int first = shift / kGranule * kGranule;
        const int end = shift + static_cast<int>(row_bytes_);
        const int begin = (warp_ + i * warps_) * tile_bytes_;
        char* const to = ring_ + (slot * kSources + source) * slot_bytes_;
        const auto copy = [&](int offset) {
          const bool wanted =
              static_cast<unsigned>(begin + offset - first) < static_cast<unsigned>(end - first);
          CopyGranule(to + offset, x - shift + (wanted ? begin + offset : first), wanted);
        };
#pragma unroll
        for (int step = 0; step < steps_; ++step) {
#pragma unroll
          for (int part = 0; part < kChunkBytes; part += kGranule) {
            copy(step * kLanes * kChunkBytes + part * kLanes + lane_ * kGranule);
          }
        }
        if (!p_.x_aligned && lane_ < kLine / kGranule) copy(tile_bytes_ + lane_ * kGranule);
      }
    }
    CommitCopies();
  }

  const RingParams& p_;
  const int steps_, warps_, warp_, lane_;
  const int count_, slot_bytes_, tile_bytes_;
  const int64_t row_bytes_;
  char* const ring_;
  int next_ = 0;          // the tile of row next_row_ that Refill asks for next
  const int64_t stride_;  // of the rows of a block
  int64_t next_row_;
};

// Applies the prologue to the warp's tiles of a row, from slot `first` on, in place. Returns the
// bits of their absmax.
template <typename In, typename Prologue, int kSteps, typename Ring>
__device__ __forceinline__ uint32_t PrepareRow(const RingParams& p, Ring& ring, int64_t row,
                                               int first, float* sum_words) {
  constexpr bool kChanges = !std::is_same_v<Prologue, NoPrologue>;
  const int steps = kSteps ? kSteps : p.steps, lane = threadIdx.x % kLanes;
  Prologue prologue;
  int slot = first;
  if constexpr (Prologue::kSums > 0) {
    float sums[Prologue::kSums] = {};
    for (int i = 0; i < ring.count(); ++i, slot = ring.After(slot)) {
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int index = step * kLanes + lane;
        const Chunk<In> x = ring.ReadRaw(row, slot, i, 0, index);
        prologue.Sum(x, sums);
        if (!p.x_aligned) ring.Put(slot, index, x);
      }
    }
    BlockSum(sums, sum_words);
    prologue.Finish(sums, p.prologue);
    slot = first;
  }
  AbsMax<In> absmax;
  for (int i = 0; i < ring.count(); ++i, slot = ring.After(slot)) {
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      const int index = step * kLanes + lane;
      Chunk<In> x =
          Prologue::kSums > 0 ? ring.Read(slot, index) : ring.ReadRaw(row, slot, i, 0, index);
      if constexpr (kChanges) {
        Chunk<In> second = {};
        if constexpr (Prologue::kSources > 1) second = ring.ReadRaw(row, slot, i, 1, index);
        x = prologue.Apply(x, second, ring.ColumnOf(i, index), p.prologue);
      }
      absmax.Add(x);
      if (kChanges || !p.x_aligned) ring.Put(slot, index, x);
    }
  }
  return absmax.Bits();
}

// One row to a thread block at a time. kN: N, 1 for no lifting, 0 for p.n. kSteps: p.steps where kN
// is known.
template <typename In, typename Out, int kN, typename Prologue, int kSteps>
__global__ void __launch_bounds__(kLanes* kMaxWarps) RingKernel(const RingParams p) {
  static_assert(kQuantised<Out>);
  extern __shared__ __align__(16) char shared[];
  using Ring = WarpRing<In, Prologue::kSources, kSteps>;
  // A lane converts chunks that another lane has looked at.
  constexpr bool kOthersChunks = kN > 1 && LaneChunks(kN) > 1;
  // A lane reads nothing but what it has copied itself.
  constexpr bool kOwnCopies = Ring::kChunkBytes == kGranule && !kOthersChunks;
  const int steps = kSteps ? kSteps : p.steps;
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes;

  Begin(p);
  uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared);
  float* const sum_words = reinterpret_cast<float*>(shared) + 2 * kMaxWarps;
  char* const rings = shared + kReductionBytes;
  const int ring_bytes = p.depth * Prologue::kSources * SlotBytes(p, steps, sizeof(In));
  char* const stage =
      rings + warps * ring_bytes + warp * StageBytes(p, kN ? kN : p.n, steps, sizeof(Out));

  const int64_t stride = gridDim.x;
  Ring ring(p, rings);
  for (int slot = 0; slot < p.depth; ++slot) ring.Refill(slot);
  int first = 0, turn = 0;  // slot of the row's first tile; which set of maxima
  for (int64_t row = blockIdx.x; row < p.rows; row += stride) {
    WaitForCopies(min(p.depth - ring.count(), kMaxPending));
    if (!kOwnCopies || !p.x_aligned) __syncwarp();
    const uint32_t bits = PrepareRow<In, Prologue, kSteps>(p, ring, row, first, sum_words);
    if (kOthersChunks) __syncwarp();
    const RowScale s = ScaleOf<Out>(BlockMax(bits, maxima + turn * kMaxWarps));
    if (threadIdx.x == 0) p.scale[row] = s.scale;

    int slot = first;
    for (int i = 0; i < ring.count(); ++i, slot = ring.After(slot)) {
      EmitTile<kN, kSteps, false, In, Out>(p, row, warp + i * warps, stage, s.factor,
                                           [&](int index) { return ring.Read(slot, index); });
      if (!kOwnCopies) __syncwarp();
      ring.Refill(slot);
    }
    first = slot;
    turn ^= 1;
  }
}

}  // namespace slidejax::lift

// The kernel for 3 to 16 rows of x and values of 8 bits, where the codes of all rows fit in shared
// memory. docs/decode-kernel.md says why it is built so.
//
// A thread block has a run of tiles of 16 outputs and multiplies them over all of K, with up to
// eight rows of x; more rows are two groups with thread blocks of their own. It converts its rows
// itself, so nothing runs ahead of it. An item is a step of K of a tile. Each warp takes a run of
// the block's items, in the order of tiles and of K, through a ring of its own. It adds its sums to
// those of the block where a tile of its run ends, and all threads write y at the end. Sums of
// int32 do not depend on their order, so all warps add theirs to one. Each warp keeps its own
// float32 sums, which are added in the warps' order.
#pragma once

#include "decode/decode.h"
#include "decode/multiply.cuh"
#include "decode/params.h"
#include "decode/ptx.cuh"
#include "decode/results.cuh"
#include "decode/skinny_plan.h"
#include "decode/stage.cuh"
#include "decode/tiles.cuh"

namespace slidejax::decode {

template <typename Code, int kWindows>
class Skinny : Multiplier<Code, kWindows, 1> {
  using Base = Multiplier<Code, kWindows, 1>;
  using Base::codes_, Base::lane_, Base::ring_, Base::ring_address_, Base::sums_of_,
      Base::token_bytes_;

 public:
  using Base::kShape;
  using Sum = SumOf<Code>;
  static constexpr int kDepth = kShape.depth();
  static constexpr bool kFloats = std::is_same_v<Sum, float>;

  __device__ Skinny(const Params& p, uint8_t* shared)
      : p_(p),
        first_row_(blockIdx.y * p.group_rows),
        rows_(min(p.group_rows, p.a.M - first_row_)),
        warp_(threadIdx.x / kLanes),
        first_tile_(blockIdx.x * p.tiles_each + min(static_cast<int>(blockIdx.x), p.tiles_more)),
        tiles_(p.tiles_each + (static_cast<int>(blockIdx.x) < p.tiles_more)),
        copies_(p, first_tile_),
        results_(p, first_row_, rows_, first_tile_, tiles_, SumStride(p.block_rows),
                 SumParts(kFloats, p.warps)) {
    const DecodeArgs& a = p.a;
    token_bytes_ = TokenBytes(kShape, p.steps);
    ring_ = shared + warp_ * kDepth * kShape.slot_bytes();
    ring_address_ = SharedAddress(ring_);
    shared += p.warps * kDepth * kShape.slot_bytes();
    codes_ = shared;
    shared += (p.group_rows * token_bytes_ + 127) / 128 * 128;
    norm_ = reinterpret_cast<float4*>(shared);
    shared += a.norm != nullptr ? a.columns * 4 : 0;
    staged_ = p.row_pieces > 0 ? reinterpret_cast<uint4*>(shared) : nullptr;
    shared += p.row_pieces * 16;
    results_.sums = reinterpret_cast<Sum*>(shared);
    results_.scale_w = reinterpret_cast<float*>(results_.sums + results_.Words());
    warp_words_ = reinterpret_cast<uint32_t*>(results_.scale_w + 2 * p.block_rows);
    results_.scale_x = reinterpret_cast<float*>(warp_words_ + 2 * kMaxWarps);
  }

  __device__ void Run() {
    const DecodeArgs& a = p_.a;
    AskForNorm(a, reinterpret_cast<uint8_t*>(norm_));
    results_.AskForScales();
    CommitCopies();
    // The warp's run of the block's items.
    const int items = tiles_ * p_.steps;
    const int begin = warp_ < p_.warps ? items * warp_ / p_.warps : items;
    const int end = warp_ < p_.warps ? items * (warp_ + 1) / p_.warps : items;
    const Place first = {begin / p_.steps, begin % p_.steps};
    Place ask = first;
    int left_to_ask = end - begin;
#pragma unroll 1
    for (int slot = 0; slot < kDepth - 1; ++slot) Load(ask, left_to_ask, slot);
    for (int i = threadIdx.x; i < results_.Words(); i += blockDim.x) results_.sums[i] = 0;
    GridWait();
    GridRelease();
    const float residual = results_.ResidualOf(threadIdx.x);  // a long way ahead of its use
    WaitForCopies<kDepth - 1>();
    __syncthreads();  // the norm's weights are there
    WithTypeOfX(a.x_type, [&](auto x) { ConvertRows<decltype(x)>(); });
    __syncthreads();
    Place at = first;
    int slot = 0;
#pragma unroll 1
    for (int left = end - begin; left > 0; --left) {
      WaitForCopies<kDepth - 2>();
      __syncwarp();
      Load(ask, left_to_ask, slot == 0 ? kDepth - 1 : slot - 1);
      Base::Multiply(slot, at.step, rows_);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
      const int tile = at.tile;
      Advance(at);
      if (at.tile != tile || left == 1) Contribute(tile);
    }
    __syncthreads();
    results_.Write(residual);
  }

 private:
  // A step of a tile of the block.
  struct Place {
    int tile, step;
  };

  __device__ void Advance(Place& at) const {
    if (++at.step == p_.steps) at.step = 0, ++at.tile;
  }

  // Asks for an item, or for nothing at the end, and goes on to the next.
  __device__ void Load(Place& at, int& left, int slot) const {
    if (left > 0) {
      copies_.Ask(at.tile, at.step, ring_address_ + slot * kShape.slot_bytes());
      Advance(at), --left;
    }
    CommitCopies();
  }

  // ---- x ----------------------------------------------------------------------------------------

  // The thread's share of a row of x, in chunks. They are read from memory, and again from shared
  // memory where there is room for them. Bodies of loops are short and run often: the instructions
  // of a longer body arrive too slowly.
  template <typename T>
  struct RowChunks {
    static constexpr int kParts = sizeof(T) / 2;  // of a chunk, of 16 bytes each

    const RowShare& at;
    const uint4* from;
    uint4* staged;  // or null
    int chunks;     // of the row

    // Calls visit(index, chunk) for the thread's chunks, with zeros from the end of the row up to
    // chunk number `all`. The first time they come from farther away, so more are asked for at
    // once.
    template <bool kAgain, typename Visit>
    __device__ void Each(int all, const Visit& visit) const {
      constexpr int kAtOnce = (kAgain ? 2 : 4) / kParts;
#pragma unroll 1
      for (int first = at.first; first < all; first += kAtOnce * at.stride) {
        uint4 v[kAtOnce][kParts] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int index = first + i * at.stride;
          if (index >= chunks) continue;
#pragma unroll
          for (int k = 0; k < kParts; ++k)
            v[i][k] = kAgain && staged != nullptr ? staged[index * kParts + k]
                                                  : __ldcg(from + index * kParts + k);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int index = first + i * at.stride;
          if (index < all) visit(index, ChunkOf<T>(v[i]));
        }
      }
    }

    __device__ void Keep(int index, const Chunk<T>& chunk) const {
      if (staged == nullptr) return;
#pragma unroll
      for (int k = 0; k < kParts; ++k)
        staged[index * kParts + k] = {chunk.word[4 * k], chunk.word[4 * k + 1],
                                      chunk.word[4 * k + 2], chunk.word[4 * k + 3]};
    }
  };

  template <typename T>
  __device__ void ConvertRows() {
    constexpr int kStepChunks = kStepBlocks * kShape.block_columns() / kChunk;
    const DecodeArgs& a = p_.a;
    const RowShare at(p_.log_share);
    const bool there = at.row < rows_;
    const int chunks = there ? a.columns / kChunk : 0, pieces = a.columns * sizeof(T) / 16;
    const RowChunks<T> row = {
        at, static_cast<const uint4*>(a.x) + int64_t{first_row_ + at.row} * pieces,
        staged_ == nullptr ? nullptr : staged_ + at.row * pieces, chunks};
    lift::RmsNormPrologue norm;
    const bool normalises = a.norm != nullptr;
    const auto normalised = [&](int index, const Chunk<T>& x) {
      const float4 low = norm_[2 * index], high = norm_[2 * index + 1];
      return norm.Apply(x, {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
    };
    AbsMax<T> most;
    float sums[1] = {};
    row.template Each<false>(chunks, [&](int index, const Chunk<T>& x) {
      if (normalises)
        norm.Sum(x, sums);
      else
        most.Add(x);
      row.Keep(index, x);
    });
    if (normalises) {
      sums[0] = RowSum(at, sums[0], reinterpret_cast<float*>(warp_words_ + kMaxWarps));
      norm.Finish(sums, NormOf(a));
      row.template Each<true>(chunks, [&](int index, const Chunk<T>& x) {
        const Chunk<T> y = normalised(index, x);
        most.Add(y);
        row.Keep(index, y);
      });
    }
    const RowScale scale = ScaleOf<Code>(RowMax(at, most.Bits(), warp_words_));
    if (there && at.first == 0) results_.scale_x[at.row] = scale.scale;
    uint8_t* token = codes_ + at.row * token_bytes_;
    const bool again = normalises && staged_ == nullptr;
    row.template Each<true>(there ? p_.steps * kStepChunks : 0, [&](int index, const Chunk<T>& x) {
      const Chunk<T> y = again && index < chunks ? normalised(index, x) : x;
      PlaceChunk<kWindows>(token, index, lift::Convert<T, Code, false>(y, scale.factor));
    });
  }

  // ---- Sums -------------------------------------------------------------------------------------

  // Leaves the warp's sums of a tile in shared memory.
  __device__ void Contribute(int tile) {
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = 2 * t + i % 2, row = tile * kTileRows + g + 8 * (i / 2);
      Sum &even = sums_of_[0][0].v[i], &odd = sums_of_[0][1].v[i];
      const Sum sum = even + odd;
      even = odd = 0;
      if (m >= rows_) continue;
      if constexpr (kFloats) {
        results_.SumsOf(warp_, m)[row] = sum;
      } else {
        AddShared(results_.SumsOf(0, m) + row, sum);
      }
    }
  }

  const Params& p_;
  const int first_row_, rows_;  // of x, which the block multiplies
  const int warp_, first_tile_, tiles_;
  const TileCopies<Code, kWindows> copies_;
  float4* norm_;
  uint4* staged_;  // x between two passes, or null
  uint32_t* warp_words_;
  BlockResults<Sum, kTileRows> results_;
};

template <typename Code, int kWindows>
__global__ void __launch_bounds__(Shape{kWindows, sizeof(Code)}.block_warps() * kLanes, 1)
    SkinnyKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t decode_shared[];
  Skinny<Code, kWindows>(p, decode_shared).Run();
}

}  // namespace slidejax::decode

// The decode kernel. docs/decode-kernel.md says why it is built so.
//
// A thread block has a run of tiles of 16 outputs. An item is a step of K of a tile; the block's
// warps take the items in turn. Each warp copies its items into a ring of its own, so that no warp
// waits for another: it multiplies an item while the next ones are under way. The sums of a warp
// over a tile go to shared memory; the warp that brings a tile's last ones adds them up, in the
// order of K, and writes y.
#pragma once

#include "decode/decode.h"
#include "decode/elements.cuh"
#include "decode/multiply.cuh"
#include "decode/params.h"
#include "decode/ptx.cuh"
#include "decode/stage.cuh"
#include "decode/tiles.cuh"

namespace slidejax::decode {

// A step of a tile. A warp goes through the slices of K, in each through the block's tiles, and in
// each tile through every warps-th step.
struct Item {
  int slice, tile, step;
  int steps;      // of the slice
  int tile_slot;  // where the tile's sums are
};

template <typename Code, int kWindows, int kTokenTiles>
class Decoder : Multiplier<Code, kWindows, kTokenTiles> {
  using Base = Multiplier<Code, kWindows, kTokenTiles>;
  using Base::codes_, Base::lane_, Base::ring_, Base::ring_address_, Base::sums_of_,
      Base::token_bytes_;

 public:
  using Base::kShape;
  static constexpr int kDepth = kShape.depth();
  using Sum = SumOf<Code>;

  __device__ Decoder(const Params& p, uint8_t* shared)
      : p_(p),
        warps_(p.warps),
        warp_(threadIdx.x / kLanes),
        first_tile_(blockIdx.x * p.tiles_each + min(static_cast<int>(blockIdx.x), p.tiles_more)),
        tiles_(p.tiles_each + (static_cast<int>(blockIdx.x) < p.tiles_more)),
        copies_(p, first_tile_) {
    token_bytes_ = TokenBytes(kShape, p.slice_steps);
    const int M = p.a.M, rows = tiles_ * kTileRows;
    ring_ = shared + warp_ * kDepth * kShape.slot_bytes();
    ring_address_ = SharedAddress(ring_);
    shared += warps_ * kDepth * kShape.slot_bytes();
    codes_ = shared;
    shared += (M * token_bytes_ + 127) / 128 * 128;
    sums_ = reinterpret_cast<Sum*>(shared);
    shared += p.sums_bytes;
    scale_w_ = reinterpret_cast<float*>(shared);
    shared += p_.cached ? 2 * 4 * rows : 0;
    arrived_ = reinterpret_cast<int*>(shared);
    tile_of_ = arrived_ + p.tile_slots;
    warp_words_ = reinterpret_cast<uint32_t*>(tile_of_ + p.tile_slots);
    scale_x_ = reinterpret_cast<float*>(warp_words_ + 2 * kMaxWarps);
  }

  __device__ void Run() {
    const DecodeArgs& a = p_.a;
    const bool own = p_.codes == nullptr;
    const RowShare share(p_.log_share);
    auto* rows = reinterpret_cast<uint8_t*>(sums_);  // of x: there are no sums yet
    if (own && !p_.behind) AskForRows(p_, rows);
    if (own) AskForNorm(a, rows);
    AskForScales();
    for (int i = threadIdx.x; i < p_.tile_slots; i += blockDim.x) arrived_[i] = 0, tile_of_[i] = i;
    const auto wait = [] { GridWait(), GridRelease(); };
    // x is asked for before the weights, behind which it would wait for megabytes. That gains more
    // than asking for weights while the kernel ahead still computes x.
    if (own && p_.behind) {
      wait();
      AskForRows(p_, rows);
      CommitCopies();
    }
    Item ask = First();
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i) Load(ask, i);
    if (!own || !p_.behind) wait();
    if (!own && threadIdx.x < a.M) scale_x_[threadIdx.x] = __ldcg(p_.scale_x + threadIdx.x);

    Item at = First();
    int slot = 0;
#pragma unroll 1
    for (int slice = 0; slice < p_.slices; ++slice) {
      if (slice > 0) __syncthreads();  // the slice before has been read
      if (own) {
        WaitForCopies<kDepth - 1>();  // of x and its norm, and of scales
        __syncthreads();
        WithTypeOfX(a.x_type, [&](auto x) {
          uint8_t* token = codes_ + share.row * token_bytes_;
          OwnRows<decltype(x), Code>(a, share, rows)
              .Run(warp_words_, scale_x_ + share.row,
                   p_.steps * kStepBlocks * kShape.block_columns() / kChunk,
                   [token](int index, const Chunk<Code>& codes) {
                     PlaceChunk<kWindows>(token, index, codes);
                   });
        });
      } else {
        CopyCodes(slice);
        WaitForCopies<0>();
      }
      __syncthreads();
      int first_step = at.step;  // of the tile, of this warp
#pragma unroll 1
      while (at.slice == slice) {
        WaitForCopies<kDepth - 2>();
        __syncwarp();
        Load(ask, slot == 0 ? kDepth - 1 : slot - 1);
        Base::Multiply(slot, at.step, p_.a.M);
        slot = slot + 1 == kDepth ? 0 : slot + 1;
        const Item done = at;
        Advance(at);
        if (at.tile != done.tile || at.slice != slice) {
          Contribute(done, first_step);
          first_step = at.step;
        }
      }
    }
  }

 private:
  // ---- Items ------------------------------------------------------------------------------------

  __device__ int StepsOf(int slice) const {
    return min(p_.slice_steps, p_.steps - slice * p_.slice_steps);
  }

  __device__ Item First() const {
    if (warp_ >= warps_) return {p_.slices, 0, 0, 0, 0};
    Item item = {0, 0, warp_, StepsOf(0), 0};
    Settle(item);
    return item;
  }

  __device__ void Advance(Item& item) const {
    item.step += warps_;
    Settle(item);
  }

  // Carries a step number that is too large into the tile and the slice.
  __device__ void Settle(Item& item) const {
#pragma unroll 1
    while (item.step >= item.steps && item.slice < p_.slices) {
      item.step -= item.steps;
      item.tile_slot = item.tile_slot + 1 == p_.tile_slots ? 0 : item.tile_slot + 1;
      if (++item.tile < tiles_) continue;
      ++item.slice, item.tile = item.tile_slot = 0;
      item.step = warp_, item.steps = StepsOf(item.slice);
    }
  }

  // Asks for an item, or for nothing at the end, and goes on to the next.
  __device__ void Load(Item& item, int slot) const {
    if (item.slice < p_.slices) {
      copies_.Ask(item.tile, item.slice * p_.slice_steps + item.step,
                  ring_address_ + slot * kShape.slot_bytes());
      Advance(item);
    }
    CommitCopies();
  }

  // Copies the codes of a slice of K.
  __device__ void CopyCodes(int slice) const {
    const int row = p_.steps * kShape.step_lifted(), begin = slice * p_.slice_steps;
    const int pieces = min(p_.slice_steps, p_.steps - begin) * kShape.step_lifted() / 16;
    const RowShare share(p_.log_share);
#pragma unroll 1
    for (int m = share.row; m < p_.a.M; m += share.rows) {
      const uint8_t* from = p_.codes + static_cast<int64_t>(m) * row + begin * kShape.step_lifted();
      const uint32_t to = SharedAddress(codes_ + m * token_bytes_);
#pragma unroll 1
      for (int i = share.first; i < pieces; i += share.stride)
        Copy16(to + i * 16, from + i * 16, true);
    }
    CommitCopies();
  }

  // The block's scales and biases of outputs, to shared memory if they fit.
  __device__ void AskForScales() const {
    const DecodeArgs& a = p_.a;
    const int rows = tiles_ * kTileRows;
    if (p_.cached) {
      for (int i = threadIdx.x; i < rows; i += blockDim.x) {
        const int row = RowOf(i);
        Copy4(SharedAddress(scale_w_ + i), a.scale_w + row);
        if (a.bias != nullptr) Copy4(SharedAddress(scale_w_ + rows + i), a.bias + row);
      }
    }
    CommitCopies();
  }

  // The row of the weight that is the block's row number i, or one inside the weight beyond its
  // end.
  __device__ int RowOf(int i) const {
    const int last = p_.a.out - 1;
    if (p_.a.gate_rows == 0) return min(first_tile_ * kTileRows + i, last);
    constexpr int kOutputs = kTileRows / 2;  // of a tile
    const int output = (first_tile_ + i / kTileRows) * kOutputs + i % kOutputs;
    return min(output, last) + (i % kTileRows < kOutputs ? 0 : p_.a.gate_rows);
  }

  // ---- Sums -------------------------------------------------------------------------------------

  // Leaves the warp's sums of a tile, whose first item was step `first_step`. They lie in the
  // order of K, so that results do not depend on which warp was faster.
  __device__ void Contribute(const Item& item, int first_step) {
    const int M = p_.a.M;
    if (p_.slices == 1) {  // else every tile has a slot of its own
      while (LoadShared(tile_of_ + item.tile_slot) != item.tile) {
      }
    }
    Sum* to = sums_ + (item.tile_slot * warps_ + first_step) * kTileRows * M;
    const int g = lane_ / 4, t = lane_ % 4;
#pragma unroll
    for (int i = 0; i < 4 * kTokenTiles; ++i) {
      const int tile = i / 4, m = tile * kTileTokens + 2 * t + i % 2;
      Sum &even = sums_of_[tile][0].v[i % 4], &odd = sums_of_[tile][1].v[i % 4];
      const Sum sum = even + odd;
      even = odd = 0;
      if (m >= M) continue;
      Sum& place = to[m * kTileRows + g + 8 * (i % 4 / 2)];
      place = item.slice > 0 ? place + sum : sum;
    }
    __syncwarp();
    int last = 0;
    if (lane_ == 0) last = AddShared(arrived_ + item.tile_slot, 1) + 1 == Contributions();
    if (__shfl_sync(kAllLanes, last, 0)) Finish(item);
  }

  // How often warps bring sums for a tile: in each slice, every warp that has an item of the tile
  // brings them once.
  __device__ int Contributions() const {
    return (p_.slices - 1) * min(warps_, p_.slice_steps) + min(warps_, StepsOf(p_.slices - 1));
  }

  // Adds up a tile's sums and writes its outputs.
  __device__ void Finish(const Item& item) {
    if (p_.a.gate_rows != 0) {
      FinishGated(item);
    } else {
      FinishPlain(item);
    }
    if (p_.slices > 1) return;
    __syncwarp();
    if (lane_ == 0) {
      StoreShared(arrived_ + item.tile_slot, 0);
      StoreShared(tile_of_ + item.tile_slot, item.tile + p_.tile_slots);
    }
  }

  // Sum number i of a tile, from those of the warps.
  __device__ Sum AddUp(const Sum* from, int i) const {
    const int parts = min(warps_, p_.slice_steps);
    Sum sum = from[i];
#pragma unroll 4
    for (int part = 1; part < parts; ++part) sum += from[part * kTileRows * p_.a.M + i];
    return sum;
  }

  __device__ const Sum* SumsOf(const Item& item) const {
    return sums_ + item.tile_slot * warps_ * kTileRows * p_.a.M;
  }

  __device__ void FinishPlain(const Item& item) const {
    const DecodeArgs& a = p_.a;
    const int row0 = (first_tile_ + item.tile) * kTileRows;
    const int begin = p_.cached ? first_tile_ * kTileRows : 0;  // the row of scales[0]
    const float* scales = p_.cached ? scale_w_ : a.scale_w;
    const float* biases = p_.cached ? scale_w_ + tiles_ * kTileRows : a.bias;
    const Sum* from = SumsOf(item);
    // Residuals are asked for before the sums are read, and for several outputs at once, which
    // hides a part of their latency.
    constexpr int kAtOnce = 2 * kTokenTiles;
#pragma unroll 1
    for (int first = lane_; first < kTileRows * a.M; first += kAtOnce * kLanes) {
      const auto place = [&](int k) {
        const int i = first + k * kLanes;
        const int row = row0 + i % kTileRows;
        const bool there = i < kTileRows * a.M && row < a.out;
        return there ? static_cast<int64_t>(i / kTileRows) * a.out + row : -1;
      };
      float residual[kAtOnce] = {};
      if (a.residual != nullptr) LoadFloats(residual, a.residual, a.residual_type, place);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int64_t to = place(k);
        if (to < 0) continue;
        const int i = first + k * kLanes, at = row0 + i % kTileRows - begin;
        const auto sum = static_cast<float>(AddUp(from, i));
        float v = __fmul_rn(__fmul_rn(sum, scale_x_[i / kTileRows]), scales[at]);
        if (a.bias != nullptr) v = __fadd_rn(v, biases[at]);
        if (a.residual != nullptr) v = __fadd_rn(v, residual[k]);
        StoreFloat(a.y, a.y_type, to, v);
      }
    }
  }

  // The first eight rows of a tile are gates, the others their factors.
  __device__ void FinishGated(const Item& item) const {
    constexpr int kOutputs = kTileRows / 2;
    const DecodeArgs& a = p_.a;
    const int tile = item.tile * kTileRows, output0 = (first_tile_ + item.tile) * kOutputs;
    const Sum* from = SumsOf(item);
#pragma unroll 1
    for (int i = lane_; i < kOutputs * a.M; i += kLanes) {
      const int output = output0 + i % kOutputs, m = i / kOutputs;
      if (output >= a.out) continue;
      float v[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = i % kOutputs + half * kOutputs, row = output + half * a.gate_rows;
        const Sum sum = AddUp(from, m * kTileRows + place);
        const float scale = p_.cached ? scale_w_[tile + place] : a.scale_w[row];
        v[half] = __fmul_rn(__fmul_rn(static_cast<float>(sum), scale_x_[m]), scale);
        if (a.bias != nullptr) {
          const float* biases = p_.cached ? scale_w_ + tiles_ * kTileRows + tile : a.bias;
          v[half] = __fadd_rn(v[half], biases[p_.cached ? place : row]);
        }
        v[half] = Rounded(v[half], a.y_type);
      }
      StoreFloat(a.y, a.y_type, static_cast<int64_t>(m) * a.out + output,
                 lift::Activated(v[0], a.activation) * v[1]);
    }
  }

  const Params& p_;
  const int warps_, warp_, first_tile_, tiles_;
  const TileCopies<Code, kWindows> copies_;
  Sum* sums_;
  float* scale_w_;
  int* arrived_;
  int* tile_of_;
  uint32_t* warp_words_;
  float* scale_x_;
};

template <typename Code, int kWindows, int kTokenTiles>
__global__ void __launch_bounds__(Shape{kWindows, sizeof(Code)}.block_warps() * kLanes, 1)
    DecodeKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t decode_shared[];
  Decoder<Code, kWindows, kTokenTiles>(p, decode_shared).Run();
}

}  // namespace slidejax::decode

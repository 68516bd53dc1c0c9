// Copies of a weight's tiles of 16 rows to the rings of warps.
#pragma once

#include "decode/decode.h"
#include "decode/params.h"
#include "decode/plan.h"
#include "decode/ptx.cuh"

namespace slidejax::decode {

// The largest power of two that divides a number.
constexpr int Power2In(int a) { return a & -a; }

// The part of each item that a lane copies. An item is a step of K of a tile. Shape is the layout
// of a slot of the ring.
template <typename Code, int kWindows>
class TileCopies {
  static constexpr Shape kShape{kWindows, sizeof(Code)};

 public:
  // `first_tile` is the thread block's.
  __device__ TileCopies(const Params& p, int first_tile)
      : p_(p), first_tile_(first_tile), lane_(threadIdx.x % kLanes) {
    const DecodeArgs& a = p_.a;
    const int64_t begin = static_cast<int64_t>(first_tile_) * p_.tile_blocks;
    values_ = static_cast<const uint8_t*>(a.values) + begin * kShape.block_bytes();
    zeros_ = a.zeros + begin * 8 + (lane_ / kStepBlocks * a.blocks + lane_ % kStepBlocks) * 8;
    Keep(values_), Keep(zeros_);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = lane_ + i * kLanes;
      value_piece_[i] =
          RowInTile(piece / kRowPieces) * a.blocks * kShape.block_bytes() + piece % kRowPieces * 16;
      if (i < kPeriod)
        slot_piece_[i] = piece / kRowPieces * kShape.row_bytes() + piece % kRowPieces * 16;
    }
  }

  // Asks for step number `step` of the weight's columns, of tile number `tile` of the thread block.
  // Beyond the weight there are zeros. `slot` is an address in shared memory.
  __device__ void Ask(int tile, int step, uint32_t slot) const {
    const DecodeArgs& a = p_.a;
    const int block = step * kStepBlocks;
    // A thread block's weights are less than 2 GB.
    const int begin = tile * p_.tile_blocks + block, left = a.blocks - block;
    const int outputs = a.out - (first_tile_ + tile) * p_.tile_outputs;
    const bool whole = left >= kStepBlocks && outputs >= p_.tile_outputs;
    const unsigned valid = whole ? ~0u : ValidPieces(left, outputs);
    const uint8_t* values = values_ + begin * kShape.block_bytes();
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      Copy16(slot + SlotPiece(i), values + value_piece_[i], valid & 1u << i);
    if constexpr (!kShape.dense()) {
      const uint8_t* zeros = zeros_ + begin * 8;
      const uint32_t to_zeros = slot + kShape.slot_values() + lane_ * 8;
#pragma unroll
      for (int i = 0; i < kZeroPieces; ++i)
        Copy8(to_zeros + i * kLanes * 8, zeros + i * p_.lower_zeros,
              valid & (1u << kFirstZeroBit) << i);
    }
  }

 private:
  // Where a lane's pieces of 16 bytes of values, and of 8 bytes of zeros, lie in a tile.
  static constexpr int kRowPieces = kStepBlocks * kShape.block_bytes() / 16;
  static constexpr int kPieces = kTileRows * kRowPieces / kLanes;
  static constexpr int kZeroPieces = kShape.dense() ? 0 : kTileRows * kStepBlocks / kLanes;
  static constexpr int kFirstZeroBit = 30;  // of ValidPieces
  static_assert(kPieces <= kFirstZeroBit && kZeroPieces <= 2, "each piece has a bit");
  // A lane's pieces number i and i + kPeriod are kPeriodRows rows apart, at the same place.
  static constexpr int kPeriod = kRowPieces / Power2In(kRowPieces);
  static constexpr int kPeriodRows = kPeriod * kLanes / kRowPieces;

  // The row of the weight that is a tile's row number `row`, counted from the tile's first one.
  __device__ int RowInTile(int row) const {
    const int gate_rows = p_.a.gate_rows;
    return gate_rows != 0 && row >= kTileRows / 2 ? gate_rows + row - kTileRows / 2 : row;
  }

  // Where piece number i of the lane goes in a slot.
  __device__ int SlotPiece(int i) const {
    if constexpr (!kShape.wide()) return (lane_ + i * kLanes) * 16;  // the rows are not padded
    return slot_piece_[i % kPeriod] + i / kPeriod * kPeriodRows * kShape.row_bytes();
  }

  // The lane's pieces that lie inside a weight with `left` blocks and `outputs` left. Bit i stands
  // for piece i of the values, and bit kFirstZeroBit + i for piece i of the zeros.
  __device__ unsigned ValidPieces(int left, int outputs) const {
    const int mask = p_.tile_outputs - 1;
    unsigned valid = 0;
#pragma unroll 1
    for (int i = 0; i < kPieces; ++i) {
      const int piece = lane_ + i * kLanes, at = piece % kRowPieces * 16 / kShape.block_bytes();
      const bool zeros = (piece / kStepBlocks & mask) < outputs && piece % kStepBlocks < left;
      valid |= ((piece / kRowPieces & mask) < outputs && at < left ? 1u : 0) << i;
      if (i < kZeroPieces) valid |= (zeros ? 1u << kFirstZeroBit : 0) << i;
    }
    return valid;
  }

  const Params& p_;
  const int first_tile_, lane_;
  const uint8_t* values_;  // of the block's first tile; of zeros, the lane's first piece
  const uint8_t* zeros_;
  int value_piece_[kPieces];
  int slot_piece_[kPeriod];
};

}  // namespace slidejax::decode

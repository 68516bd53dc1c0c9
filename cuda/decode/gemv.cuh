// The kernel for one or two rows of x and values of 8 bits. docs/decode-kernel.md says why it is
// built so.
//
// It has no use for tensor cores, whose instruction multiplies eight rows at least. A lane puts the
// codes of x in the order of the weight's values, and multiplies four of them at a time. So x is
// not lifted, and a warp needs only four rows of the weight at once, with long pieces of each.
//
// A thread block has a run of tiles of four rows. An item is a step of K of a tile: a block of 8
// groups, or 64 columns of a dense weight, for each of the eight lanes that share a row. The warps
// take the items in turn, through rings of their own as in kernel.cuh. They leave sums in shared
// memory, and all threads write y at the end. Sums of int32 do not depend on their order, so all
// warps add theirs to one. Each warp keeps its own float32 sums, which are added in the warps'
// order.
#pragma once

#include "decode/decode.h"
#include "decode/gemv_plan.h"
#include "decode/multiply.cuh"
#include "decode/params.h"
#include "decode/ptx.cuh"
#include "decode/results.cuh"
#include "decode/stage.cuh"

namespace slidejax::decode {

// The columns of a block's values, as operands of the instruction that puts codes in the order of
// the values. The instruction takes two words of codes, and for each of four values the number of a
// byte in these words. So four values (two windows) are a piece, whose first word of codes is
// FirstWord.
template <int kWindows>
struct BlockLayout {
  static constexpr int kGroup = 2 * (kWindows + 1), kValues = 2 * kWindows;
  // A nibble for each value of a group, value 0 in the lowest one.
  static constexpr bool kWide = kWindows >= 4;
  using Nibbles = std::conditional_t<kWide, uint64_t, uint32_t>;

  // The first column, in the block, of the window that value `v` of the block belongs to.
  static SLIDEJAX_HOST_DEVICE constexpr int WindowBegin(int v) {
    const int window = v / 2;
    return window / kWindows * kGroup + window % kWindows * 2;
  }
  // The word of codes at which piece number `j` begins to read. Its windows lie inside that word
  // and the next.
  static SLIDEJAX_HOST_DEVICE constexpr int FirstWord(int j) { return WindowBegin(4 * j) / 4; }

  // For each value of group `g`: its number, less the column of the group at which its piece begins
  // to read.
  static SLIDEJAX_HOST_DEVICE constexpr Nibbles Base(int g) {
    uint64_t base = 0;
    for (int k = 0; k < kValues; ++k) {
      const int piece = (g * kValues + k) / 4;
      base |= static_cast<uint64_t>(k - (FirstWord(piece) * 4 - g * kGroup)) << (4 * k);
    }
    return static_cast<Nibbles>(base);
  }

  // The bytes of codes that the values of the eight groups of a block are multiplied with. Value k
  // of a group has column k + [k >= z1] + [k >= z2 - 1].
  static __device__ void BytesOf(uint2 zeros, Nibbles (&bytes)[8]) {
    constexpr auto kOnes = static_cast<Nibbles>(0x1111111111111111ull);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // 4 z1 and 4 (z2 - 1) of four groups. Beyond the weight there are zeros, for which these are
      // no places; then no byte is over 6, and the values are zero as well.
      const uint32_t z = half ? zeros.y : zeros.x;
      const uint32_t first = (z & 0x0f0f0f0fu) << 2;
      const uint32_t second = ((z >> 2) & 0x3c3c3c3cu) - 0x04040404u;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const Nibbles base = Base(4 * half + g);
        Nibbles& to = bytes[4 * half + g];
        if constexpr (kWide) {
          to = base + (kOnes << (first >> (8 * g) & 63)) + (kOnes << (second >> (8 * g) & 63));
        } else {
          // Shifts are less than 32. The funnel shift takes its amount modulo 32, so the other
          // groups need not be masked out.
          to = base + __funnelshift_l(0, kOnes, first >> (8 * g)) +
               __funnelshift_l(0, kOnes, second >> (8 * g));
        }
      }
    }
  }

  // The bytes of piece number `j`, in the lowest 16 bits. It may end in the next group.
  static __device__ uint32_t Selector(const Nibbles (&bytes)[8], int j) {
    const int group = 4 * j / kValues, first = 4 * j % kValues;
    const auto low = static_cast<uint32_t>(bytes[group] >> (4 * first));
    if (first + 4 <= kValues) return low;
    return __byte_perm(low, static_cast<uint32_t>(bytes[group + 1]), 0x0040);
  }
};

// The sum of four products of values and codes of x, and of `sum`.
__device__ inline int32_t AddProducts(int32_t sum, uint32_t values, uint32_t codes) {
  return __dp4a(static_cast<int>(values), static_cast<int>(codes), sum);
}
__device__ inline float AddProducts(float sum, uint32_t values, uint32_t codes) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 v = __half22float2(HalvesOf(static_cast<uint16_t>(values >> (16 * half))));
    const float2 x = __half22float2(HalvesOf(static_cast<uint16_t>(codes >> (16 * half))));
    sum = fmaf(v.y, x.y, fmaf(v.x, x.x, sum));
  }
  return sum;
}

template <typename Code, int kWindows, int kRows>
class Gemv {
 public:
  using Sum = SumOf<Code>;
  static constexpr GemvShape kShape{kWindows};
  static constexpr int kDepth = kShape.depth();
  static constexpr bool kFloats = std::is_same_v<Sum, float>;
  static constexpr int kParts = SumParts(kFloats, kGemvWarps);

  __device__ Gemv(const Params& p, uint8_t* shared)
      : p_(p),
        warp_(threadIdx.x / kLanes),
        lane_(threadIdx.x % kLanes),
        first_tile_(blockIdx.x * p.tiles_each + min(static_cast<int>(blockIdx.x), p.tiles_more)),
        tiles_(p.tiles_each + (static_cast<int>(blockIdx.x) < p.tiles_more)),
        results_(p, 0, kRows, first_tile_, tiles_, p.block_rows, kParts) {
    ring_ = shared + warp_ * kDepth * kShape.slot_bytes();
    shared += kShape.ring_bytes();
    codes_ = shared, code_bytes_ = p.steps * kRowLanes * kShape.code_stride();
    shared += kRows * code_bytes_;
    rows_ = shared;  // the weights of the norm, and x
    shared += p.row_pieces * 16 + (p.a.norm != nullptr ? p.a.columns * 4 : 0);
    results_.sums = reinterpret_cast<Sum*>(shared);
    results_.scale_w = reinterpret_cast<float*>(results_.sums + results_.Words());
    warp_words_ = reinterpret_cast<uint32_t*>(results_.scale_w + 2 * p.block_rows);
    results_.scale_x = reinterpret_cast<float*>(warp_words_ + 2 * kGemvWarps);
  }

  __device__ void Run() {
    AskForNorm(p_.a, rows_);
    results_.AskForScales();
    CommitCopies();
    PlanPieces();
    // A first kernel need not wait for x. In the others weights are on their way meanwhile; x comes
    // through registers, since copies arrive in the order of their groups.
    if (!p_.behind) LoadRows();
    Place ask = {0, warp_};
    Settle(ask);
#pragma unroll 1
    for (int slot = 0; slot < kDepth - 1; ++slot) Load(ask, slot);
    for (int i = threadIdx.x; i < results_.Words(); i += blockDim.x) results_.sums[i] = 0;
    GridWait();
    GridRelease();
    if (p_.behind) LoadRows();
    const float residual = results_.ResidualOf(threadIdx.x);  // a long way ahead of its use
    WaitForCopies<kDepth - 1>();
    __syncthreads();
    ConvertRows();
    __syncthreads();
    Multiply(ask);
    __syncthreads();
    results_.Write(residual);
  }

 private:
  // A step of a tile of the block.
  struct Place {
    int tile, step;
  };

  static constexpr int kPieces = kShape.row_bytes() / (16 * kRowLanes);  // of 16 bytes, of a lane
  static constexpr int kWords = kShape.block_bytes() / 4;

  // Carries a step number that is too large into the tile.
  __device__ void Settle(Place& at) const {
#pragma unroll 1
    while (at.step >= p_.steps) at.step -= p_.steps, ++at.tile;
  }

  // The row of the weight that row `row` of a tile is, counted from the tile's first one.
  __device__ int RowInTile(int row) const {
    const int gate_rows = p_.a.gate_rows;
    return gate_rows != 0 && row >= kGemvTileRows / 2 ? gate_rows + row - kGemvTileRows / 2 : row;
  }

  __device__ void PlanPieces() {
    const DecodeArgs& a = p_.a;
    const int64_t row = int64_t{first_tile_} * p_.tile_outputs + RowInTile(lane_ / kRowLanes);
    const int share = lane_ % kRowLanes;
    values_ = static_cast<const uint8_t*>(a.values) + row * RowBytes() + share * 16;
    zeros_ = a.zeros + (row * a.blocks + share) * 8;
    ring_address_ = SharedAddress(ring_) + lane_ / kRowLanes * kShape.row_bytes() + share * 16;
    zeros_address_ = SharedAddress(ring_) + kShape.slot_values() + lane_ * 8;
    Keep(values_), Keep(zeros_);
  }

  // Of values of a row of the weight.
  __device__ int RowBytes() const {
    return p_.a.blocks * (kShape.dense() ? 32 : kShape.block_bytes());
  }

  // Asks for an item, or for nothing at the end, and goes on to the warp's next one. Beyond the
  // weight there are zeros.
  __device__ void Load(Place& at, int slot) const {
    if (at.tile < tiles_) {
      const DecodeArgs& a = p_.a;
      // A thread block's weights are less than 2 GB.
      const int row = at.tile * p_.tile_outputs, row_bytes = RowBytes();
      const uint8_t* from = values_ + row * row_bytes + at.step * kShape.row_bytes();
      const uint32_t to = ring_address_ + slot * kShape.slot_bytes();
      const int share = lane_ % kRowLanes;
      // Of the row, in bytes of values and in blocks, behind the lane's first piece.
      const int left = row_bytes - at.step * kShape.row_bytes() - share * 16;
      const int outputs = a.out - (first_tile_ + at.tile) * p_.tile_outputs;
      const bool inside = (lane_ / kRowLanes & (p_.tile_outputs - 1)) < outputs;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        Copy16(to + i * kRowLanes * 16, from + i * kRowLanes * 16,
               inside && i * kRowLanes * 16 < left);
      if constexpr (!kShape.dense()) {
        const int block = at.step * kRowLanes;
        Copy8(zeros_address_ + slot * kShape.slot_bytes(), zeros_ + (row * a.blocks + block) * 8,
              inside && block + share < a.blocks);
      }
      at.step += kGemvWarps;
      Settle(at);
    }
    CommitCopies();
  }

  // ---- x ----------------------------------------------------------------------------------------

  // Copies x behind the weights of its norm.
  __device__ void LoadRows() const {
    const auto* from = static_cast<const uint4*>(p_.a.x);
    auto* to = reinterpret_cast<uint4*>(rows_ + (p_.a.norm != nullptr ? p_.a.columns * 4 : 0));
#pragma unroll 4
    for (int i = threadIdx.x; i < p_.row_pieces; i += blockDim.x) to[i] = __ldcg(from + i);
  }

  __device__ void ConvertRows() const {
    const RowShare share(p_.log_share);
    uint8_t* codes = codes_ + share.row * code_bytes_;
    const auto put = [codes](int index, const Chunk<Code>& chunk) {
      constexpr int kBlockChunks = kShape.block_columns() / kChunk;
      auto* to = codes + index / kBlockChunks * kShape.code_stride();
      reinterpret_cast<uint2*>(to)[index % kBlockChunks] = {chunk.word[0], chunk.word[1]};
    };
    WithTypeOfX(p_.a.x_type, [&](auto x) {
      OwnRows<decltype(x), Code>(p_.a, share, rows_)
          .Run(warp_words_, results_.scale_x + share.row,
               p_.steps * kRowLanes * kShape.block_columns() / kChunk, put);
    });
  }

  // ---- Products ---------------------------------------------------------------------------------

  __device__ void Multiply(Place& ask) {
    Place at = {0, warp_};
    Settle(at);
    int slot = 0;
#pragma unroll 1
    while (at.tile < tiles_) {
      WaitForCopies<kDepth - 2>();
      __syncwarp();
      Load(ask, slot == 0 ? kDepth - 1 : slot - 1);
      MultiplyItem(slot, at.step);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
      const int tile = at.tile;
      at.step += kGemvWarps;
      Settle(at);
      if (at.tile != tile) Contribute(tile);
    }
  }

  // The lane's codes of row m of x in a step. Those of a dense weight lie as its values do.
  __device__ const uint4* CodesOf(int m, int step) const {
    const int share = lane_ % kRowLanes;
    const uint8_t* codes = codes_ + m * code_bytes_ + step * kRowLanes * kShape.code_stride();
    return reinterpret_cast<const uint4*>(codes +
                                          share * (kShape.dense() ? 16 : kShape.code_stride()));
  }

  __device__ void MultiplyItem(int slot, int step) {
    const uint8_t* from = ring_ + slot * kShape.slot_bytes();
    const uint8_t* row = from + lane_ / kRowLanes * kShape.row_bytes();
    if constexpr (kShape.dense()) {
      MultiplyDense(row, step);
    } else {
      MultiplySparse(row, *reinterpret_cast<const uint2*>(from + kShape.slot_values() + lane_ * 8),
                     step);
    }
  }

  __device__ void MultiplyDense(const uint8_t* row, int step) {
    const auto* values = reinterpret_cast<const uint4*>(row) + lane_ % kRowLanes;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 v = values[i * kRowLanes];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const uint4 x = CodesOf(m, step)[i * kRowLanes];
        Add(m, v.x, x.x), Add(m, v.y, x.y), Add(m, v.z, x.z), Add(m, v.w, x.w);
      }
    }
  }

  __device__ void MultiplySparse(const uint8_t* row, uint2 zeros, int step) {
    using Layout = BlockLayout<kWindows>;
    uint32_t values[kWords];
    Read(values, reinterpret_cast<const uint4*>(row + lane_ % kRowLanes * kShape.block_bytes()));
    typename Layout::Nibbles bytes[8];
    Layout::BytesOf(zeros, bytes);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      uint32_t x[kShape.block_columns() / 4];
      Read(x, CodesOf(m, step));
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const int word = Layout::FirstWord(j);
        Add(m, values[j], __byte_perm(x[word], x[word + 1], Layout::Selector(bytes, j)));
      }
    }
  }

  template <int kCount>
  static __device__ void Read(uint32_t (&words)[kCount], const uint4* from) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint4 v = from[i / 4];
      words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
    }
  }

  __device__ void Add(int m, uint32_t values, uint32_t codes) {
    sum_[m] = AddProducts(sum_[m], values, codes);
  }

  // Leaves the warp's sums of a tile in shared memory.
  __device__ void Contribute(int tile) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int mask = kRowLanes / 2; mask > 0; mask /= 2)
        sum_[m] += __shfl_xor_sync(kAllLanes, sum_[m], mask);
      if (lane_ % kRowLanes == 0) {
        const int row = tile * kGemvTileRows + lane_ / kRowLanes;
        if constexpr (kFloats) {
          results_.SumsOf(warp_, m)[row] = sum_[m];
        } else {
          AddShared(results_.SumsOf(0, m) + row, sum_[m]);
        }
      }
      sum_[m] = 0;
    }
  }

  const Params& p_;
  const int warp_, lane_, first_tile_, tiles_;
  const uint8_t *values_, *zeros_;  // of the lane's first piece in the block
  uint8_t* ring_;                   // of the warp
  uint32_t ring_address_, zeros_address_;
  uint8_t *codes_, *rows_;
  int code_bytes_;  // of a row of x
  uint32_t* warp_words_;
  BlockResults<Sum, kGemvTileRows> results_;
  Sum sum_[kRows] = {};
};

template <typename Code, int kWindows, int kRows>
__global__ void __launch_bounds__(kGemvWarps* kLanes, 1)
    GemvKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t decode_shared[];
  Gemv<Code, kWindows, kRows>(p, decode_shared).Run();
}

}  // namespace slidejax::decode

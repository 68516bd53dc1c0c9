// 2:4 metadata from the zeros of the packed form: its layout, the arithmetic, and the kernels that
// make it ahead of a product. expand.cuh makes it within the product's kernel.
//
// A stage is a step of 256 lifted columns: 64 windows of each row, a nibble each. They may begin
// within a group and end within another. Rows of zeros are 8-byte aligned, and so are the pieces
// that are read.
#pragma once

#include "hopper/ptx.cuh"
#include "hopper/tile.h"

namespace slidejax::hopper {

inline constexpr int kStageWindows = kStepColumns / 4;  // of a row, a nibble each
inline constexpr int kStageWords = kStageWindows / 8;   // of a row, 32 bits each
inline constexpr int kPieceBytes = 8;                   // of a row's zeros
inline constexpr int kMetadataSliceBytes = 1024;        // of 64 rows in one of a stage's two slices
inline constexpr uint32_t kLegalWord = 0x44444444;      // beyond the last column, where W is zero

// Returns where the four words lie that a row has in a slice, in bytes. One bit of the row's number
// is exchanged, so that the eight rows that 16 lanes of a consumer warp read lie in different
// banks.
SJ_DEVICE constexpr uint32_t MetadataRow(uint32_t row) { return 16 * (row ^ (row >> 1 & 4)); }

// Returns the metadata of a group whose zeros are z1 < z2: a nibble first | second << 2 for each
// window, window 0 lowest. Kept value number p of the group is in column p, plus 1 if that reaches
// z1, plus 1 if it then reaches z2. In window w columns are counted from 2 w on. `mask` has as many
// nibbles as the group has windows. The sum has no carries between its two-bit fields.
SJ_DEVICE uint32_t GroupMetadata(uint32_t zeros, uint32_t mask) {
  const uint32_t z1 = zeros & 15, z2 = zeros >> 4;
  return (0x44444444u + (0x55555555u << (2 * z1)) + (0x55555555u << (2 * ((z2 - 1) & 15)))) & mask;
}

// The groups of a stage: the first one, and how many of its windows belong to the stage before.
struct StageGroups {
  uint32_t first, skipped;

  SJ_DEVICE StageGroups(uint32_t stage, uint32_t windows) {
    first = stage * kStageWindows / windows;
    skipped = stage * kStageWindows - first * windows;
  }
  // reciprocal: ceil(2**32 / windows), which divides exactly up to 2**32 / windows.
  SJ_DEVICE StageGroups(uint32_t stage, uint32_t windows, uint32_t reciprocal) {
    first = __umulhi(stage * kStageWindows, reciprocal);
    skipped = stage * kStageWindows - first * windows;
  }
};

// Returns the metadata of two groups of eight, 12 bits each. The selector has z1 and z2 - 1 of each
// group as nibbles. The metadata is the sum of GroupMetadata. One permutation looks up the low byte
// of its terms for four nibbles, and another looks up the four bits above. Each term has half of
// the constant 0x444.
SJ_DEVICE uint32_t TwoGroupsOfEight(uint32_t selector) {
  uint32_t low = BytePermute(0x62727677, 0x22222222, selector);
  uint32_t high = BytePermute(0x07070707, 0x02020607, selector);
  low += low << 8, high += high << 8;  // sums of neighbours, in bytes 1 and 3
  const uint32_t both = BytePermute(low, high, 0x7351);
  return both - (both >> 16) * 0xF000;  // from 16 bits apart to 12
}

// Returns a word of metadata of groups of eight: of eight windows, from number `skipped` of the
// first group on. zeros: those of that group and the three after it. Zeros beyond the weight, which
// are 0, give legal metadata, because selectors lose the bit that stands for a sign.
SJ_DEVICE uint32_t WordOfGroupsOfEight(uint32_t zeros, uint32_t skipped) {
  const uint32_t four = (zeros - 0x10101010u) & 0x77777777u;
  const uint32_t low = TwoGroupsOfEight(four), high = TwoGroupsOfEight(four >> 16);
  return __funnelshift_r(low | high << 24, high >> 8, 4 * skipped);
}

// Makes the metadata of a row in a stage with groups of eight, which have three windows.
SJ_DEVICE void ExpandGroupsOfEight(const uint32_t (&zeros)[8], const StageGroups& groups,
                                   uint32_t (&words)[kStageWords]) {
  constexpr int kZerosWords = 6;  // of four groups each
  const bool skips_word = groups.first & 4;
  const int shift = 8 * (groups.first & 3);
  uint32_t bits[kZerosWords * 3 / 2];
#pragma unroll
  for (int i = 0; i < kZerosWords; i += 2) {
    uint32_t part[4];  // 24 bits each
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t low = skips_word ? zeros[i + k + 1] : zeros[i + k];
      const uint32_t high = skips_word ? zeros[i + k + 2] : zeros[i + k + 1];
      const uint32_t four = __funnelshift_r(low, high, shift) - 0x10101010u;
      part[2 * k] = TwoGroupsOfEight(four), part[2 * k + 1] = TwoGroupsOfEight(four >> 16);
    }
    bits[i / 2 * 3] = __byte_perm(part[0], part[1], 0x4210);
    bits[i / 2 * 3 + 1] = __byte_perm(part[1], part[2], 0x5421);
    bits[i / 2 * 3 + 2] = __byte_perm(part[2], part[3], 0x6542);
  }
#pragma unroll
  for (int i = 0; i < kStageWords; ++i) {
    words[i] = __funnelshift_r(bits[i], bits[i + 1], 4 * groups.skipped);
  }
}

// The same with groups of any size. Calls put(number of the word, word).
template <int kZerosWords, typename Put>
SJ_DEVICE void ExpandGroups(const uint32_t (&zeros)[kZerosWords], const StageGroups& groups,
                            int windows, const Put& put) {
  const int skipped_bytes = static_cast<int>(groups.first % kPieceBytes);
  const uint32_t mask = (1u << (4 * windows)) - 1;
  uint64_t bits = 0;
  int have = -4 * static_cast<int>(groups.skipped), word = 0;
#pragma unroll
  for (int i = 0; i < 4 * kZerosWords; ++i) {
    if (word == kStageWords) break;
    if (i < skipped_bytes) continue;
    const uint64_t group = GroupMetadata(zeros[i / 4] >> (8 * (i % 4)) & 0xff, mask);
    bits |= have < 0 ? group >> -have : group << have;
    have += 4 * windows;
    if (have < 32) continue;
    put(word++, static_cast<uint32_t>(bits));
    bits >>= 32, have -= 32;
  }
}

// Returns how many words of a row's metadata there are from a stage on.
SJ_DEVICE int WordsFrom(int stage, int groups, int windows) {
  return groups * windows / 8 - stage * kStageWords;
}

// The words of a row in a stage as they are stored, 16 bytes for each slice. Words 0 and 2 are side
// by side, since one thread of a consumer reads them: it holds the same half of each k64 step.
struct RowMetadata {
  uint4 slices[2];

  SJ_DEVICE RowMetadata(const uint32_t (&words)[kStageWords], int legal) {
    slices[0] = {words[0], words[2], words[1], words[3]};
    slices[1] = {words[4], words[6], words[5], words[7]};
    if (legal >= kStageWords) return;
    const auto cut = [&](uint32_t& word, int i) { word = i < legal ? word : kLegalWord; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      cut(slices[i].x, 4 * i), cut(slices[i].y, 4 * i + 2);
      cut(slices[i].z, 4 * i + 1), cut(slices[i].w, 4 * i + 3);
    }
  }
};

// A thread block of the kernels below: 64 rows, and as many stages as follow from its threads.
inline constexpr int kExpandRows = 64, kExpandThreads = 256;

// A thread of these kernels makes the metadata of one row of an m64 block. Rows beyond the last one
// get its metadata.
class RowExpander {
 public:
  SJ_DEVICE RowExpander(const uint8_t* zeros, uint8_t* metadata, int out, int groups, int windows,
                        int stages)
      : groups_(groups), windows_(windows) {
    const int row = static_cast<int>(threadIdx.x) % kExpandRows;
    const int64_t from = min(static_cast<int>(blockIdx.y) * kExpandRows + row, out - 1);
    zeros_ = zeros + from * groups;
    metadata_ = metadata + MetadataRow(row) +
                static_cast<int64_t>(blockIdx.y) * stages * (2 * kMetadataSliceBytes);
  }

  // The piece of eight zeros from a group on. Beyond the last group they are 0.
  SJ_DEVICE void LoadPiece(int group, uint32_t* to) const {
    const uint2 v = group < groups_ ? *reinterpret_cast<const uint2*>(zeros_ + group) : uint2{0, 0};
    to[0] = v.x, to[1] = v.y;
  }

  SJ_DEVICE void Store(int stage, const uint32_t (&words)[kStageWords]) const {
    const RowMetadata all(words, WordsFrom(stage, groups_, windows_));
    uint8_t* const to = metadata_ + static_cast<int64_t>(stage) * (2 * kMetadataSliceBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(to + i * kMetadataSliceBytes) = all.slices[i];
    }
  }

 private:
  const int groups_, windows_;
  const uint8_t* zeros_;
  uint8_t* metadata_;
};

// Writes meta[m64 block][slice][64 rows as MetadataRow says][16 bytes], a row and stage in each
// thread. kPieces: of a row's zeros in a stage.
template <int kPieces>
__global__ void __launch_bounds__(kExpandThreads)
    ExpandMetadataKernel(const uint8_t* zeros, uint8_t* metadata, int out, int groups, int windows,
                         int stages) {
  constexpr int kStages = kExpandThreads / kExpandRows;
  const int stage = static_cast<int>(blockIdx.x * kStages + threadIdx.x / kExpandRows);
  if (stage >= stages) return;
  const RowExpander row(zeros, metadata, out, groups, windows, stages);
  const StageGroups at(stage, windows);
  const int first = static_cast<int>(at.first) / kPieceBytes * kPieceBytes;
  uint32_t pieces[2 * kPieces], words[kStageWords];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) row.LoadPiece(first + i * kPieceBytes, pieces + 2 * i);
  ExpandGroups(pieces, at, windows, [&](int i, uint32_t word) { words[i] = word; });
  row.Store(stage, words);
}

// The same for groups of eight. Three stages hold 64 groups exactly. A thread makes all three, so
// that it reads each zero once and the compiler knows where the stages begin.
__global__ void __launch_bounds__(kExpandThreads)
    ExpandGroupsOfEightKernel(const uint8_t* zeros, uint8_t* metadata, int out, int groups,
                              int windows, int stages) {
  constexpr int kAtOnce = 3, kGroups = kStageWindows, kZerosWords = kGroups / 4;
  const int turn =
      static_cast<int>(blockIdx.x * (kExpandThreads / kExpandRows) + threadIdx.x / kExpandRows);
  if (turn * kAtOnce >= stages) return;
  const RowExpander row(zeros, metadata, out, groups, windows, stages);
  uint32_t pieces[kZerosWords + 2] = {};  // the last stage's 32 bytes end beyond the 64 groups
#pragma unroll
  for (int i = 0; i < kZerosWords; i += 2) row.LoadPiece(turn * kGroups + 4 * i, pieces + i);
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    if (turn * kAtOnce + k >= stages) break;
    const StageGroups at(k, 3u);
    uint32_t of_stage[8], words[kStageWords];
#pragma unroll
    for (int i = 0; i < 8; ++i) of_stage[i] = pieces[at.first / kPieceBytes * 2 + i];
    ExpandGroupsOfEight(of_stage, at, words);
    row.Store(turn * kAtOnce + k, words);
  }
}

}  // namespace slidejax::hopper

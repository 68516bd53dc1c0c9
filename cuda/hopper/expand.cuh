// 2:4 metadata made in shared memory, from the zeros of each stage of W.
//
// The warp that copies W copies the zeros of the stage's rows to where their metadata belongs. The
// expanders, a warp group, turn them into metadata in place, and arrive at the stage's barrier as
// the copy of the values does. Consumers do not see a difference.
// Four pieces of zeros, which are as many bytes as the metadata, hold all groups of a row in a
// stage, except with one window to a group.
#pragma once

#include "hopper/metadata.cuh"
#include "hopper/scheduler.cuh"

namespace slidejax::hopper {

inline constexpr int kStagePieces = 4;  // of a row's zeros
inline constexpr int kExpanders = 128;  // threads

template <class T>
SJ_DEVICE bool ExpandsZeros(const Params& p) {
  return T::kExpands && p.zeros != nullptr;
}

// Where the metadata of a row of a stage lies. It has all slices of 64 rows side by side.
template <class T>
SJ_DEVICE constexpr uint32_t MetadataRowOfStage(int row) {
  return row / 64 * T::kSlicesW * kMetadataSliceBytes + MetadataRow(row % 64);
}

// Copies the zeros of a stage's rows, from output `row` on, asynchronously. All lanes of a warp do.
// Rows beyond the last one get its zeros, which are legal. Numbers are unsigned and offsets known
// to the compiler, since one warp issues all copies of a stage.
template <class T>
SJ_DEVICE void CopyZeros(const Params& p, uint32_t metadata, const StageGroups& groups, int row,
                         int lane) {
  constexpr int kRowsAtOnce = 32 / kStagePieces;
  static_assert(kRowsAtOnce == 8, "MetadataRow exchanges a bit in every second turn");
  const uint32_t of_row = lane % kStagePieces, first_row = lane / kStagePieces;
  const uint32_t byte = (groups.first / kPieceBytes + of_row) * kPieceBytes, pitch = p.groups;
  const bool inside = byte < pitch;
  const uint8_t* const from = p.zeros + (inside ? byte : 0);
  const uint32_t to = metadata + of_row / 2 * kMetadataSliceBytes + of_row % 2 * kPieceBytes;
  const uint32_t even = to + MetadataRow(first_row), odd = to + MetadataRow(first_row + 8);
  const uint32_t last = p.out - 1;
#pragma unroll
  for (int i = 0; i < T::kRows / kRowsAtOnce; ++i) {
    const uint32_t at = min(row + kRowsAtOnce * i + first_row, last);
    const uint32_t pair = MetadataRowOfStage<T>(kRowsAtOnce * (i & ~1));
    CopyAsync8((i % 2 ? odd : even) + pair, from + static_cast<uint64_t>(at) * pitch, inside);
  }
}

// Makes the metadata of a row in a stage, in place. legal: words that there are from the stage on.
SJ_DEVICE void ExpandRow(uint32_t at, const StageGroups& groups, int windows, int legal) {
  const uint4 a = LoadShared4(at), b = LoadShared4(at + kMetadataSliceBytes);
  const uint32_t zeros[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  if (windows == 3) {
    uint32_t words[kStageWords];
    ExpandGroupsOfEight(zeros, groups, words);
    const RowMetadata all(words, legal);
    StoreShared4(at, all.slices[0]);
    StoreShared4(at + kMetadataSliceBytes, all.slices[1]);
  } else {
    ExpandGroups(zeros, groups, windows, [&](int i, uint32_t word) {
      const int of_slice = i % 4;
      StoreSharedU32(at + i / 4 * kMetadataSliceBytes + 4 * (of_slice % 2 * 2 + of_slice / 2),
                     i < legal ? word : kLegalWord);
    });
  }
}

}  // namespace slidejax::hopper

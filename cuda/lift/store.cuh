// Writing a tile of codes.
//
// After lifting, a lane's chunk is not a whole number of 16-byte stores. So a warp passes each
// *tile* through shared memory. A tile is 32 chunks, times the odd part of N, which makes it whole
// groups and whole 16-byte stores.
//
// In a tile the unit is a *pair* of columns. Pair p of group g is the first half of window p and
// the second half of window p-1. So window number pair - group begins with that pair and ends with
// the one after it. A window of 8-bit codes is one word; wider codes take two stores.
#pragma once

#include <algorithm>

#include "lift/chunk.cuh"

namespace slidejax::lift {

// Lifts chunk number `index` of a tile and writes it to the tile's shared memory. Whole warps call
// this. next: the chunk after lane 31's, which lane 0 has. After the last chunk of a tile it may be
// anything, because the last pair begins no window.
template <typename Out>
__device__ inline void StageLifted(char* tile, int index, const Chunk<Out>& c,
                                   const Chunk<Out>& next, int n) {
  if (n <= 2) {  // 2:4 needs no lifting
    if constexpr (sizeof(Out) == 1)
      reinterpret_cast<uint2*>(tile)[index] = {c.word[0], c.word[1]};
    else {
#pragma unroll
      for (int i = 0; i < Chunk<Out>::kWords; i += 4) {
        reinterpret_cast<uint4*>(tile)[(index * Chunk<Out>::kWords + i) / 4] = {
            c.word[i], c.word[i + 1], c.word[i + 2], c.word[i + 3]};
      }
    }
    return;
  }
  const int first = 4 * index, group = first / n;
  int place = first - group * n;  // of the pair in its group
  if constexpr (sizeof(Out) == 1) {
    const uint32_t straddling = __byte_perm(c.word[0], c.word[1], 0x5432);
    uint32_t* window = reinterpret_cast<uint32_t*>(tile) + first - group;
    // A window is a word. Every pair but a group's last begins one. The other half of the last
    // window is the next lane's.
    const int lane = index % kLanes;
    const uint32_t after =
        __shfl_sync(kAllLanes, lane == 0 ? next.word[0] : c.word[0], (lane + 1) % kLanes);
    const uint32_t words[4] = {c.word[0], straddling, c.word[1],
                               __byte_perm(c.word[1], after, 0x5432)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (place < n - 1) *window++ = words[i];
      if (++place == n) place = 0;
    }
  } else {
    using Pair = std::conditional_t<sizeof(Out) == 2, uint32_t, uint2>;
    Pair* slot = reinterpret_cast<Pair*>(tile) + 2 * (first - group);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pair pair;
      if constexpr (sizeof(Out) == 2)
        pair = c.word[i];
      else
        pair = {c.word[2 * i], c.word[2 * i + 1]};
      if (place < n - 1) slot[0] = pair;
      if (place > 0) slot[-1] = pair;
      slot += 2;
      if (++place == n) place = 0, slot -= 2;
    }
  }
}

// How many chunks of a lane are whole groups. Their windows need nothing of other lanes.
__host__ __device__ constexpr int LaneChunks(int n) {
  return n % 4 == 0 ? n / 4 : n % 2 == 0 ? n / 2 : n;
}

// Writes the windows of LaneChunks(kN) chunks of codes to a tile's shared memory. index: their
// number in the tile, in units of LaneChunks(kN).
template <int kN>
__device__ inline void StageGroups(char* tile, int index,
                                   const uint32_t (&codes)[2 * LaneChunks(kN)]) {
  constexpr int kGroups = 4 * LaneChunks(kN) / kN, kWords = kGroups * (kN - 1);
  uint32_t windows[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int pair = i / (kN - 1) * kN + i % (kN - 1);
    windows[i] =
        pair % 2 == 0 ? codes[pair / 2] : __byte_perm(codes[pair / 2], codes[pair / 2 + 1], 0x5432);
  }
  constexpr int kBytes = kWords % 4 == 0 ? 16 : kWords % 2 == 0 ? 8 : 4;
  using Unit =
      std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  Unit* const to = reinterpret_cast<Unit*>(tile + index * kWords * 4);
#pragma unroll
  for (int i = 0; i < kWords * 4 / kBytes; ++i) {
    if constexpr (kBytes == 16)
      to[i] = {windows[4 * i], windows[4 * i + 1], windows[4 * i + 2], windows[4 * i + 3]};
    else if constexpr (kBytes == 8)
      to[i] = {windows[2 * i], windows[2 * i + 1]};
    else
      to[i] = windows[i];
  }
}

// Copies a staged tile to the row of results, 16 bytes a lane at a time. out, tile: where the lane
// begins. rest, lane_rest: bytes from there to the end of the row, and to the end of the tile.
__device__ inline void StoreTile(char* out, const char* tile, int rest, int lane_rest, int bytes) {
#pragma unroll
  for (int offset = 0; offset < bytes; offset += 16 * kLanes) {
    if (offset < lane_rest && offset < rest)
      *reinterpret_cast<uint4*>(out + offset) = *reinterpret_cast<const uint4*>(tile + offset);
  }
}

// Copies the first `length` bytes of a staged tile to any address: single bytes at both ends, and
// whole 16-byte stores between them.
__device__ inline void StoreTileAnywhere(char* out, const char* tile, int length) {
  const int lane = threadIdx.x % kLanes;
  const int head = min(length, static_cast<int>(-reinterpret_cast<uintptr_t>(out) & 15));
  const int tail = (length - head) % 16;
  if (lane < 16) {
    if (lane < head) out[lane] = tile[lane];
  } else if (lane - 16 < tail) {
    out[length - tail + lane - 16] = tile[length - tail + lane - 16];
  }
  // The last word that is read may lie behind the tile, where the stage has room for it.
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(tile) + head / 4;
#pragma unroll 1
  for (int offset = 16 * lane; offset < length - head - tail; offset += 16 * kLanes) {
    uint32_t word[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) word[i] = words[offset / 4 + i];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = __funnelshift_r(word[i], word[i + 1], head % 4 * 8);
    *reinterpret_cast<uint4*>(out + head + offset) = {word[0], word[1], word[2], word[3]};
  }
}

// Writes a chunk that needs no lifting to its place in the row of `columns` results.
template <typename Out>
__device__ inline void StoreChunk(Out* row, int column, const Chunk<Out>& c, int columns,
                                  bool aligned) {
  if (column >= columns) return;
  if (aligned) {
    if constexpr (sizeof(Out) == 1) {
      *reinterpret_cast<uint2*>(row + column) = {c.word[0], c.word[1]};
    } else {
#pragma unroll
      for (int i = 0; i < Chunk<Out>::kWords; i += 4) {
        reinterpret_cast<uint4*>(row + column)[i / 4] = {c.word[i], c.word[i + 1], c.word[i + 2],
                                                         c.word[i + 3]};
      }
    }
  } else {
    using Bits = std::conditional_t<sizeof(Out) == 1, uint8_t,
                                    std::conditional_t<sizeof(Out) == 2, uint16_t, uint32_t>>;
    constexpr int kPerWord = 4 / sizeof(Out);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < columns) {
        reinterpret_cast<Bits*>(row)[column + i] =
            static_cast<Bits>(c.word[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Out)));
      }
    }
  }
}

}  // namespace slidejax::lift

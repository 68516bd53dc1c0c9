// The emulator's version of cuda/decode/ptx.cuh.
#pragma once

#include "common/ptx.cuh"
#include "common/warp.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_fp8.h"

namespace slidejax::decode {

inline void Copy16(uint32_t to, const void* from, bool valid) {
  emulated::Copy(emulated::shared_memory + to, from, valid, 16);
}
inline void Copy8(uint32_t to, const void* from, bool valid) {
  emulated::Copy(emulated::shared_memory + to, from, valid, 8);
}
inline void Copy4(uint32_t to, const void* from) {
  emulated::Copy(emulated::shared_memory + to, from, true, 4);
}
template <int kPending>
void WaitForCopies() {
  emulated::WaitForCopies(kPending);
}
inline int AddShared(int* p, int value) {
  const int before = *p;
  return *p += value, before;
}
inline int LoadShared(const int* p) { return emulated::Poll(p); }
inline void StoreShared(int* p, int value) { *p = value; }
template <typename T>
void Keep(T*&) {}

inline void LoadMatrices(uint32_t (&to)[4], uint32_t from) {
  if (from % 16) emulated::Fail("a row of a matrix is not aligned");
  const int lane = threadIdx.x % kLanes;
  emulated::Publish({from});
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = emulated::WordsOf(8 * i + lane / 4).v[0];
    std::memcpy(&to[i], emulated::shared_memory + row + 4 * (lane % 4), 4);
  }
  emulated::SyncWarp();
}

struct SumsS32 {
  int32_t v[4] = {};
};
struct SumsF32 {
  float v[4] = {};
};

// Element number i of a word.
template <typename Value>
auto ElementOf(uint32_t word, int i) {
  const uint32_t bits = word >> (8 * sizeof(Value) * i);
  if constexpr (std::is_same_v<Value, int8_t>) {
    return static_cast<int>(static_cast<int8_t>(bits));
  } else if constexpr (std::is_same_v<Value, __nv_bfloat16>) {
    return __bfloat162float({static_cast<uint16_t>(bits)});
  } else if constexpr (std::is_same_v<Value, __half>) {
    __half value;
    std::memcpy(&value, &bits, 2);
    return __half2float(value);
  } else {  // e4m3
    const float size = std::ldexp(bits & 0x78 ? 8 + (bits & 7) : 2 * (bits & 7) / 2.0f,
                                  std::max<int>(bits >> 3 & 15, 1) - 10);
    return bits & 0x80 ? -size : size;
  }
}

inline __half2 HalvesOf(uint16_t numbers) {
  return {__float2half(ElementOf<__nv_fp8_e4m3>(numbers, 0)),
          __float2half(ElementOf<__nv_fp8_e4m3>(numbers, 1))};
}

// sums += A B as mma.sync and mma.sp.sync do it: A has 16 rows, B 8 columns. Words 0 to 3 of each
// lane are of A, from 4 on of B, the last one metadata.
template <typename Value, bool kSparse, int kSelector, typename Sums>
void MultiplyAll(Sums& sums, const emulated::Words& mine) {
  constexpr int kEach = 4 / sizeof(Value), kColumns = 8 * kEach;  // of a word; of A
  constexpr int kRowsOfB = kSparse ? 2 * kColumns : kColumns, kWindows = kColumns / 2;
  using Element = decltype(ElementOf<Value>(0, 0));
  Element a[16][kColumns], b[kRowsOfB][8];
  uint32_t nibbles[16][kWindows] = {};
  emulated::Publish(mine);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const emulated::Words words = emulated::WordsOf(lane);
    for (int i = 0; i < kEach; ++i) {
      for (int q = 0; q < 4; ++q)
        a[g + 8 * (q % 2)][4 * kEach * (q / 2) + kEach * t + i] = ElementOf<Value>(words.v[q], i);
      for (int q = 0; q < kRowsOfB / (4 * kEach); ++q)
        b[4 * kEach * q + kEach * t + i][g] = ElementOf<Value>(words.v[4 + q], i);
    }
    for (int w = 0; w < 8; ++w) {
      const uint32_t nibble = words.v[8] >> (4 * w) & 15;
      if (sizeof(Value) == 1) nibbles[g + 8 * (t % 2)][8 * (t / 2) + w] = nibble;
      if (sizeof(Value) == 2 && t / 2 == kSelector)
        nibbles[g + 8 * (w / 4)][4 * (t % 2) + w % 4] = nibble;
    }
  }
  const int lane = threadIdx.x % kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < kColumns; ++k) {
      const int first = nibbles[row][k / 2] & 3, second = nibbles[row][k / 2] >> 2;
      if (kSparse && first >= second) emulated::Fail("metadata is no pair of places");
      const int from = kSparse ? 4 * (k / 2) + (k % 2 ? second : first) : k;
      sums.v[i] += a[row][k] * b[from][column];
    }
  }
  emulated::SyncWarp();
}

template <typename Value, int kSelector = 0, typename Sums>
void MultiplySparse(Sums& sums, const uint32_t (&a)[4], const uint4& b, uint32_t metadata) {
  MultiplyAll<Value, true, kSelector>(sums, {a[0], a[1], a[2], a[3], b.x, b.y, b.z, b.w, metadata});
}
template <typename Value, typename Sums>
void MultiplyDense(Sums& sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyAll<Value, false, 0>(sums, {a[0], a[1], a[2], a[3], b0, b1});
}
// Of 8 bits, whose type the sums tell.
inline void MultiplySparse(SumsS32& sums, const uint32_t (&a)[4], const uint4& b, uint32_t e) {
  MultiplySparse<int8_t>(sums, a, b, e);
}
inline void MultiplySparse(SumsF32& sums, const uint32_t (&a)[4], const uint4& b, uint32_t e) {
  MultiplySparse<__nv_fp8_e4m3>(sums, a, b, e);
}
inline void MultiplyDense(SumsS32& sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyDense<int8_t>(sums, a, b0, b1);
}
inline void MultiplyDense(SumsF32& sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyDense<__nv_fp8_e4m3>(sums, a, b0, b1);
}

}  // namespace slidejax::decode

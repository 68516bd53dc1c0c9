// The arithmetic of the lift kernels on a *chunk*: eight neighbouring columns of a row, which a
// lane handles at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "lift/geometry.h"

namespace slidejax::lift {

// Eight columns, as they lie in memory.
template <typename T>
struct Chunk {
  static constexpr int kWords = kChunk * sizeof(T) / 4;
  uint32_t word[kWords];
};

template <typename T>
constexpr bool kQuantised = sizeof(T) == 1;

// ---- Rows that start anywhere -------------------------------------------------------------------

// Takes a chunk out of the 16-byte granules that hold it. It begins `shift` bytes into the first
// granule; `granule(i)` gives granule number i.
template <typename T, typename Granule>
__device__ inline Chunk<T> Shifted(int shift, const Granule& granule) {
  constexpr int kWords = Chunk<T>::kWords;
  uint32_t word[kWords + 4];
#pragma unroll
  for (int i = 0; i < kWords + 4; i += 4) {
    const uint4 v = granule(i / 4);
    word[i] = v.x, word[i + 1] = v.y, word[i + 2] = v.z, word[i + 3] = v.w;
  }
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < kWords + 2; ++i) word[i] = word[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < kWords + 1; ++i) word[i] = word[i + 1];
  }
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    chunk.word[i] =
        sizeof(T) == 2 && (shift & 2) ? __funnelshift_r(word[i], word[i + 1], 16) : word[i];
  return chunk;
}

// The chunk with zeros from its element number `valid` on.
template <typename T>
__device__ inline Chunk<T> Masked(Chunk<T> chunk, int valid) {
#pragma unroll
  for (int i = 0; i < Chunk<T>::kWords; ++i) {
    const int bytes = valid * static_cast<int>(sizeof(T)) - 4 * i;
    chunk.word[i] = bytes >= 4 ? chunk.word[i] : bytes == 2 ? chunk.word[i] & 0xffffu : 0;
  }
  return chunk;
}

// ---- Values -------------------------------------------------------------------------------------

template <typename T>
__device__ inline float2 PairOf(const Chunk<T>& chunk, int pair) {
  if constexpr (std::is_same_v<T, float>) {
    return {__uint_as_float(chunk.word[2 * pair]), __uint_as_float(chunk.word[2 * pair + 1])};
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(chunk.word[pair]));
  } else {
    return {__uint_as_float(chunk.word[pair] << 16),
            __uint_as_float(chunk.word[pair] & 0xffff0000u)};
  }
}

template <typename T>
__device__ inline void SetPair(Chunk<T>& chunk, int pair, float2 v) {
  if constexpr (std::is_same_v<T, float>) {
    chunk.word[2 * pair] = __float_as_uint(v.x), chunk.word[2 * pair + 1] = __float_as_uint(v.y);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 two = __float22half2_rn(v);
    chunk.word[pair] = reinterpret_cast<const uint32_t&>(two);
  } else {
    const __nv_bfloat162 two = __float22bfloat162_rn(v);
    chunk.word[pair] = reinterpret_cast<const uint32_t&>(two);
  }
}

// The running maximum of |x|. Inf and nan win over every number, so that one comparison at the end
// finds them.
template <typename T>
class AbsMax {
 public:
  __device__ void Add(const Chunk<T>& chunk) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (uint32_t word : chunk.word) bits_ = max(bits_, word & 0x7fffffffu);
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
      for (uint32_t word : chunk.word) {
        word &= 0x7fff7fffu;
        Pair largest =
            __hmax2_nan(reinterpret_cast<const Pair&>(bits_), reinterpret_cast<const Pair&>(word));
        bits_ = reinterpret_cast<const uint32_t&>(largest);
      }
    }
  }

  // The bits of a float32 without sign. As unsigned integers they have the order of the floats,
  // with inf and nan on top.
  __device__ uint32_t Bits() const {
    if constexpr (std::is_same_v<T, float>) {
      return bits_;
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 f = __half22float2(reinterpret_cast<const __half2&>(bits_));
      return max(__float_as_uint(f.x) & 0x7fffffffu, __float_as_uint(f.y) & 0x7fffffffu);
    } else {
      return max(bits_ << 16, bits_ & 0xffff0000u) & 0x7fffffffu;
    }
  }

 private:
  uint32_t bits_ = 0;
};

// ---- Codes --------------------------------------------------------------------------------------

// A row's scale, and the factor that makes its codes. Factor 0 stands for "every code is 0".
struct RowScale {
  float scale;
  float factor;
};

template <typename Out>
__device__ RowScale ScaleOf(uint32_t absmax_bits) {
  // The bits of the smallest magnitude that is no number in `Out`, or becomes inf when it is
  // rounded: 65520 for float16, 2^128 - 2^119 for bfloat16.
  constexpr uint32_t kInfBits = std::is_same_v<Out, __half>          ? 0x477ff000u
                                : std::is_same_v<Out, __nv_bfloat16> ? 0x7f7f8000u
                                                                     : 0x7f800000u;
  constexpr float kReciprocalQmax =
      static_cast<float>(1.0 / (std::is_same_v<Out, int8_t> ? 127.0 : 448.0));
  if (absmax_bits >= kInfBits) return {__uint_as_float(0x7fc00000u), 0.0f};
  if constexpr (!kQuantised<Out>) return {1.0f, 1.0f};
  const float scale = __fmul_rn(__uint_as_float(absmax_bits), kReciprocalQmax);
  if (scale < FLT_MIN) return {1.0f, 0.0f};
  return {scale, __frcp_rn(scale)};
}

// Gives round_half_even(v) in the low bits: adding 1.5 * 2^23 leaves no fraction bits. With a row's
// own absmax |v| < 127.5, so that nothing needs clipping. An absmax that was given (kClip) promises
// nothing.
template <bool kClip>
__device__ inline uint32_t RoundToInt8(float v) {
  if constexpr (kClip) v = fminf(fmaxf(v, -127.0f), 127.0f);
  return __float_as_uint(__fadd_rn(v, 12582912.0f));
}

// The results for a chunk's eight columns, as they lie in memory.
template <typename In, typename Out, bool kClip = true>
__device__ inline Chunk<Out> Convert(const Chunk<In>& chunk, float factor) {
  if constexpr (std::is_same_v<In, Out>) {
    return chunk;
  } else {
    Chunk<Out> result;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 x = PairOf(chunk, pair);
      if constexpr (std::is_same_v<Out, int8_t>) {
        const uint32_t first = RoundToInt8<kClip>(__fmul_rn(x.x, factor)),
                       second = RoundToInt8<kClip>(__fmul_rn(x.y, factor));
        const uint32_t two = __byte_perm(first, second, 0x0040);
        result.word[pair / 2] = pair % 2 ? __byte_perm(result.word[pair / 2], two, 0x5410) : two;
      } else if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
        const float2 v = {__fmul_rn(x.x, factor), __fmul_rn(x.y, factor)};
        const uint32_t two = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
        result.word[pair / 2] = pair % 2 ? __byte_perm(result.word[pair / 2], two, 0x5410) : two;
      } else {
        SetPair(result, pair, x);
      }
    }
    if constexpr (kQuantised<Out>) {
      if (factor == 0.0f) result = {};
    }
    return result;
  }
}

}  // namespace slidejax::lift

// From accumulators to y: scales, bias, conversion, transposition, stores.
//
// D is [outputs][tokens], y is [tokens][outputs]. With g = lane / 4 and c = lane % 4, a lane holds
// outputs g and g + 8 of its warp's 16, and tokens 2 c and 2 c + 1 of every eight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "hopper/pipeline.cuh"

namespace slidejax::hopper {

SJ_DEVICE float ToFloat(float v) { return v; }
SJ_DEVICE float ToFloat(int v) { return __int2float_rn(v); }

// One rounding for each operation, never contracted: the result is the reference's, bit for bit.
template <bool kBias = true, class A>
SJ_DEVICE float Dequantize(A acc, float scale_x, float scale_w, float bias) {
  const float y = __fmul_rn(__fmul_rn(ToFloat(acc), scale_x), scale_w);
  return kBias ? __fadd_rn(y, bias) : y;
}

template <bool kBf16>
SJ_DEVICE uint32_t PackPair(float low, float high) {
  if constexpr (kBf16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

// Shared memory behind the rings: first the staging buffers of all warps, 1 KB aligned, then two
// sets of scales for each warp group.
template <class T>
SJ_DEVICE uint32_t StagingOf(const Shared& shared, int warp) {
  return shared.staging + warp * T::kStagingBytes;
}
template <class T>
SJ_DEVICE uint32_t ScalesOf(const Shared& shared, int group, int set) {
  return shared.staging + T::kWarpGroups * 4 * T::kStagingBytes +
         (group * 2 + set) * T::kScaleBytes;
}

// Starts copying a tile's scale_x [tokens], and scale_w and bias [outputs of the warp group]. All
// threads of the warp group take part.
template <class T>
SJ_DEVICE void PrefetchScales(const Params& p, uint32_t scale_x, int row, int token) {
  const int thread = FreshThread() & 127;
#pragma unroll
  for (int i = 0; i < (T::kTokens + 127) / 128; ++i) {
    const int t = i * 128 + thread;
    if (t < T::kTokens) CopyAsync4(scale_x + 4 * t, p.scale_x + token + t, token + t < p.M);
  }
  if (thread < T::kM64Blocks * 64) {
    const uint32_t scale_w = scale_x + T::kTokens * 4 + thread * 4;
    const bool inside = row + thread < p.out;
    CopyAsync4(scale_w, p.scale_w + row + thread, inside);
    if (p.bias != nullptr) {
      CopyAsync4(scale_w + T::kM64Blocks * 256, p.bias + row + thread, inside);
    } else {
      // Adding -0 changes nothing, not even the sign of a zero.
      StoreSharedF32(scale_w + T::kM64Blocks * 256, -0.0f);
    }
  }
}

// The place of a lane's sums in y, their scales and their biases.
struct Fragment {
  float w0, w1, b0, b1;  // scale_w and bias of outputs g and g + 8
  uint32_t scale_x;      // address in shared memory, for the lane's first two tokens
  int row, token, lane;  // the warp's first output, the first token
};

SJ_DEVICE Fragment MakeFragment(uint32_t scale_x, uint32_t scale_w, uint32_t bias, int row,
                                int token) {
  const int lane = FreshThread() & 31, at = (lane >> 2) * 4;
  return {LoadSharedF32(scale_w + at),
          LoadSharedF32(scale_w + at + 32),
          LoadSharedF32(bias + at),
          LoadSharedF32(bias + at + 32),
          scale_x + (lane & 3) * 8,
          row,
          token,
          lane};
}

// The fragment of m64 block `block` of a warp group, from its token number `first` on, with the
// scales that PrefetchScales has brought. row, token: the warp group's first output, the tile's
// first token.
template <class T>
SJ_DEVICE Fragment FragmentOf(const Shared& shared, int warp, int set, int block, int first,
                              int row, int token) {
  const uint32_t scale_x = ScalesOf<T>(shared, warp >> 2, set);
  const uint32_t scale_w = scale_x + T::kTokens * 4 + block * 256 + (warp & 3) * 64;
  return MakeFragment(scale_x + first * 4, scale_w, scale_w + T::kM64Blocks * 256,
                      row + block * 64 + (warp & 3) * 16, token + first);
}

// The residual of a lane's sums of `kTokens` tokens, in their order: bits as they lie in memory.
// All are asked for before one is used, so that a lane waits once.
template <int kTokens>
struct Residual {
  uint32_t bits[kTokens / 2];

  // row, first: the fragment's first output, and the first token. A kernel ahead may have written
  // the residual while this one was waiting, so it is read from L2.
  SJ_DEVICE void Load(const Params& p, int row, int first) {
    if (p.residual == nullptr) return;
    const int lane = FreshThread() & 31;
    const int output = row + (lane >> 2), token = first + 2 * (lane & 3);
    if (p.residual_type == DType::kF32) {
      LoadAs<uint32_t>(p, output, token);
    } else {
      LoadAs<uint16_t>(p, output, token);
    }
  }

  // Writes the numbers. Adding -0 changes nothing.
  SJ_DEVICE void Get(const Params& p, float (&r)[kTokens / 2]) const {
    if (p.residual == nullptr) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) r[i] = -0.0f;
    } else if (p.residual_type == DType::kF16) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const auto half = static_cast<uint16_t>(bits[i]);
        r[i] = __half2float(reinterpret_cast<const __half&>(half));
      }
    } else {
      const int shift = p.residual_type == DType::kBF16 ? 16 : 0;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const uint32_t word = bits[i] << shift;
        r[i] = reinterpret_cast<const float&>(word);
      }
    }
  }

 private:
  // Beyond the edges it reads what lies at them, since a branch would wait for each load.
  template <class Bits>
  SJ_DEVICE void LoadAs(const Params& p, int output, int token) {
    const auto* from = static_cast<const Bits*>(p.residual);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int t = min(token + i / 4 * 8 + (i & 1), p.M - 1);
      const int o = min(output + (i & 2) * 4, p.out - 1);
      bits[i] = __ldcg(from + static_cast<size_t>(t) * p.out + o);
    }
  }
};

// Converts 16 tokens to the fragments of four transposed 8x8 matrices; s: the scales of the lane's
// tokens; residual: of the sums, where kAdds.
template <bool kBf16, bool kBias, bool kAdds, class A>
SJ_DEVICE void Convert(const A* d, const Fragment& f, const float2* s, const float* residual,
                       uint32_t (&r)[4]) {
  const auto value = [&](int i, float scale_x, float scale_w, float bias) {
    const float v = Dequantize<kBias>(d[i], scale_x, scale_w, bias);
    return kAdds ? __fadd_rn(v, residual[i]) : v;
  };
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    r[2 * h] =
        PackPair<kBf16>(value(4 * h, s[h].x, f.w0, f.b0), value(4 * h + 1, s[h].y, f.w0, f.b0));
    r[2 * h + 1] =
        PackPair<kBf16>(value(4 * h + 2, s[h].x, f.w1, f.b1), value(4 * h + 3, s[h].y, f.w1, f.b1));
  }
}
template <int kTokens>
SJ_DEVICE void LoadScales(const Fragment& f, int first, float2 (&s)[kTokens / 8]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) s[j] = LoadShared2F(f.scale_x + (first + 8 * j) * 4);
}

// Stores 32-bit results, float32 or the sums themselves. A warp's store covers whole sectors, so
// the sums need no transposing.
template <int kTokens, bool kAdds, class A>
SJ_DEVICE void StoreSlab32(const Params& p, const A (&d)[kTokens / 2], const float* residual,
                           const Fragment& f, int first) {
  const int g = f.lane >> 2, c = f.lane & 3;
  float* y = static_cast<float*>(p.y);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const float2 s = LoadShared2F(f.scale_x + (first + 8 * j) * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = f.token + first + 8 * j + 2 * c + (i & 1), o = f.row + g + (i & 2) * 4;
      float v =
          Dequantize(d[4 * j + i], i & 1 ? s.y : s.x, i & 2 ? f.w1 : f.w0, i & 2 ? f.b1 : f.b0);
      if constexpr (kAdds) v = __fadd_rn(v, residual[4 * j + i]);
      if (t < p.M && o < p.out) {
        y[static_cast<size_t>(t) * p.out + o] =
            p.result == DType::kF32 ? v : reinterpret_cast<const float&>(d[4 * j + i]);
      }
    }
  }
  __syncwarp();  // before the scales are overwritten
}

// Stores 16-bit results through shared memory, 32 bytes a token. The halves of a token's bytes
// change places every 4 tokens, which avoids bank conflicts.
template <int kTokens, bool kAdds, class A>
SJ_DEVICE void StoreSlab16(const Params& p, const A (&d)[kTokens / 2], const float* residual,
                           const Fragment& f, int first, uint32_t staging) {
  float2 s[kTokens / 8];
  LoadScales<kTokens>(f, first, s);
  const int matrix = f.lane >> 3, in = f.lane & 7;
  const uint32_t put = staging + ((matrix >> 1) * 8 + in) * 32 + (((matrix & 1) ^ (in >> 2)) << 4);
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    uint32_t r[4];
    if (p.result == DType::kBF16) {
      Convert<true, true, kAdds>(d + 8 * i, f, s + 2 * i, residual + 8 * i, r);
    } else {
      Convert<false, true, kAdds>(d + 8 * i, f, s + 2 * i, residual + 8 * i, r);
    }
    StoreMatricesTransposed(put + i * 512, r[0], r[1], r[2], r[3]);
  }
  __syncwarp();
  const int take = f.lane >> 1, half = f.lane & 1, o = f.row + half * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 16; ++i) {
    const uint4 v = LoadShared4(staging + i * 512 + take * 32 + ((half ^ ((take >> 2) & 1)) << 4));
    const int t = f.token + first + i * 16 + take;
    if (t >= p.M || o >= p.out) continue;
    uint16_t* to = static_cast<uint16_t*>(p.y) + static_cast<size_t>(t) * p.out + o;
    if (p.vector_stores) {
      *reinterpret_cast<uint4*>(to) = v;
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (o + k < p.out) to[k] = static_cast<uint16_t>(words[k / 2] >> (16 * (k & 1)));
      }
    }
  }
  __syncwarp();
}

// Stores up to 32 tokens of a warp, of any output type and alignment. staging: 1 KB of the warp's
// shared memory. residual: of the sums, where kAdds.
template <int kTokens, bool kAdds, class A>
SJ_DEVICE void StoreSlab(const Params& p, const A (&d)[kTokens / 2], const float* residual,
                         const Fragment& f, int first, uint32_t staging) {
  if (p.result == DType::kF32 || p.result == DType::kS32) {
    StoreSlab32<kTokens, kAdds>(p, d, residual, f, first);
  } else {
    StoreSlab16<kTokens, kAdds>(p, d, residual, f, first, staging);
  }
}

// Stores m64 block kM64Block of a warp group as bfloat16 by bulk copies of whole lines of y, which
// run asynchronously (TMA). `slabs`: the staging buffers of the warp group.
template <class T, int kM64Block, bool kBias, class A>
SJ_DEVICE void StoreBulk(const Params& p, const A (&d)[T::kTokens / 2], const Fragment& f,
                         uint32_t slabs, int warp) {
  constexpr int kSlab = T::kSlabTokens, kCount = T::kTokens / kSlab;
  const int matrix = f.lane >> 3, in = f.lane & 7;
  const uint32_t put = slabs + ((matrix >> 1) * 8 + in) * 128 +
                       (((2 * (warp & 3) + (matrix & 1)) ^ in) << 4);  // 128-byte swizzle
  const bool leader = (warp & 3) == 0 && f.lane == 0;
  float2 s[2][kSlab / 8];
  LoadScales<kSlab>(f, 0, s[0]);
#pragma unroll
  for (int slab = 0; slab < kCount; ++slab) {
    const int at = (kM64Block * kCount + slab) % T::kSlabs * T::kSlabBytes;
    if (slab + 1 < kCount) LoadScales<kSlab>(f, (slab + 1) * kSlab, s[(slab + 1) & 1]);
#pragma unroll
    for (int i = 0; i < kSlab / 16; ++i) {
      uint32_t r[4];
      Convert<true, kBias, false>(d + slab * (kSlab / 2) + 8 * i, f, s[slab & 1] + 2 * i, nullptr,
                                  r);
      StoreMatricesTransposed(put + at + i * 2048, r[0], r[1], r[2], r[3]);
    }
    FenceAsyncShared();
    // The buffer after this one has been read when the barrier opens.
    if (leader) BulkWaitRead<(T::kSlabs > 1 ? T::kSlabs - 2 : 0)>();
    NamedSync(1 + (warp >> 2), 128);
    if (leader) {
      TmaStore2d(&p.map_y, slabs + at, f.row, f.token + slab * kSlab, kEvictFirst);
      BulkCommit();
    }
  }
}

// Stores the sums of m64 block kM64Block of a warp group.
template <class T, int kM64Block, class A>
SJ_DEVICE void StoreBlock(const Params& p, const A (&d)[T::kTokens / 2], const Shared& shared,
                          int warp, int set, int row, int token) {
  const Fragment f = FragmentOf<T>(shared, warp, set, kM64Block, 0, row, token);
  if (p.bulk_stores && p.bias != nullptr) {
    StoreBulk<T, kM64Block, true>(p, d, f, StagingOf<T>(shared, warp & ~3), warp);
  } else if (p.bulk_stores) {
    StoreBulk<T, kM64Block, false>(p, d, f, StagingOf<T>(shared, warp & ~3), warp);
  } else {
    Residual<T::kUnitTokens> next;
    if constexpr (T::kAdds) next.Load(p, f.row, f.token);
#pragma unroll
    for (int first = 0; first < T::kTokens; first += T::kUnitTokens) {
      float residual[T::kUnitTokens / 2];
      if constexpr (T::kAdds) {
        next.Get(p, residual);
        if (first + T::kUnitTokens < T::kTokens) {
          next.Load(p, f.row, f.token + first + T::kUnitTokens);
        }
      }
      StoreSlab<T::kUnitTokens, T::kAdds>(
          p, reinterpret_cast<const A(&)[T::kUnitTokens / 2]>(d[first / 2]), residual, f, first,
          StagingOf<T>(shared, warp));
    }
  }
}

}  // namespace slidejax::hopper

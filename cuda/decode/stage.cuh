// Turns rows of x into codes in the order of fragments.cuh: quantised to 8 bits, or rounded to 16.
// OwnRows does it in the decode kernel, and QuantiseAhead in a kernel before it.
#pragma once

#include "decode/decode.h"
#include "decode/fragments.cuh"
#include "decode/params.h"
#include "decode/ptx.cuh"
#include "lift/chunk.cuh"
#include "lift/prologue.cuh"

namespace slidejax::decode {

using lift::AbsMax;
using lift::Chunk;
using lift::kChunk;
using lift::RowScale;
using lift::ScaleOf;

// Eight columns of a row that starts anywhere, of which `count` are there; zeros for the others.
template <typename T>
__device__ __noinline__ Chunk<T> LoadPart(const T* from, int count) {
  Chunk<T> chunk = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= count) continue;
    if constexpr (sizeof(T) == 4) {
      chunk.word[i] = __ldcg(reinterpret_cast<const unsigned*>(from) + i);
    } else {
      const uint32_t bits = __ldcg(reinterpret_cast<const unsigned short*>(from) + i);
      chunk.word[i / 2] |= bits << (16 * (i % 2));
    }
  }
  return chunk;
}

// Writes chunk number `index` of a token, lifted. A pair of columns is the first half of the window
// that it begins and the second half of the window before.
template <int kWindows>
__device__ inline void PlaceWideCodes(uint8_t* token, int index, const uint32_t (&pairs)[4]) {
  constexpr int kBlockChunks = Shape{kWindows, 2}.block_columns() / kChunk;
  constexpr int kGroupWindows = kWindows == 0 ? 1 : kWindows, kPairs = kGroupWindows + 1;
  const int block = index / kBlockChunks, within = index % kBlockChunks;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int pair = 4 * within + i, group = pair / kPairs, place = pair % kPairs;
    const int window = group * kGroupWindows + place;
    const auto put = [&](int to, int half) {
      *reinterpret_cast<uint32_t*>(token + WideWindowOffset<kWindows>(block, to) +
                                   half * kHalfWindow) = pairs[i];
    };
    if (place < kGroupWindows) put(window, 0);
    if (place > 0) put(window - 1, 1);
  }
}

// The same of codes of 8 bits.
template <int kWindows>
__device__ inline void PlaceCodes(uint8_t* token, int index, uint2 codes) {
  constexpr Shape kShape{kWindows};
  constexpr int kBlockChunks = kShape.block_columns() / kChunk, kPairs = kWindows + 1;
  const int block = index / kBlockChunks, within = index % kBlockChunks;
  const auto put = [&](int window, uint32_t word) {
    *reinterpret_cast<uint32_t*>(token + WindowOffset<kWindows>(block, window)) = word;
  };
  if constexpr (kWindows <= 1) {  // lifting is the identity
    put(2 * within, codes.x), put(2 * within + 1, codes.y);
  } else if constexpr (kPairs == 4) {  // the chunk is a group
    put(3 * within, codes.x);
    put(3 * within + 1, __byte_perm(codes.x, codes.y, 0x5432));
    put(3 * within + 2, codes.y);
  } else {
    const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = 4 * within + i, group = pair / kPairs, place = pair % kPairs;
      const int window = group * kWindows + place;
      const auto half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
      const auto put_half = [&](int to, int second) {
        *reinterpret_cast<uint16_t*>(token + WindowOffset<kWindows>(block, to) + 2 * second) = half;
      };
      if (place < kWindows) put_half(window, 0);
      if (place > 0) put_half(window - 1, 1);
    }
  }
}

// How the warps of a block share the rows of x evenly: each row has 2^log_share warps.
struct RowShare {
  int row, first, stride, log_share;
  int rows;  // that the block has at a time

  __device__ explicit RowShare(int log_share, int first_row = 0) : log_share(log_share) {
    const int warp = threadIdx.x / kLanes;
    row = first_row + (warp >> log_share);
    first = (warp & ((1 << log_share) - 1)) * kLanes + threadIdx.x % kLanes;
    stride = kLanes << log_share;
    rows = static_cast<int>(blockDim.x / kLanes) >> log_share;
  }
};

// The sum of a row: `sum` is that of a thread. All threads of the block call it; warp_sums has a
// word for each warp, in shared memory.
__device__ inline float RowSum(const RowShare& at, float sum, float* warp_sums) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  const int share = 1 << at.log_share;
  float all = 0;
  for (int i = 0; i < share; ++i) all += warp_sums[(warp & -share) + i];
  return all;
}

// The largest |x| of a row: `most` is that of a thread. All threads of the block call it; warp_max
// is a word for each warp, in shared memory.
__device__ inline uint32_t RowMax(const RowShare& at, uint32_t most, uint32_t* warp_max) {
  most = __reduce_max_sync(kAllLanes, most);
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (lane == 0) warp_max[warp] = most;
  __syncthreads();
  const int share = (1 << at.log_share) - 1;
  return __reduce_max_sync(kAllLanes, warp_max[(warp & ~share) + (lane & share)]);
}

template <typename T>
__device__ inline Chunk<T> ChunkOf(const uint4* v) {
  Chunk<T> chunk;
#pragma unroll
  for (int k = 0; k < static_cast<int>(sizeof(T)) / 2; ++k) {
    chunk.word[4 * k] = v[k].x, chunk.word[4 * k + 1] = v[k].y;
    chunk.word[4 * k + 2] = v[k].z, chunk.word[4 * k + 3] = v[k].w;
  }
  return chunk;
}

// Writes the codes of chunk number `index` of a token, lifted.
template <int kWindows, typename Code>
__device__ inline void PlaceChunk(uint8_t* token, int index, const Chunk<Code>& codes) {
  if constexpr (sizeof(Code) == 2) {
    PlaceWideCodes<kWindows>(token, index, codes.word);
  } else {
    PlaceCodes<kWindows>(token, index, {codes.word[0], codes.word[1]});
  }
}

// The numbers of an RMS norm of x, beside its sum.
__device__ inline lift::PrologueParams NormOf(const DecodeArgs& a) {
  lift::PrologueParams params = {};
  params.weight = a.norm, params.eps = a.eps;
  params.columns = a.columns, params.per_column = 1.0f / static_cast<float>(a.columns);
  return params;
}

// Asks for the weights of the norm, if there is one. They lie before the rows of x.
__device__ inline void AskForNorm(const DecodeArgs& a, uint8_t* rows) {
  if (a.norm == nullptr) return;
  const uint32_t to = SharedAddress(rows);
  for (int i = threadIdx.x; i < a.columns / 4; i += blockDim.x)
    Copy16(to + i * 16, a.norm + i * 4, true);
}

// Asks for all rows of x, which lie behind the weights of the norm.
__device__ inline void AskForRows(const Params& p, uint8_t* rows) {
  const uint32_t to = SharedAddress(rows + (p.a.norm != nullptr ? p.a.columns * 4 : 0));
  const auto* from = static_cast<const uint8_t*>(p.a.x);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.row_pieces; i += blockDim.x)
    Copy16(to + i * 16, from + i * 16, true);
}

// Converts rows of x in the decode kernel, from shared memory.
template <typename T, typename Code>
class OwnRows {
  static constexpr int kParts = sizeof(T) / 2;  // of a chunk, of 16 bytes each

 public:
  // `rows` is the shared memory that AskForNorm and AskForRows have filled.
  __device__ OwnRows(const DecodeArgs& a, const RowShare& at, uint8_t* rows)
      : a_(a), at_(at), chunks_(at.row < a.M ? a.columns / kChunk : 0) {
    norm_ = reinterpret_cast<const float4*>(rows);
    row_ = rows + (a.norm != nullptr ? a.columns * 4 : 0) + at.row * a.columns * sizeof(T);
  }

  // Calls put(index, codes) for each chunk of the row, with codes of zero for those beyond the row,
  // up to number `all`. warp_words has two words for each warp.
  template <typename Put>
  __device__ void Run(uint32_t* warp_words, float* scale_x, int all, const Put& put) const {
    uint32_t* warp_max = warp_words;
    if (a_.norm != nullptr) Normalise(reinterpret_cast<float*>(warp_words + kMaxWarps));
    AbsMax<T> most;
    if constexpr (lift::kQuantised<Code>) {
#pragma unroll 4
      for (int index = at_.first; index < chunks_; index += at_.stride) most.Add(ChunkAt(index));
    } else {
      Convert(all, 1.0f, &most, put);  // the maximum only tells whether there is inf or nan
    }
    const RowScale scale = ScaleOf<Code>(RowMax(at_, most.Bits(), warp_max));
    if (chunks_ > 0 && at_.first == 0) *scale_x = scale.scale;
    if constexpr (lift::kQuantised<Code>) Convert(all, scale.factor, nullptr, put);
  }

 private:
  __device__ void Normalise(float* warp_sums) const {
    lift::RmsNormPrologue norm;
    float sums[1] = {};
#pragma unroll 4
    for (int i = at_.first; i < chunks_; i += at_.stride) norm.Sum(ChunkAt(i), sums);
    sums[0] = RowSum(at_, sums[0], warp_sums);
    norm.Finish(sums, NormOf(a_));
#pragma unroll 2
    for (int i = at_.first; i < chunks_; i += at_.stride) {
      const float4 low = norm_[2 * i], high = norm_[2 * i + 1];
      const Chunk<T> y =
          norm.Apply(ChunkAt(i), {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w});
#pragma unroll
      for (int k = 0; k < kParts; ++k)
        reinterpret_cast<uint4*>(row_)[i * kParts + k] = {y.word[4 * k], y.word[4 * k + 1],
                                                          y.word[4 * k + 2], y.word[4 * k + 3]};
    }
  }

  template <typename Put>
  __device__ void Convert(int all, float factor, AbsMax<T>* most, const Put& put) const {
    if (chunks_ == 0) return;
#pragma unroll 2
    for (int index = at_.first; index < all; index += at_.stride) {
      const Chunk<T> chunk = index < chunks_ ? ChunkAt(index) : Chunk<T>{};
      if (most != nullptr) most->Add(chunk);
      put(index, lift::Convert<T, Code, false>(chunk, factor));
    }
  }

  __device__ Chunk<T> ChunkAt(int index) const {
    return ChunkOf<T>(reinterpret_cast<const uint4*>(row_) + index * kParts);
  }

  const DecodeArgs& a_;
  const RowShare at_;
  const int chunks_;
  uint8_t* row_;
  const float4* norm_;
};

// Calls `work` with a zero of the type of x, for its type.
template <typename Work>
__device__ inline void WithTypeOfX(DType type, const Work& work) {
  switch (type) {
    case DType::kBF16: return work(__nv_bfloat16{});
    case DType::kF16: return work(__half{});
    default: return work(float{});
  }
}

// Quantises a row of x in each block, ahead of the decode kernel: codes [M, steps] in the order of
// fragments.cuh, and scale_x [M]. Takes rows of any length that start anywhere.
template <typename T, typename Code, int kWindows>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    QuantiseAhead(const __grid_constant__ Params p) {
  constexpr int kLogWarps = 4, kParts = sizeof(T) / 2;
  static_assert(1 << kLogWarps == kMaxWarps, "the block shares one row");
  constexpr Shape kShape{kWindows, sizeof(Code)};
  __shared__ uint32_t warp_words[2 * kMaxWarps];
  const DecodeArgs& a = p.a;
  GridWait();
  GridRelease();
  const RowShare at(kLogWarps, blockIdx.x);
  const T* from = static_cast<const T*>(a.x) + static_cast<int64_t>(at.row) * a.columns;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const int all = p.steps * kStepBlocks * kShape.block_columns() / kChunk;
  const auto each = [&](auto&& visit) {
    for (int index = at.first; index < all; index += at.stride) {
      const T* chunk = from + static_cast<int64_t>(index) * kChunk;
      const int left = a.columns - index * kChunk;
      if (aligned && left >= kChunk) {
        uint4 v[kParts];
#pragma unroll
        for (int k = 0; k < kParts; ++k) v[k] = __ldcg(reinterpret_cast<const uint4*>(chunk) + k);
        visit(index, ChunkOf<T>(v));
      } else {
        visit(index, LoadPart(chunk, left));
      }
    }
  };
  lift::RmsNormPrologue norm;
  const lift::PrologueParams norm_params = NormOf(a);
  if (a.norm != nullptr) {
    float sums[1] = {};
    each([&](int, const Chunk<T>& chunk) { norm.Sum(chunk, sums); });
    sums[0] = RowSum(at, sums[0], reinterpret_cast<float*>(warp_words + kMaxWarps));
    norm.Finish(sums, norm_params);
  }
  const auto each_input = [&](auto&& visit) {
    each([&](int index, const Chunk<T>& chunk) {
      const bool normalises = a.norm != nullptr && index * kChunk < a.columns;
      visit(index, normalises ? norm.Apply(chunk, chunk, index * kChunk, norm_params) : chunk);
    });
  };
  AbsMax<T> most;
  each_input([&](int, const Chunk<T>& chunk) { most.Add(chunk); });
  const RowScale scale = ScaleOf<Code>(RowMax(at, most.Bits(), warp_words));
  if (at.first == 0) p.scale_x[at.row] = scale.scale;
  uint8_t* token = p.codes + static_cast<int64_t>(at.row) * p.steps * kShape.step_lifted();
  each_input([&](int index, const Chunk<T>& chunk) {
    PlaceChunk<kWindows>(token, index, lift::Convert<T, Code, false>(chunk, scale.factor));
  });
}

}  // namespace slidejax::decode

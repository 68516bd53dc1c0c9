// Activation lifting fused with dynamic quantisation (SlideSparse, arXiv 2603.05232; the formulas are docs/design.md's).
//
//   lifted[m, g, w, l] = code(x[m, 2N*g + 2*w + l]),  scale[m] = absmax[m] * float32(1/qmax),
//   code(v) = round_half_even(v * (1/scale)) clipped to +-qmax.
//
// Everything is bytes moved, so the kernel reads a row once: its warps hold it in registers in *chunks* of 8 columns, agree on
// absmax, and write the codes. A lane's chunk of codes is not a whole number of 16-byte stores after lifting, so a warp passes
// each *tile* (32 chunks, times the odd part of N so that a tile is whole groups and whole 16-byte stores) through shared memory.
// There the unit is a *pair* of columns: pair p of group g is the first half of window p and the second half of window p-1, which
// makes lifting two stores of the same pair, at slots 2q and 2q-1 with q = pair - group.
//
// Rows too long for the registers, rows whose absmax is given, and casts without quantisation take the streaming variant
// (kTiles = 0), which holds one tile at a time; where it must find absmax first it reads the row twice, the second time mostly out
// of the L2 cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "lift_quantize.h"

namespace slidejax {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr unsigned kInfBits = 0x7f800000u;
constexpr int kLanes = 32;
constexpr int kChunk = 8;  // columns that a lane loads at once

struct Params {
  const void* x;
  const float* absmax;
  void* lifted;
  float* scale;
  int64_t rows;
  int columns;
  int lifted_columns;
  int tiles;          // of a row, padding included
  int tiles_of_warp;
  int n;              // N of 2N-2:2N; 1: no lifting
  bool x_aligned;     // every row starts at a multiple of 16 bytes and ends with a whole chunk
  bool out_aligned;   // n == 1: the same for the result
};

// The odd part of N: chunks of a lane in one tile, so that 256 * TileSteps(N) columns are whole groups.
__host__ __device__ constexpr int TileSteps(int n) { return n % 2 ? n : TileSteps(n / 2); }

template <typename T>
constexpr bool kQuantised = sizeof(T) == 1;

template <typename T>
__device__ constexpr float ReciprocalQmax() {
  return static_cast<float>(1.0 / (std::is_same_v<T, int8_t> ? 127.0 : 448.0));
}

// ---- Rows: where the columns come from. Another source (a normalisation or a gate in front) is another row type. ---------------

// Eight columns, as they lie in memory.
template <typename T>
struct Chunk {
  static constexpr int kWords = kChunk * sizeof(T) / 4;
  uint32_t word[kWords];
};

__device__ inline uint4 LoadOnce(const void* address) {  // x is read once: keep it out of L1
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

// A row of x. kAligned: it starts at a multiple of 16 bytes and is whole chunks; else that is looked up.
template <typename T, bool kAligned>
class PlainRow {
 public:
  using Element = T;

  __device__ PlainRow(const Params& p, int64_t row)
      : begin_(static_cast<const char*>(p.x) + row * p.columns * static_cast<int64_t>(sizeof(T))),
        columns_(p.columns), aligned_(kAligned || p.x_aligned) {}

  // Columns column .. column+7; zeros past the end of the row.
  __device__ Chunk<T> Load(int column) const {
    Chunk<T> chunk = {};
    if (column >= columns_) return chunk;
    const char* address = begin_ + static_cast<int64_t>(column) * sizeof(T);
    if (kAligned || aligned_) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) Put(chunk.word + i, LoadOnce(address + 4 * i));
    } else {
      LoadUnaligned(address, column, chunk);
    }
    return chunk;
  }

 private:
  static constexpr int kWords = Chunk<T>::kWords;

  static __device__ void Put(uint32_t* word, uint4 v) {
    word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
  }

  // Aligned 16-byte loads of every granule that holds a byte of the row, shifted into place. A granule that is partly
  // outside the array lies in the same 16 bytes as a byte inside it, so it is never outside the allocation.
  __device__ void LoadUnaligned(const char* address, int column, Chunk<T>& chunk) const {
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
    const char* granule = address - shift;
    const char* end = begin_ + static_cast<int64_t>(columns_) * sizeof(T);
    uint32_t word[kWords + 4] = {};
#pragma unroll
    for (int i = 0; i < kWords + 4; i += 4) {
      if (granule + 4 * i < end) Put(word + i, __ldg(reinterpret_cast<const uint4*>(granule + 4 * i)));
    }
    if (shift & 8) {
#pragma unroll
      for (int i = 0; i < kWords + 2; ++i) word[i] = word[i + 2];
    }
    if (shift & 4) {
#pragma unroll
      for (int i = 0; i < kWords + 1; ++i) word[i] = word[i + 1];
    }
    if (sizeof(T) == 2 && (shift & 2)) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = __funnelshift_r(word[i], word[i + 1], 16);
    }
    const int valid = (columns_ - column) * static_cast<int>(sizeof(T));  // bytes
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int bytes = valid - 4 * i;
      chunk.word[i] = bytes >= 4 ? word[i] : bytes == 2 ? word[i] & 0xffffu : 0;
    }
  }

  const char* begin_;
  int columns_;
  bool aligned_;
};

// ---- Arithmetic on a chunk ----------------------------------------------------------------------------------------------------

// Running maximum of |x|; inf and nan win over every number, so that one comparison finds them at the end.
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
        Pair largest = __hmax2_nan(reinterpret_cast<const Pair&>(bits_), reinterpret_cast<const Pair&>(word));
        bits_ = reinterpret_cast<const uint32_t&>(largest);
      }
    }
  }

  // Float32 bits, sign clear: ordered as unsigned integers, inf and nan on top.
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

template <typename T>
__device__ inline float2 PairOf(const Chunk<T>& chunk, int pair) {
  if constexpr (std::is_same_v<T, float>) {
    return {__uint_as_float(chunk.word[2 * pair]), __uint_as_float(chunk.word[2 * pair + 1])};
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(chunk.word[pair]));
  } else {
    return {__uint_as_float(chunk.word[pair] << 16), __uint_as_float(chunk.word[pair] & 0xffff0000u)};
  }
}

// A row's scale, and the factor that makes codes; factor 0 stands for "every code is 0".
struct RowScale {
  float scale;
  float factor;
};

template <typename Out>
__device__ RowScale ScaleOf(uint32_t absmax_bits) {
  if (absmax_bits >= kInfBits) return {__uint_as_float(0x7fc00000u), 0.0f};
  if constexpr (!kQuantised<Out>) return {1.0f, 1.0f};
  const float scale = __fmul_rn(__uint_as_float(absmax_bits), ReciprocalQmax<Out>());
  if (scale < FLT_MIN) return {1.0f, 0.0f};
  return {scale, __frcp_rn(scale)};
}

// round_half_even(v) in the low bits: adding 1.5 * 2^23 leaves no fraction bits.
__device__ inline uint32_t RoundToInt8(float v) {
  return __float_as_uint(__fadd_rn(fminf(fmaxf(v, -127.0f), 127.0f), 12582912.0f));
}

// The results for a chunk's eight columns, as they lie in memory.
template <typename In, typename Out>
__device__ inline Chunk<Out> Convert(const Chunk<In>& chunk, float factor) {
  if constexpr (std::is_same_v<In, Out>) {
    return chunk;
  } else {
    Chunk<Out> result;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 x = PairOf(chunk, pair);
      if constexpr (std::is_same_v<Out, int8_t>) {
        const uint32_t two = __byte_perm(RoundToInt8(__fmul_rn(x.x, factor)), RoundToInt8(__fmul_rn(x.y, factor)), 0x0040);
        result.word[pair / 2] = pair % 2 ? __byte_perm(result.word[pair / 2], two, 0x5410) : two;
      } else if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
        const float2 v = {__fmul_rn(x.x, factor), __fmul_rn(x.y, factor)};
        const uint32_t two = __nv_cvt_float2_to_fp8x2(v, __NV_SATFINITE, __NV_E4M3);
        result.word[pair / 2] = pair % 2 ? __byte_perm(result.word[pair / 2], two, 0x5410) : two;
      } else if constexpr (std::is_same_v<Out, float>) {
        result.word[2 * pair] = __float_as_uint(x.x), result.word[2 * pair + 1] = __float_as_uint(x.y);
      } else if constexpr (std::is_same_v<Out, __half>) {
        const __half2 two = __float22half2_rn(x);
        result.word[pair] = reinterpret_cast<const uint32_t&>(two);
      } else {
        const __nv_bfloat162 two = __float22bfloat162_rn(x);
        result.word[pair] = reinterpret_cast<const uint32_t&>(two);
      }
    }
    if constexpr (kQuantised<Out>) {
      if (factor == 0.0f) result = {};
    }
    return result;
  }
}

// ---- Writing ------------------------------------------------------------------------------------------------------------------

// Bytes of a staged tile: 256 * steps columns are 128 * steps / n groups of n-1 windows of four.
__host__ __device__ constexpr int TileBytes(int n, int out_bytes) {
  return n == 1 ? 0 : 128 * TileSteps(n) / n * (n - 1) * 4 * out_bytes;
}

// Writes chunk number `index` of a tile, lifted, to the tile's shared memory.
template <int kN, typename Out>
__device__ inline void StageLifted(char* tile, int index, const Chunk<Out>& c, int n) {
  if constexpr (kN == 2) {  // 2:4: lifting is the identity
    if constexpr (sizeof(Out) == 1) reinterpret_cast<uint2*>(tile)[index] = {c.word[0], c.word[1]};
    else {
#pragma unroll
      for (int i = 0; i < Chunk<Out>::kWords; i += 4) {
        reinterpret_cast<uint4*>(tile)[(index * Chunk<Out>::kWords + i) / 4] = {c.word[i], c.word[i + 1], c.word[i + 2], c.word[i + 3]};
      }
    }
  } else if constexpr (kN == 4 && sizeof(Out) == 1) {  // 6:8: a chunk is a group; stride of 3 words: no bank conflicts
    uint32_t* window = reinterpret_cast<uint32_t*>(tile) + 3 * index;
    window[0] = c.word[0];
    window[1] = __byte_perm(c.word[0], c.word[1], 0x5432);
    window[2] = c.word[1];
  } else {
    using Pair = std::conditional_t<sizeof(Out) == 1, uint16_t, std::conditional_t<sizeof(Out) == 2, uint32_t, uint2>>;
    Pair* slot = reinterpret_cast<Pair*>(tile);
    int group = 4 * index / n;
    int place = 4 * index - group * n;  // of the pair in its group
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pair pair;
      if constexpr (sizeof(Out) == 1) pair = static_cast<uint16_t>(i % 2 ? c.word[i / 2] >> 16 : c.word[i / 2]);
      else if constexpr (sizeof(Out) == 2) pair = c.word[i];
      else pair = {c.word[2 * i], c.word[2 * i + 1]};
      const int q = 4 * index + i - group;
      if (place < n - 1) slot[2 * q] = pair;
      if (place > 0) slot[2 * q - 1] = pair;
      if (++place == n) place = 0, ++group;
    }
  }
}

// Copies a staged tile to the row of results, 16 bytes a lane. `out` and `tile` are the lane's own first bytes; `rest` is how many
// bytes of the row lie from there on, `lane_rest` how many of the tile.
__device__ inline void StoreTile(char* out, const char* tile, int rest, int lane_rest, int bytes) {
#pragma unroll
  for (int offset = 0; offset < bytes; offset += 16 * kLanes) {
    if (offset < lane_rest && offset < rest) *reinterpret_cast<uint4*>(out + offset) = *reinterpret_cast<const uint4*>(tile + offset);
  }
}

// Writes a chunk that is not lifted.
template <typename Out>
__device__ inline void StoreChunk(Out* row, int column, const Chunk<Out>& c, const Params& p) {
  if (column >= p.lifted_columns) return;
  if (p.out_aligned) {
    if constexpr (sizeof(Out) == 1) {
      *reinterpret_cast<uint2*>(row + column) = {c.word[0], c.word[1]};
    } else {
#pragma unroll
      for (int i = 0; i < Chunk<Out>::kWords; i += 4) {
        reinterpret_cast<uint4*>(row + column)[i / 4] = {c.word[i], c.word[i + 1], c.word[i + 2], c.word[i + 3]};
      }
    }
  } else {
    using Bits = std::conditional_t<sizeof(Out) == 1, uint8_t, std::conditional_t<sizeof(Out) == 2, uint16_t, uint32_t>>;
    constexpr int kPerWord = 4 / sizeof(Out);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < p.lifted_columns) {
        reinterpret_cast<Bits*>(row)[column + i] = static_cast<Bits>(c.word[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Out)));
      }
    }
  }
}

// ---- The kernel ---------------------------------------------------------------------------------------------------------------

// Largest of the row's warps; `slots` is the row's own shared memory, one word a warp.
__device__ inline uint32_t RowMax(uint32_t bits, uint32_t* slots) {
  bits = __reduce_max_sync(kFullMask, bits);
  const int warps = blockDim.x / kLanes;
  if (warps == 1) return bits;
  if (threadIdx.x % kLanes == 0) slots[threadIdx.x / kLanes] = bits;
  // The row's own barrier: rows of one thread block do not wait for each other.
  asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
  const int lane = threadIdx.x % kLanes;
  return __reduce_max_sync(kFullMask, lane < warps ? slots[lane] : 0);
}

constexpr int MaxThreads(int in_bytes) { return in_bytes == 4 ? 512 : 1024; }

// blockDim = (32 * warps of a row, rows). kN: N, 1 for no lifting, 0 for p.n. kTiles: tiles of a row that a warp holds in registers.
template <typename Row, typename Out, int kN, int kTiles>
__global__ void __launch_bounds__(MaxThreads(sizeof(typename Row::Element))) LiftQuantizeKernel(const Params p) {
  using In = typename Row::Element;
  extern __shared__ __align__(16) char shared[];
  const int n = kN ? kN : p.n;
  const int steps = kN ? TileSteps(kN ? kN : 1) : TileSteps(n);
  const int tile_columns = kLanes * kChunk * steps;
  const int tile_bytes = TileBytes(n, sizeof(Out));
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t row_index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row_index >= p.rows) return;  // a whole row's threads: they share no barrier with the other rows
  uint32_t* slots = reinterpret_cast<uint32_t*>(shared) + threadIdx.y * kLanes;
  char* stage = shared + blockDim.y * kLanes * 4 + (threadIdx.y * warps + warp) * tile_bytes;

  const Row row(p, row_index);
  // A warp's tiles are neighbours, so that everything below is its first tile's address plus a constant.
  const int first = warp * p.tiles_of_warp;
  const int count = min(p.tiles - first, p.tiles_of_warp);  // may be negative: no tiles
  const int column = first * tile_columns + lane * kChunk;
  constexpr int kStepColumns = kLanes * kChunk;
  Out* const out_row = static_cast<Out*>(p.lifted) + row_index * p.lifted_columns;
  const int out_offset = first * tile_bytes + lane * 16;  // the lane's first 16 bytes
  char* const out = reinterpret_cast<char*>(out_row) + out_offset;
  const int out_rest = p.lifted_columns * static_cast<int>(sizeof(Out)) - out_offset;

  // Writes one tile of results; `chunk(step)` gives the lane's columns.
  const auto emit = [&](int t, auto chunk, float factor) {
    if (n == 1) {
      StoreChunk(out_row, column + t * tile_columns, Convert<In, Out>(chunk(0), factor), p);
      return;
    }
    __syncwarp();  // the tile before has left shared memory
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      StageLifted<kN>(stage, step * kLanes + lane, Convert<In, Out>(chunk(step), factor), n);
    }
    __syncwarp();
    StoreTile(out + t * tile_bytes, stage + lane * 16, out_rest - t * tile_bytes, tile_bytes - lane * 16, tile_bytes);
  };

  if constexpr (kTiles > 0) {
    constexpr int kSteps = TileSteps(kN);
    Chunk<In> held[kTiles][kSteps];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        held[t][step] = t < count ? row.Load(column + (t * kSteps + step) * kStepColumns) : Chunk<In>{};
      }
    }
    AbsMax<In> absmax;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) absmax.Add(held[t][step]);
    }
    const RowScale s = ScaleOf<Out>(RowMax(absmax.Bits(), slots));
    if (threadIdx.x == 0) p.scale[row_index] = s.scale;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (t < count) emit(t, [&](int step) { return held[t][step]; }, s.factor);
    }
  } else {
    const auto load = [&](int t, int step) { return row.Load(column + (t * steps + step) * kStepColumns); };
    if constexpr (kQuantised<Out>) {
      uint32_t absmax_bits;
      if (p.absmax != nullptr) {
        absmax_bits = __float_as_uint(p.absmax[row_index]) & 0x7fffffffu;
      } else {
        AbsMax<In> absmax;
        for (int t = 0; t < count; ++t) {
          for (int step = 0; step < steps; ++step) absmax.Add(load(t, step));
        }
        absmax_bits = RowMax(absmax.Bits(), slots);
      }
      const RowScale s = ScaleOf<Out>(absmax_bits);
      if (threadIdx.x == 0) p.scale[row_index] = s.scale;
      for (int t = 0; t < count; ++t) emit(t, [&](int step) { return load(t, step); }, s.factor);
    } else {
      AbsMax<In> absmax;  // only to find inf and nan
      for (int t = 0; t < count; ++t) {
        emit(t, [&](int step) {
          const Chunk<In> chunk = load(t, step);
          absmax.Add(chunk);
          return chunk;
        }, 1.0f);
      }
      uint32_t absmax_bits = RowMax(absmax.Bits(), slots);
      if (p.absmax != nullptr) absmax_bits = max(absmax_bits, __float_as_uint(p.absmax[row_index]) & 0x7fffffffu);
      if (threadIdx.x == 0) p.scale[row_index] = ScaleOf<Out>(absmax_bits).scale;
    }
  }
}

// ---- Launching ----------------------------------------------------------------------------------------------------------------

constexpr int kStreamingWarps = 8;
constexpr int kEnoughWarps = 132 * 32;  // that fill a large GPU; fewer rows than that are spread over more warps each

// Tiles that a warp holds: up to 40 registers of a lane, or a single tile where that takes more.
constexpr int HeldTiles(int n, int in_bytes) {
  const int registers = 2 * in_bytes * TileSteps(n);
  return registers <= 8 ? 32 / registers : registers <= 40 ? 40 / registers : 1;
}

template <typename In, typename Out, int kN, int kTiles, bool kAligned = false>
cudaError_t Launch(Params p, int warps, cudaStream_t stream) {
  p.tiles_of_warp = (p.tiles + warps - 1) / warps;
  const auto kernel = LiftQuantizeKernel<PlainRow<In, kAligned>, Out, kN, kTiles>;
  const int rows = p.rows >= kEnoughWarps ? std::max(1, 4 / warps) : 1;  // of a thread block
  const int shared_bytes = rows * (kLanes * 4 + warps * TileBytes(p.n, sizeof(Out)));
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
  }
  const int64_t blocks = (p.rows + rows - 1) / rows;
  kernel<<<static_cast<unsigned>(blocks), dim3(kLanes * warps, rows), shared_bytes, stream>>>(p);
  return cudaPeekAtLastError();
}

template <typename In, typename Out, int kN, int kTiles, bool kAligned>
cudaError_t LaunchHeld(const Params& p, cudaStream_t stream) {
  const int fewest = (p.tiles + kTiles - 1) / kTiles;
  const int most = MaxThreads(sizeof(In)) / kLanes;
  if (p.absmax != nullptr || fewest > most) {
    return Launch<In, Out, 0, 0>(p, std::min(p.tiles, kStreamingWarps), stream);
  }
  const int wanted = static_cast<int>(std::min<int64_t>((kEnoughWarps + p.rows - 1) / p.rows, std::min(p.tiles, most)));
  return Launch<In, Out, kN, kTiles, kAligned>(p, std::max(fewest, wanted), stream);
}

template <typename In, typename Out, int kN>
cudaError_t LaunchN(const Params& p, cudaStream_t stream) {
  constexpr int kTiles = HeldTiles(kN, sizeof(In));
  if (p.x_aligned) return LaunchHeld<In, Out, kN, kTiles, true>(p, stream);
  // Shifting takes registers, so that a warp holds less of a row; float32 rows would leave too few.
  if constexpr (sizeof(In) == 2) return LaunchHeld<In, Out, kN, (kTiles + 1) / 2, false>(p, stream);
  return Launch<In, Out, 0, 0>(p, std::min(p.tiles, kStreamingWarps), stream);
}

template <typename In, typename Out>
cudaError_t LaunchOut(const Params& p, cudaStream_t stream) {
  if constexpr (kQuantised<Out>) {
    switch (p.n) {
      case 1: return LaunchN<In, Out, 1>(p, stream);
      case 2: return LaunchN<In, Out, 2>(p, stream);
      case 3: return LaunchN<In, Out, 3>(p, stream);
      case 4: return LaunchN<In, Out, 4>(p, stream);
      case 5: return LaunchN<In, Out, 5>(p, stream);
      case 6: return LaunchN<In, Out, 6>(p, stream);
      case 7: return LaunchN<In, Out, 7>(p, stream);
      case 8: return LaunchN<In, Out, 8>(p, stream);
      default: return cudaErrorInvalidValue;
    }
  } else {
    return Launch<In, Out, 0, 0>(p, std::min(p.tiles, kStreamingWarps), stream);
  }
}

template <typename In>
cudaError_t LaunchIn(const Params& p, DType out, cudaStream_t stream) {
  switch (out) {
    case DType::kS8: return LaunchOut<In, int8_t>(p, stream);
    case DType::kE4M3: return LaunchOut<In, __nv_fp8_e4m3>(p, stream);
    case DType::kBF16: return LaunchOut<In, __nv_bfloat16>(p, stream);
    case DType::kF16: return LaunchOut<In, __half>(p, stream);
    case DType::kF32: return LaunchOut<In, float>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t LiftQuantize(const LiftArgs& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int n = a.group == 0 ? 1 : a.group / 2;
  const int64_t in_bytes = Bytes(a.x_type);
  const int64_t tile_columns = 256 * TileSteps(n);
  const int64_t padded = n == 1 ? a.lifted_columns : a.lifted_columns / (4 * (n - 1)) * 2 * n;
  Params p = {};
  p.x = a.x, p.absmax = a.absmax, p.lifted = a.lifted, p.scale = a.scale, p.rows = a.rows;
  p.columns = static_cast<int>(a.columns), p.lifted_columns = static_cast<int>(a.lifted_columns), p.n = n;
  p.tiles = static_cast<int>(std::max<int64_t>(1, (padded + tile_columns - 1) / tile_columns));
  p.x_aligned = a.columns % kChunk == 0 && a.columns * in_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
  p.out_aligned = a.lifted_columns % kChunk == 0 && reinterpret_cast<uintptr_t>(a.lifted) % 16 == 0;
  switch (a.x_type) {
    case DType::kBF16: return LaunchIn<__nv_bfloat16>(p, a.lifted_type, stream);
    case DType::kF16: return LaunchIn<__half>(p, a.lifted_type, stream);
    case DType::kF32: return LaunchIn<float>(p, a.lifted_type, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slidejax

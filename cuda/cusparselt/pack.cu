#include <algorithm>

#include "cusparselt/pack.h"

namespace slidejax::cusparselt {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 8;  // groups that a thread packs

unsigned Blocks(int64_t threads) {
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 16)));
}

// A thread writes the metadata of a block of 8 groups. A warp has the blocks of 32 rows one below
// the other, and a thread block 8 warps side by side: the library keeps neighbouring rows near each
// other, so that the words that fill a sector of memory are written at about the same time.
__global__ void PackKernel(const PackArgs a, uint8_t* metadata) {
  constexpr int kWarps = kThreads / 32;
  const int windows = a.group / 2 - 1;
  const int64_t blocks = a.groups / kBlock, across = (blocks + kWarps - 1) / kWarps;
  const int64_t tiles = (a.padded_outputs + 31) / 32 * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile / across * 32 + threadIdx.x % 32;
    const int64_t block = tile % across * kWarps + threadIdx.x / 32;
    if (row >= a.padded_outputs || block >= blocks) continue;
    // Rows of padding have values of zero, and any metadata: here the zeros 0 and 1.
    const uint64_t zeros = row < a.outputs
                               ? reinterpret_cast<const uint64_t*>(a.zeros)[row * blocks + block]
                               : 0x1010101010101010ull;
    PackBlock(a.layout, zeros, windows, static_cast<uint32_t>(row), static_cast<uint32_t>(block),
              metadata);
  }
}

__device__ uint32_t Hash(uint64_t i) {  // splitmix64
  i += 0x9e3779b97f4a7c15ull;
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((i ^ (i >> 31)) >> 16);
}

// An element that is no zero, one of 64.
__device__ uint16_t Element(DType type, uint32_t random) {
  const uint32_t low = random & 63;
  switch (type) {
    case DType::kS8: return static_cast<uint16_t>(1 + low);
    case DType::kE4M3: return static_cast<uint16_t>(0x20 + low % 32);
    case DType::kBF16: return static_cast<uint16_t>(0x3f80 + low);
    default: return static_cast<uint16_t>(0x3c00 + low);
  }
}

__device__ void Store(DType type, void* data, int64_t i, uint16_t element) {
  if (type == DType::kS8 || type == DType::kE4M3)
    static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(element);
  else
    static_cast<uint16_t*>(data)[i] = element;
}

__global__ void FillPackedKernel(DType type, void* values, uint8_t* zeros, int64_t groups) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < groups;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t random = Hash(i);
    const uint32_t z1 = random % 3, z2 = z1 + 1 + random / 3 % (3 - z1);
    zeros[i] = static_cast<uint8_t>(z1 | z2 << 4);
    Store(type, values, 2 * i, Element(type, random >> 8));
    Store(type, values, 2 * i + 1, Element(type, random >> 16));
  }
}

__global__ void FillWindowsKernel(DType type, void* dense, int64_t windows, bool second) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < windows;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    for (int k = 0; k < 4; ++k)
      Store(type, dense, 4 * i + k, (k >= 2) == second ? Element(type, 0) : 0);
  }
}

__global__ void CompareKernel(const uint8_t* a, const uint8_t* b, int64_t bytes,
                              Difference* found) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int changed = a[i] ^ b[i];
    for (int half = 0; half < 2; ++half) {
      if ((changed >> (4 * half) & 15) == 0) continue;
      atomicAdd(&found->count, 1ull);
      atomicMax(&found->last, 2ull * static_cast<unsigned long long>(i) + half);
    }
  }
}

}  // namespace

cudaError_t PackCompressed(const PackArgs& a, cudaStream_t stream) {
  const int64_t row = a.groups * (a.group - 2) * static_cast<int64_t>(Bytes(a.type));
  auto* to = static_cast<uint8_t*>(a.compressed);
  const int64_t values = a.padded_outputs * row;
  cudaError_t status =
      cudaMemcpyAsync(to, a.values, a.outputs * row, cudaMemcpyDeviceToDevice, stream);
  if (status == cudaSuccess && a.padded_outputs > a.outputs)
    status = cudaMemsetAsync(to + a.outputs * row, 0, (a.padded_outputs - a.outputs) * row, stream);
  // The metadata may have room for more rows and windows than there are. The library writes the
  // nibble 14 there.
  const int64_t nibbles = a.padded_outputs * a.groups * (a.group / 2 - 1);
  if (status == cudaSuccess && 2 * (a.compressed_bytes - values) > nibbles)
    status = cudaMemsetAsync(to + values, 0xee, a.compressed_bytes - values, stream);
  if (status != cudaSuccess) return status;
  PackKernel<<<Blocks(a.padded_outputs * a.groups / kBlock), kThreads, 0, stream>>>(a, to + values);
  return cudaPeekAtLastError();
}

cudaError_t FillPacked(DType type, void* values, uint8_t* zeros, int64_t groups,
                       cudaStream_t stream) {
  FillPackedKernel<<<Blocks(groups), kThreads, 0, stream>>>(type, values, zeros, groups);
  return cudaPeekAtLastError();
}

cudaError_t FillWindows(DType type, void* dense, int64_t windows, bool second,
                        cudaStream_t stream) {
  FillWindowsKernel<<<Blocks(windows), kThreads, 0, stream>>>(type, dense, windows, second);
  return cudaPeekAtLastError();
}

cudaError_t Compare(const void* a, const void* b, int64_t bytes, Difference* difference,
                    cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(difference, 0, sizeof(Difference), stream);
  if (status != cudaSuccess) return status;
  CompareKernel<<<Blocks(bytes), kThreads, 0, stream>>>(
      static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b), bytes, difference);
  return cudaPeekAtLastError();
}

}  // namespace slidejax::cusparselt

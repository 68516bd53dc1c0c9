// Kernels with a fault each: where a tool finds nothing in them, it finds nothing anywhere.
#include "cases.h"

namespace slidejax::sanitize {
namespace {

__global__ void ReadBeyond(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }

// Two warps write and read a word without a barrier between them.
__global__ void Race(float* to) {
  __shared__ float word[64];
  word[threadIdx.x] = threadIdx.x;
  to[threadIdx.x] = word[63 - threadIdx.x];
}

// Some threads of the block end without the barrier that the others wait at.
__global__ void Missing(float* to) {
  if (threadIdx.x < 48) __syncthreads();
  to[threadIdx.x] = threadIdx.x;
}

}  // namespace

void PlantedCases(Runner& run) {
  run("planted memcheck", "one float beyond", [](Memory& m, cudaStream_t stream) {
    ReadBeyond<<<1, 32, 0, stream>>>(static_cast<float*>(m.Floats(DType::kF32, 31)),
                                     static_cast<float*>(m.Take(128)));
    return cudaPeekAtLastError();
  });
  run("planted racecheck", "no barrier", [](Memory& m, cudaStream_t stream) {
    Race<<<1, 64, 0, stream>>>(static_cast<float*>(m.Take(256)));
    return cudaPeekAtLastError();
  });
  run("planted synccheck", "not all threads", [](Memory& m, cudaStream_t stream) {
    Missing<<<1, 64, 0, stream>>>(static_cast<float*>(m.Take(256)));
    return cudaPeekAtLastError();
  });
  run("planted initcheck", "nothing was written", [](Memory& m, cudaStream_t stream) {
    ReadBeyond<<<1, 32, 0, stream>>>(static_cast<float*>(m.Take(128)),
                                     static_cast<float*>(m.Take(128)));
    return cudaPeekAtLastError();
  });
}

}  // namespace slidejax::sanitize

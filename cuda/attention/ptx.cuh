// The instructions of the attention kernel that CUDA C++ has no names for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace slidejax::attention {

// An asynchronous copy of 16 bytes to shared memory; with `valid` false, of zeros.
__device__ inline void Copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Waits until at most kPending of the thread's groups of copies are under way.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Between ClusterArrive and ClusterWait, all thread blocks of the cluster have arrived, and what
// they have written until then can be read. ClusterBegin is an arrival with nothing to read.
__device__ inline void ClusterBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ inline void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ inline void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes to shared memory of thread block `rank` of the cluster, at the place of `mine` in this
// one's.
template <typename T>
__device__ inline void StoreRemote(T* mine, int rank, const T& value) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  if constexpr (sizeof(T) == 8) {
    asm volatile(
        "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
        "st.shared::cluster.v2.u32 [remote], {%2, %3};}" ::"r"(SharedAddress(mine)),
        "r"(rank), "r"(words[0]), "r"(words[1])
        : "memory");
  } else {
    asm volatile(
        "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
        "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};}" ::"r"(SharedAddress(mine)),
        "r"(rank), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
  }
#endif
}

}  // namespace slidejax::attention

// The instructions that several kernels use and CUDA C++ has no names for.
#pragma once

#include <cstdint>

namespace slidejax {

// The address in shared memory that PTX instructions take.
__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Makes a group of the asynchronous copies that the thread has issued since its last group.
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until the kernel before this one has ended and its results can be read. Returns at once
// where this kernel was launched to begin after that. GPUs before Hopper have no other launches.
__device__ __forceinline__ void GridWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel after this one begin, if it was launched to begin early, when all thread blocks
// have called this.
__device__ __forceinline__ void GridRelease() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace slidejax

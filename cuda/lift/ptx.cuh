// The instructions of the lift kernels that CUDA C++ has no names for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/ptx.cuh"
#include "lift/geometry.h"

namespace slidejax::lift {

// Copies sixteen bytes to shared memory asynchronously; writes zeros if they are not wanted.
__device__ inline void CopyGranule(void* shared, const void* global, bool wanted) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(wanted ? kGranule : 0)
      : "memory");
}

// Waits for all of the thread's groups of copies but the latest `pending`, which is at most
// kMaxPending.
__device__ inline void WaitForCopies(int pending) {
  switch (pending) {
    case 0: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
  }
}

}  // namespace slidejax::lift

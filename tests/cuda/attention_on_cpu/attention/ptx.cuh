// The emulator's version of cuda/attention/ptx.cuh.
#pragma once

#include <cstdlib>

#include "common/ptx.cuh"
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace slidejax::attention {

inline void Copy16(uint32_t to, const void* from, bool valid) {
  emulated::Copy(emulated::shared_memory + to, from, valid, 16);
}
template <int kPending>
void WaitForCopies() {
  emulated::WaitForCopies(kPending);
}
inline float Exp2(float x) { return std::exp2(x); }
// There are no clusters here: the host's code must not ask for them.
inline void ClusterBegin() { emulated::Fail("a cluster"); }
inline void ClusterArrive() { emulated::Fail("a cluster"); }
inline void ClusterWait() { emulated::Fail("a cluster"); }
template <typename T>
void StoreRemote(T*, int, const T&) {
  emulated::Fail("a cluster");
}

}  // namespace slidejax::attention

// The emulator's version of cuda/lift/ptx.cuh.
#pragma once

#include "cuda_runtime_api.h"
#include "lift/geometry.h"

namespace slidejax::lift {

extern char shared[];  // a block's shared memory, which the kernels declare

inline void CopyGranule(void* to, const void* from, bool wanted) {
  emulated::Copy(to, from, wanted, 16);
}
inline void GridRelease() {}
inline void GridWait() { emulated::WaitForGrid(); }
inline void CommitCopies() { emulated::CommitCopies(); }
inline void WaitForCopies(int pending) { emulated::WaitForCopies(pending); }

}  // namespace slidejax::lift

// The emulator's version of cuda/lift/ptx.cuh.
#pragma once

#include "cuda_runtime_api.h"
#include "lift/geometry.h"

namespace slidejax::lift {

inline void CopyGranule(void* to, const void* from, bool wanted) {
  emulated::CopyGranule(to, from, wanted);
}
inline void GridRelease() {}
inline void CommitCopies() { emulated::CommitCopies(); }
inline void WaitForCopies(int pending) { emulated::WaitForCopies(pending); }

}  // namespace slidejax::lift

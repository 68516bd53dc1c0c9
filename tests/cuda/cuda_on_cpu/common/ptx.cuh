// The emulator's version of cuda/common/ptx.cuh.
#pragma once

#include "cuda_runtime_api.h"

namespace slidejax {

// An address in shared memory is a number of bytes from its beginning.
inline uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulated::shared_memory);
}
inline void CommitCopies() { emulated::CommitCopies(); }
inline void GridWait() { emulated::WaitForGrid(); }
inline void GridRelease() { emulated::ReleaseGrid(); }

}  // namespace slidejax

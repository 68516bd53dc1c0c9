// The emulator's version of cuda/common/launch.h.
#pragma once

#include "cuda_runtime_api.h"

namespace slidejax {

template <typename Kernel>
cudaError_t LaunchBehind(Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                         cudaStream_t stream) {
  emulated::early = true;
  const cudaError_t status = cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
  return emulated::early = false, status;
}

}  // namespace slidejax

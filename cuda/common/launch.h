// Launches that begin before the kernel ahead has ended.
#pragma once

#include <cuda_runtime_api.h>

namespace slidejax {

// Launches a kernel that may begin when the kernel ahead lets it, and waits itself for the end of
// that one (programmatic dependent launch). Needs compute capability 9.0.
template <typename Kernel>
cudaError_t LaunchBehind(Kernel* kernel, dim3 grid, dim3 block, void** arguments,
                         size_t shared_bytes, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace slidejax

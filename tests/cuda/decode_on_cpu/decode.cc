// The decode kernels on a CPU (cuda_on_cpu/): the C function that
// tests/cuda/test_decode_emulated.py calls.
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

namespace slidejax::decode {
alignas(128) uint8_t decode_shared[emulated::kSharedBytes];
}  // namespace slidejax::decode

char* const emulated::shared_memory = reinterpret_cast<char*>(slidejax::decode::decode_shared);

// The array that stage.cuh declares is one for all threads of a block.
#undef __shared__
#define __shared__ static
#include "decode/stage.cuh"
#undef __shared__
#define __shared__
#include "decode/gemv.cuh"
#include "decode/kernel.cuh"
#include "decode/skinny.cuh"

// The host's code has fields of these names.
#undef gridDim
#undef blockDim
struct cudaFuncAttributes {
  int ptxVersion;
};
static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}

// The host picks a kernel by its address alone; all of them take Params.
static cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t stream) {
  const auto decode =
      reinterpret_cast<void (*)(slidejax::decode::Params)>(const_cast<void*>(kernel));
  return cudaLaunchKernel(decode, grid, block, arguments, shared, stream);
}

#include "decode/decode.cu"

// A call of a chain; dtypes and activations by name. tests/cuda/test_decode_emulated.py has the
// same fields.
struct Stage {
  const void* x;
  const char* x_type;
  const float* norm;
  float eps;
  const void* values;
  const char* type;
  const uint8_t* zeros;
  const float* scale_w;
  const float* bias;
  const void* residual;
  void* y;
  const char* y_type;
  const char* activation;  // of a gate, or null
  int M, out, columns, group, blocks;
};

// Runs DecodeChain on a device of `multiprocessors`. A stage may read the results of the ones
// before. Returns the status, or -1 for an unknown name or what DecodeCheck refuses.
extern "C" int decode_chain(const Stage* stages, int count, int multiprocessors,
                            int shared_of_block, int lazy, int seed) {
  using namespace slidejax;
  emulated::multiprocessors = multiprocessors, emulated::shared_of_block = shared_of_block;
  emulated::Begin(lazy != 0, seed);
  std::vector<decode::DecodeArgs> chain;
  std::vector<std::vector<uint4>> workspaces;
  for (int i = 0; i < count; ++i) {
    const Stage& s = stages[i];
    const auto of_x = DTypeNamed(s.x_type), of_values = DTypeNamed(s.type),
               of_y = DTypeNamed(s.y_type);
    const auto activation = lift::ActivationOf(s.activation == nullptr ? "silu" : s.activation);
    if (!of_x || !of_values || !of_y || !activation) return -1;

    decode::DecodeArgs args = {};
    args.x = s.x, args.x_type = *of_x, args.norm = s.norm, args.eps = s.eps;
    args.values = s.values, args.type = *of_values;
    args.zeros = s.group == 0 ? nullptr : s.zeros, args.scale_w = s.scale_w, args.bias = s.bias;
    args.residual = s.residual, args.residual_type = *of_x, args.y = s.y, args.y_type = *of_y;
    args.M = s.M, args.out = s.out, args.columns = s.columns, args.group = s.group;
    args.blocks = s.blocks;
    args.gate_rows = s.activation == nullptr ? 0 : s.out, args.activation = *activation;
    const int64_t bytes = decode::DecodeWorkspace(s.M, *of_values, s.group, s.blocks);
    workspaces.emplace_back(bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});  // nan
    args.workspace = workspaces.back().data();

    const int64_t rows = s.activation == nullptr ? s.out : 2 * s.out;
    const int64_t kept = s.group == 0 ? 32 : 8 * (s.group - 2), x_bytes = Bytes(*of_x);
    emulated::Allow(s.x, s.M * s.columns * x_bytes);
    emulated::Allow(s.values, rows * s.blocks * kept * static_cast<int64_t>(Bytes(*of_values)));
    emulated::Allow(args.zeros, 8 * rows * s.blocks);
    emulated::Allow(s.scale_w, 4 * rows), emulated::Allow(s.bias, 4 * rows);
    emulated::Allow(s.norm, 4 * s.columns);
    emulated::Allow(s.residual, s.M * s.out * x_bytes);
    emulated::Allow(args.workspace, 16 * workspaces.back().size());
    // What the chain writes is there only when the kernel has waited for the one ahead.
    emulated::Make(args.workspace, 16 * workspaces.back().size());
    emulated::Make(s.y, s.M * s.out * static_cast<int64_t>(Bytes(*of_y)));
    if (decode::DecodeCheck(args) != nullptr) return -1;
    chain.push_back(args);
  }
  return decode::DecodeChain(chain.data(), count, nullptr);
}

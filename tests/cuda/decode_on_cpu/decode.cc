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
#include "decode/kernel.cuh"

// The host's code has fields of these names.
#undef gridDim
#undef blockDim
struct cudaFuncAttributes {
  int ptxVersion;
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}

static cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t) {
  using Ahead = void (*)(slidejax::decode::DecodeArgs, int, uint8_t*, float*);
  const auto ahead = reinterpret_cast<Ahead>(const_cast<void*>(kernel));
  const auto run = [=] {
    ahead(*static_cast<slidejax::decode::DecodeArgs*>(arguments[0]),
          *static_cast<int*>(arguments[1]), *static_cast<uint8_t**>(arguments[2]),
          *static_cast<float**>(arguments[3]));
  };
  return emulated::Launch(run, grid, block, shared);
}
static cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  const auto decode =
      reinterpret_cast<void (*)(slidejax::decode::Params)>(const_cast<void*>(kernel));
  const auto run = [=] { decode(*static_cast<slidejax::decode::Params*>(arguments[0])); };
  return emulated::Launch(run, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

#include "decode/decode.cu"

// One call of Decode on a device of `multiprocessors`; dtypes by name. Returns the status, or -1
// for an unknown name or what DecodeCheck refuses.
extern "C" int decode(const void* x, const char* x_type, const void* values, const char* type,
                      const uint8_t* zeros, const float* scale_w, const float* bias,
                      const void* residual, void* y, const char* y_type, int M, int out,
                      int columns, int group, int blocks, int multiprocessors, int shared_of_block,
                      int lazy, int seed) {
  using namespace slidejax;
  emulated::multiprocessors = multiprocessors, emulated::shared_of_block = shared_of_block;
  emulated::Begin(lazy != 0, seed);
  const auto of_x = DTypeNamed(x_type), of_values = DTypeNamed(type), of_y = DTypeNamed(y_type);
  if (!of_x || !of_values || !of_y) return -1;

  decode::DecodeArgs args = {};
  args.x = x, args.x_type = *of_x, args.values = values, args.type = *of_values;
  args.zeros = group == 0 ? nullptr : zeros, args.scale_w = scale_w, args.bias = bias;
  args.residual = residual, args.residual_type = *of_x, args.y = y, args.y_type = *of_y;
  args.M = M, args.out = out, args.columns = columns, args.group = group, args.blocks = blocks;
  std::vector<uint4> workspace(decode::DecodeWorkspace(M, *of_values, group, blocks) / 16 + 1);
  args.workspace = workspace.data();

  const int64_t kept = group == 0 ? 32 : 8 * (group - 2), x_bytes = Bytes(*of_x);
  emulated::Allow(x, M * columns * x_bytes);
  emulated::Allow(values, out * blocks * kept * static_cast<int64_t>(Bytes(*of_values)));
  emulated::Allow(args.zeros, int64_t{8} * out * blocks);
  emulated::Allow(scale_w, 4 * out), emulated::Allow(bias, 4 * out);
  emulated::Allow(residual, M * out * x_bytes);
  emulated::Allow(workspace.data(), 16 * workspace.size());
  if (decode::DecodeCheck(args) != nullptr) return -1;
  return decode::Decode(args, nullptr);
}

// The attention kernels on a CPU (cuda_on_cpu/): the C function that
// tests/cuda/test_attention_emulated.py calls.
#include <vector>

#include "cuda_runtime_api.h"

namespace slidejax::attention {
alignas(128) uint8_t attention_shared[emulated::kSharedBytes];
}  // namespace slidejax::attention

char* const emulated::shared_memory =
    reinterpret_cast<char*>(slidejax::attention::attention_shared);

#include "attention/kernel.cuh"

// The host's code has fields of these names.
#undef gridDim
#undef blockDim
struct cudaFuncAttributes {
  int binaryVersion;
};
enum { cudaLaunchAttributeClusterDimension };
enum { cudaFuncAttributeNonPortableClusterSizeAllowed = 16 };
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
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
  return attributes->binaryVersion = 80, cudaSuccess;  // no clusters
}
static cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
static cudaError_t cudaOccupancyMaxActiveClusters(int*, const void*, const cudaLaunchConfig_t*) {
  return cudaErrorInvalidValue;
}
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared, cudaStream_t) {
  const auto kernel_of =
      reinterpret_cast<void (*)(slidejax::attention::Params)>(const_cast<void*>(kernel));
  const auto run = [=] { kernel_of(*static_cast<slidejax::attention::Params*>(arguments[0])); };
  return emulated::Launch(run, grid, block, shared);
}
static cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  if (config->numAttrs != 0) return cudaErrorInvalidValue;
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments,
                          config->dynamicSmemBytes, config->stream);
}

#include "attention/attention.cu"

// One call of Attention on a device of `multiprocessors`; dtypes by name. k and v are null where
// they lie behind q. Returns the status, or -1 for an unknown name.
extern "C" int attention(const void* q, const void* k, const void* v, const char* type, void* keys,
                         void* values, const char* cache_type, const int32_t* positions,
                         const float* cosines, const float* sines, void* y, int rows, int heads,
                         int kv_heads, int length, int head_dim, float scale, int window,
                         int multiprocessors, int shared_of_block, int lazy, int seed) {
  using namespace slidejax;
  emulated::multiprocessors = multiprocessors, emulated::shared_of_block = shared_of_block;
  emulated::Begin(lazy != 0, seed);
  const auto of_q = DTypeNamed(type), of_cache = DTypeNamed(cache_type);
  if (!of_q || !of_cache) return -1;
  const int64_t bytes = Bytes(*of_q), q_size = heads * head_dim, kv_size = kv_heads * head_dim;
  const bool together = k == nullptr;
  attention::AttentionArgs args = {};
  args.q = q, args.type = *of_q;
  args.k = together ? static_cast<const char*>(q) + q_size * bytes : k;
  args.v = together ? static_cast<const char*>(q) + (q_size + kv_size) * bytes : v;
  args.q_stride = together ? q_size + 2 * kv_size : q_size;
  args.kv_stride = together ? args.q_stride : kv_size;
  args.keys = keys, args.values = values, args.cache_type = *of_cache;
  args.positions = positions, args.cosines = cosines, args.sines = sines, args.y = y;
  args.rows = rows, args.heads = heads, args.kv_heads = kv_heads, args.length = length;
  args.head_dim = head_dim, args.scale = scale, args.window = window;
  const int64_t workspace_bytes = attention::AttentionWorkspace(args);
  std::vector<uint4> workspace(workspace_bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});  // nan
  args.workspace = workspace.data();

  emulated::Allow(q, rows * args.q_stride * bytes);
  if (!together) emulated::Allow(k, rows * kv_size * bytes);
  if (!together) emulated::Allow(v, rows * kv_size * bytes);
  const int64_t cache = rows * kv_size * length * static_cast<int64_t>(Bytes(*of_cache));
  emulated::Allow(keys, cache), emulated::Allow(values, cache);
  emulated::Allow(positions, 4 * rows);
  emulated::Allow(cosines, 2 * rows * head_dim), emulated::Allow(sines, 2 * rows * head_dim);
  emulated::Allow(workspace.data(), workspace_bytes);
  return attention::Attention(args, nullptr);
}

extern "C" int64_t attention_workspace(int rows, int heads, int kv_heads, int head_dim) {
  slidejax::attention::AttentionArgs args = {};
  args.rows = rows, args.heads = heads, args.kv_heads = kv_heads, args.head_dim = head_dim;
  args.cache_type = slidejax::DType::kBF16;
  return slidejax::attention::AttentionWorkspace(args);
}

// The instances of the attention kernel, and their launch.
#include "attention/attention.h"
#include "attention/kernel.cuh"
#include "attention/plan.h"
#include "common/device.h"

namespace slidejax::attention {

template <typename Cache, int kLanesOfKey, int kHeads>
__global__ void __launch_bounds__(kMaxWarps* kLanes, kHeads > 4 ? 1 : 2)
    AttentionKernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t attention_shared[];
  Attend<Cache, kLanesOfKey, kHeads>(p, attention_shared).Run();
}

template <typename Cache, int kLanesOfKey, int kHeads>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    CombineKernel(const __grid_constant__ Params p) {
  Attend<Cache, kLanesOfKey, kHeads>(p, nullptr).Combine();
}

namespace {

struct Kernels {
  const void* attend;
  const void* combine;
};

template <typename Cache, int kLanesOfKey, int kHeads>
Kernels KernelsOf() {
  return {reinterpret_cast<const void*>(AttentionKernel<Cache, kLanesOfKey, kHeads>),
          reinterpret_cast<const void*>(CombineKernel<Cache, kLanesOfKey, kHeads>)};
}

template <typename Cache>
Kernels KernelsOf(int lanes, int heads) {
  if (heads > 4) {
    if (lanes == 8) return KernelsOf<Cache, 8, 8>();
    return lanes == 16 ? KernelsOf<Cache, 16, 8>() : KernelsOf<Cache, 32, 8>();
  }
  if (lanes == 8) return KernelsOf<Cache, 8, 4>();
  return lanes == 16 ? KernelsOf<Cache, 16, 4>() : KernelsOf<Cache, 32, 4>();
}

Kernels KernelsOf(DType cache_type, int lanes, int heads) {
  if (cache_type == DType::kBF16) return KernelsOf<__nv_bfloat16>(lanes, heads);
  if (cache_type == DType::kF16) return KernelsOf<__half>(lanes, heads);
  return KernelsOf<float>(lanes, heads);
}

struct Device {
  int shared_limit = 0;
  int cluster = 1;  // thread blocks of the largest cluster that runs here
};

// Thread blocks of the largest cluster in which this kernel runs with as much shared memory as
// there is. Older GPUs, and code built for them, have no clusters.
int LargestCluster(const void* kernel, int shared) {
  cudaFuncAttributes code = {};
  if (cudaFuncGetAttributes(&code, kernel) != cudaSuccess || code.binaryVersion < 90) return 1;
  int size = 8;  // runs wherever there are clusters
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kMaxSplits, attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = kMaxSplits, config.blockDim = kMaxWarps * kLanes;
  config.dynamicSmemBytes = shared, config.attrs = &attribute, config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0)
    size = kMaxSplits;
  cudaGetLastError();  // an error of this attempt is none of a later call
  return size;
}

cudaError_t PrepareDevice(int id, Device& device) {
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, id);
  };
  if (auto s = get(&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return s;
  device.cluster = kMaxSplits;
  for (const DType type : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int lanes : {8, 16, 32}) {
      for (const int heads : {4, 8}) {
        const void* kernel = KernelsOf(type, lanes, heads).attend;
        if (auto s = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          device.shared_limit))
          return s;
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        const Shape shape{static_cast<int>(Bytes(type)), lanes, heads};
        const int shared = std::min(shape.shared_bytes(kMaxWarps), device.shared_limit);
        device.cluster = std::min(device.cluster, LargestCluster(kernel, shared));
      }
    }
  }
  cudaGetLastError();
  return cudaSuccess;
}

cudaError_t GetDevice(Device** device) {
  static DeviceTable<Device> devices;
  return devices.Get(device, PrepareDevice);
}

Plan PlanOf(const AttentionArgs& a, const Device& device) {
  return MakePlan(a.rows, a.heads, a.kv_heads, a.head_dim, static_cast<int>(Bytes(a.cache_type)),
                  device.shared_limit, device.cluster > 1 ? device.cluster : kMaxSplits);
}

}  // namespace

int64_t AttentionWorkspace(const AttentionArgs& a) {
  const Plan plan = MakePlan(a.rows, a.heads, a.kv_heads, a.head_dim,
                             static_cast<int>(Bytes(a.cache_type)), 1 << 30, kMaxSplits);
  if (plan.splits == 1) return 0;
  const int64_t blocks = int64_t{a.rows} * a.kv_heads * plan.chunks * plan.splits;
  return blocks * PartBytes(plan.heads, plan.lanes);
}

cudaError_t AttentionInit() {
  Device* device = nullptr;
  return GetDevice(&device);
}

cudaError_t Attention(const AttentionArgs& a, cudaStream_t stream) {
  Device* device = nullptr;
  if (auto s = GetDevice(&device)) return s;
  const Plan plan = PlanOf(a, *device);
  const Kernels kernels = KernelsOf(a.cache_type, plan.lanes, plan.heads);
  Params p = {};
  p.a = a;
  p.chunks = plan.chunks, p.splits = plan.splits, p.warps = plan.warps;
  while (1 << p.log_splits < p.splits) ++p.log_splits;
  p.clustered = plan.splits > 1 && device->cluster > 1;
  void* arguments[] = {&p};
  const dim3 grid(plan.splits, a.kv_heads * plan.chunks, a.rows);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.splits, attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(plan.warps * kLanes);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = p.clustered ? 1 : 0;
  if (auto s = cudaLaunchKernelExC(&config, kernels.attend, arguments)) return s;
  if (plan.splits == 1 || p.clustered) return cudaSuccess;
  return cudaLaunchKernel(kernels.combine, dim3(1, grid.y, grid.z), dim3(kMaxWarps * kLanes),
                          arguments, 0, stream);
}

}  // namespace slidejax::attention

// The decode kernels there are, and their launch.
#include "common/device.h"
#include "decode/decode.h"
#include "decode/kernel.cuh"
#include "decode/plan.h"

namespace slidejax::decode {
namespace {

constexpr int kMaxWindows = 7;  // 14:16
static_assert(kDecodeTokens == kTileTokens, "all rows are one tile of tokens");

template <typename Code>
const void* KernelOf(int windows) {
  switch (windows) {
    case 0: return reinterpret_cast<const void*>(DecodeKernel<Code, 0>);
    case 1: return reinterpret_cast<const void*>(DecodeKernel<Code, 1>);
    case 2: return reinterpret_cast<const void*>(DecodeKernel<Code, 2>);
    case 3: return reinterpret_cast<const void*>(DecodeKernel<Code, 3>);
    case 4: return reinterpret_cast<const void*>(DecodeKernel<Code, 4>);
    case 5: return reinterpret_cast<const void*>(DecodeKernel<Code, 5>);
    case 6: return reinterpret_cast<const void*>(DecodeKernel<Code, 6>);
    default: return reinterpret_cast<const void*>(DecodeKernel<Code, 7>);
  }
}

const void* KernelOf(DType type, int windows) {
  switch (type) {
    case DType::kS8: return KernelOf<int8_t>(windows);
    case DType::kE4M3: return KernelOf<__nv_fp8_e4m3>(windows);
    case DType::kBF16: return KernelOf<__nv_bfloat16>(windows);
    default: return KernelOf<__half>(windows);
  }
}

template <typename Code>
const void* AheadOf(DType x_type, int windows) {
  const auto of = [&](auto x) -> const void* {
    using T = decltype(x);
    switch (windows) {
      case 0: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 0>);
      case 1: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 1>);
      case 2: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 2>);
      case 3: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 3>);
      case 4: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 4>);
      case 5: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 5>);
      case 6: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 6>);
      default: return reinterpret_cast<const void*>(QuantiseAhead<T, Code, 7>);
    }
  };
  if (x_type == DType::kBF16) return of(__nv_bfloat16{});
  return x_type == DType::kF16 ? of(__half{}) : of(float{});
}

const void* AheadOf(DType type, DType x_type, int windows) {
  switch (type) {
    case DType::kS8: return AheadOf<int8_t>(x_type, windows);
    case DType::kE4M3: return AheadOf<__nv_fp8_e4m3>(x_type, windows);
    case DType::kBF16: return AheadOf<__nv_bfloat16>(x_type, windows);
    default: return AheadOf<__half>(x_type, windows);
  }
}

struct Device {
  int multiprocessors = 0, shared_limit = 0;
  // The architecture of the code that runs here, 90 for sm_90. A build for few architectures runs
  // old code on new devices.
  int architecture = 0;
};

cudaError_t PrepareDevice(int id, Device& device) {
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, id);
  };
  if (auto s = get(&device.multiprocessors, cudaDevAttrMultiProcessorCount)) return s;
  if (auto s = get(&device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return s;
  cudaFuncAttributes code = {};
  if (auto s = cudaFuncGetAttributes(&code, KernelOf(DType::kS8, kMaxWindows))) return s;
  device.architecture = code.ptxVersion;
  for (const DType type : {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16}) {
    if (type == DType::kE4M3 && device.architecture < 89) continue;
    for (int windows = 0; windows <= kMaxWindows; ++windows) {
      if (auto s = cudaFuncSetAttribute(KernelOf(type, windows),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        device.shared_limit))
        return s;
    }
  }
  return cudaSuccess;
}

cudaError_t GetDevice(Device** device) {
  static DeviceTable<Device> devices;
  return devices.Get(device, PrepareDevice);
}

Shape ShapeOf(DType type, int group) {
  return Shape{group == 0 ? 0 : group / 2 - 1, static_cast<int>(Bytes(type))};
}

Plan PlanOf(const DecodeArgs& a, const Device& device) {
  const int row_bytes =
      OwnRowBytes(a.M, a.columns, Bytes(a.x_type), reinterpret_cast<uintptr_t>(a.x));
  return MakePlan(ShapeOf(a.type, a.group), a.M, a.out, a.blocks, row_bytes, device.multiprocessors,
                  device.shared_limit);
}

const void* Behind(const void* from, int64_t bytes) {
  return from == nullptr ? nullptr : static_cast<const char*>(from) + bytes;
}

}  // namespace

int64_t DecodeWorkspace(int M, DType type, int group, int blocks) {
  return WorkspaceBytes(ShapeOf(type, group), M, blocks);
}

cudaError_t DecodeInit() {
  Device* device = nullptr;
  return GetDevice(&device);
}

const char* DecodeCheck(const DecodeArgs& a) {
  Device* device = nullptr;
  if (GetDevice(&device) != cudaSuccess) return "the device cannot run the decode kernels";
  if (a.type == DType::kE4M3 && device->architecture < 89)
    return "float8_e4m3fn needs code for compute capability 8.9 or later";
  if (a.M > kDecodeTokens) return "the decode kernel takes at most 8 rows";
  if (reinterpret_cast<uintptr_t>(a.values) % 16 != 0) return "values must be 16-byte aligned";
  DecodeArgs one = a;
  one.M = 1, one.out = std::min(a.out, kTileRows);
  if (PlanOf(one, *device).warps == 0) return "a row of x does not fit in shared memory";
  return nullptr;
}

cudaError_t Decode(const DecodeArgs& a, cudaStream_t stream) {
  Device* device = nullptr;
  if (auto s = GetDevice(&device)) return s;
  const Plan plan = PlanOf(a, *device);
  const Shape shape = ShapeOf(a.type, a.group);
  if (plan.warps == 0) {  // too much for shared memory at once: half of the rows, or of the outputs
    DecodeArgs first = a, second = a;
    if (a.M > 1) {
      first.M = a.M / 2, second.M = a.M - first.M;
      const int64_t skipped = first.M;
      second.x = static_cast<const char*>(a.x) + skipped * a.columns * Bytes(a.x_type);
      second.y = static_cast<char*>(a.y) + skipped * a.out * Bytes(a.y_type);
      second.residual = Behind(a.residual, skipped * a.out * Bytes(a.residual_type));
    } else {
      if (a.out <= kTileRows) return cudaErrorInvalidConfiguration;
      first.out = RoundUp(a.out / 2, kTileRows), second.out = a.out - first.out;
      const int64_t skipped = first.out, blocks = skipped * a.blocks;
      second.values = static_cast<const char*>(a.values) + blocks * shape.block_bytes();
      if (a.group != 0) second.zeros = a.zeros + blocks * 8;
      second.scale_w = a.scale_w + skipped;
      if (a.bias != nullptr) second.bias = a.bias + skipped;
      second.y = static_cast<char*>(a.y) + skipped * Bytes(a.y_type);
      second.residual = Behind(a.residual, skipped * Bytes(a.residual_type));
    }
    if (auto s = Decode(first, stream)) return s;
    return Decode(second, stream);
  }
  const int tiles = CeilDiv(a.out, kTileRows);
  Params p = {};
  p.a = a;
  p.tiles_each = tiles / plan.grid, p.tiles_more = tiles % plan.grid;
  p.steps = CeilDiv(a.blocks, kStepBlocks);
  p.slices = plan.slices, p.slice_steps = plan.slice_steps, p.tile_slots = plan.tile_slots;
  p.sums_bytes = plan.sums_bytes, p.cached = plan.cached;
  p.warps = plan.warps, p.log_share = LogShare(a.M, shape.block_warps());
  if (!plan.own) {
    auto* scale_x = static_cast<float*>(a.workspace);
    auto* codes = static_cast<uint8_t*>(a.workspace) + RoundUp(4 * a.M, 16);
    p.scale_x = scale_x, p.codes = codes;
    void* arguments[] = {&p.a, &p.steps, &codes, &scale_x};
    if (auto s = cudaLaunchKernel(AheadOf(a.type, a.x_type, shape.windows), dim3(a.M),
                                  dim3(kMaxWarps * kLanes), arguments, 0, stream))
      return s;
  }
  // The weights were written before the kernel ahead began, so they may be asked for while it runs.
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.grid;
  config.blockDim = shape.block_warps() * kLanes;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = !plan.own && device->architecture >= 90 ? 1 : 0;
  void* arguments[] = {&p};
  return cudaLaunchKernelExC(&config, KernelOf(a.type, shape.windows), arguments);
}

}  // namespace slidejax::decode

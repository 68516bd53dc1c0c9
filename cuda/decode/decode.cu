// The instances of the decode kernels, and their launch.
#include <utility>
#include <vector>

#include "common/device.h"
#include "common/launch.h"
#include "decode/decode.h"
#include "decode/gemv.cuh"
#include "decode/gemv_plan.h"
#include "decode/kernel.cuh"
#include "decode/plan.h"
#include "decode/skinny.cuh"
#include "decode/skinny_plan.h"

namespace slidejax::decode {
namespace {

constexpr int kMaxWindows = 7;                        // 14:16
constexpr int64_t kMostGateBytes = int64_t{1} << 30;  // offsets in a tile have 32 bits
static_assert(kDecodeTokens == MostTokens(2), "values of 16 bits meet the most rows");

template <typename Code, int kTokenTiles>
const void* KernelOf(int windows) {
  switch (windows) {
    case 0: return reinterpret_cast<const void*>(DecodeKernel<Code, 0, kTokenTiles>);
    case 1: return reinterpret_cast<const void*>(DecodeKernel<Code, 1, kTokenTiles>);
    case 2: return reinterpret_cast<const void*>(DecodeKernel<Code, 2, kTokenTiles>);
    case 3: return reinterpret_cast<const void*>(DecodeKernel<Code, 3, kTokenTiles>);
    case 4: return reinterpret_cast<const void*>(DecodeKernel<Code, 4, kTokenTiles>);
    case 5: return reinterpret_cast<const void*>(DecodeKernel<Code, 5, kTokenTiles>);
    case 6: return reinterpret_cast<const void*>(DecodeKernel<Code, 6, kTokenTiles>);
    default: return reinterpret_cast<const void*>(DecodeKernel<Code, 7, kTokenTiles>);
  }
}

// The kernel for M rows of x.
const void* KernelOf(DType type, int windows, int M) {
  const bool one = M <= kTileTokens;
  switch (type) {
    case DType::kS8: return KernelOf<int8_t, 1>(windows);
    case DType::kE4M3: return KernelOf<__nv_fp8_e4m3, 1>(windows);
    case DType::kBF16:
      return one ? KernelOf<__nv_bfloat16, 1>(windows) : KernelOf<__nv_bfloat16, 2>(windows);
    default: return one ? KernelOf<__half, 1>(windows) : KernelOf<__half, 2>(windows);
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

template <typename Code, int kRows>
const void* GemvOf(int windows) {
  switch (windows) {
    case 0: return reinterpret_cast<const void*>(GemvKernel<Code, 0, kRows>);
    case 1: return reinterpret_cast<const void*>(GemvKernel<Code, 1, kRows>);
    case 2: return reinterpret_cast<const void*>(GemvKernel<Code, 2, kRows>);
    case 3: return reinterpret_cast<const void*>(GemvKernel<Code, 3, kRows>);
    case 4: return reinterpret_cast<const void*>(GemvKernel<Code, 4, kRows>);
    case 5: return reinterpret_cast<const void*>(GemvKernel<Code, 5, kRows>);
    case 6: return reinterpret_cast<const void*>(GemvKernel<Code, 6, kRows>);
    default: return reinterpret_cast<const void*>(GemvKernel<Code, 7, kRows>);
  }
}

const void* GemvOf(DType type, int windows, int M) {
  if (type == DType::kS8) return M == 1 ? GemvOf<int8_t, 1>(windows) : GemvOf<int8_t, 2>(windows);
  return M == 1 ? GemvOf<__nv_fp8_e4m3, 1>(windows) : GemvOf<__nv_fp8_e4m3, 2>(windows);
}

template <typename Code>
const void* SkinnyOf(int windows) {
  switch (windows) {
    case 0: return reinterpret_cast<const void*>(SkinnyKernel<Code, 0>);
    case 1: return reinterpret_cast<const void*>(SkinnyKernel<Code, 1>);
    case 2: return reinterpret_cast<const void*>(SkinnyKernel<Code, 2>);
    case 3: return reinterpret_cast<const void*>(SkinnyKernel<Code, 3>);
    case 4: return reinterpret_cast<const void*>(SkinnyKernel<Code, 4>);
    case 5: return reinterpret_cast<const void*>(SkinnyKernel<Code, 5>);
    case 6: return reinterpret_cast<const void*>(SkinnyKernel<Code, 6>);
    default: return reinterpret_cast<const void*>(SkinnyKernel<Code, 7>);
  }
}

const void* SkinnyOf(DType type, int windows) {
  return type == DType::kS8 ? SkinnyOf<int8_t>(windows) : SkinnyOf<__nv_fp8_e4m3>(windows);
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
  if (auto s = cudaFuncGetAttributes(&code, KernelOf(DType::kS8, kMaxWindows, 1))) return s;
  device.architecture = code.ptxVersion;
  for (const DType type : {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16}) {
    if (type == DType::kE4M3 && device.architecture < 89) continue;
    for (int windows = 0; windows <= kMaxWindows; ++windows) {
      std::vector<const void*> kernels;
      for (int M = 1; M <= MostTokens(static_cast<int>(Bytes(type))); M += kTileTokens)
        kernels.push_back(KernelOf(type, windows, M));
      if (Bytes(type) == 1) {
        for (int M = 1; M <= kGemvRows; ++M) kernels.push_back(GemvOf(type, windows, M));
        kernels.push_back(SkinnyOf(type, windows));
      }
      for (const void* kernel : kernels) {
        if (auto s = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          device.shared_limit))
          return s;
      }
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

int TileOutputs(const DecodeArgs& a) { return a.gate_rows != 0 ? kTileRows / 2 : kTileRows; }

Plan PlanOf(const DecodeArgs& a, const Device& device) {
  if (a.M > MostTokens(static_cast<int>(Bytes(a.type)))) return {};
  const int row_bytes =
      OwnRowBytes(a.M, a.columns, Bytes(a.x_type), reinterpret_cast<uintptr_t>(a.x));
  const int norm_bytes = a.norm != nullptr ? 4 * a.columns : 0;
  return MakePlan(ShapeOf(a.type, a.group), a.M, a.out, a.blocks, row_bytes, device.multiprocessors,
                  device.shared_limit, norm_bytes, TileOutputs(a));
}

const void* Behind(const void* from, int64_t bytes) {
  return from == nullptr ? nullptr : static_cast<const char*>(from) + bytes;
}

// Cuts a call that is too large for shared memory into two calls: along the rows of x, or along the
// outputs.
std::pair<DecodeArgs, DecodeArgs> Halves(const DecodeArgs& a) {
  DecodeArgs first = a, second = a;
  if (a.M > 1) {
    first.M = a.M / 2, second.M = a.M - first.M;
    const int64_t skipped = first.M;
    second.x = static_cast<const char*>(a.x) + skipped * a.columns * Bytes(a.x_type);
    second.y = static_cast<char*>(a.y) + skipped * a.out * Bytes(a.y_type);
    second.residual = Behind(a.residual, skipped * a.out * Bytes(a.residual_type));
  } else {
    first.out = RoundUp(a.out / 2, TileOutputs(a)), second.out = a.out - first.out;
    const int64_t skipped = first.out, blocks = skipped * a.blocks;
    const int block_bytes = ShapeOf(a.type, a.group).block_bytes();
    second.values = static_cast<const char*>(a.values) + blocks * block_bytes;
    if (a.group != 0) second.zeros = a.zeros + blocks * 8;
    second.scale_w = a.scale_w + skipped;
    if (a.bias != nullptr) second.bias = a.bias + skipped;
    second.y = static_cast<char*>(a.y) + skipped * Bytes(a.y_type);
    second.residual = Behind(a.residual, skipped * Bytes(a.residual_type));
  }
  return {first, second};
}

// Launches a kernel, with `early` to begin before the one ahead has ended. It then waits itself for
// the results of that one.
cudaError_t Launch(const void* kernel, Params& p, dim3 grid, int threads, int shared_bytes,
                   bool early, cudaStream_t stream) {
  void* arguments[] = {&p};
  if (early) return LaunchBehind(kernel, grid, dim3(threads), arguments, shared_bytes, stream);
  return cudaLaunchKernel(kernel, grid, dim3(threads), arguments, shared_bytes, stream);
}

// The parameters of the kernels that multiply tiles of 16 rows. `grid` thread blocks share the
// tiles.
Params TiledParams(const DecodeArgs& a, bool behind, int grid) {
  const int tiles = CeilDiv(a.out, TileOutputs(a));
  Params p = {};
  p.a = a, p.behind = behind;
  p.tiles_each = tiles / grid, p.tiles_more = tiles % grid;
  p.tile_outputs = TileOutputs(a), p.tile_blocks = p.tile_outputs * a.blocks;
  p.lower_zeros = (a.gate_rows != 0 ? a.gate_rows : kTileRows / 2) * a.blocks * 8;
  return p;
}

// The plan of GemvKernel, with a grid of 0 where it does not take the call.
GemvPlan GemvPlanOf(const DecodeArgs& a, const Device& device) {
  if (Bytes(a.type) != 1) return {};
  const int row_bytes =
      OwnRowBytes(a.M, a.columns, Bytes(a.x_type), reinterpret_cast<uintptr_t>(a.x));
  const int norm_bytes = a.norm != nullptr ? 4 * a.columns : 0;
  const int rows = a.gate_rows != 0 ? 2 * RoundUp(a.out, kGemvTileRows / 2) : a.out;
  return MakeGemvPlan(GemvShape{ShapeOf(a.type, a.group).windows}, a.type != DType::kS8, a.M, rows,
                      a.blocks, row_bytes, norm_bytes, device.multiprocessors, device.shared_limit);
}

cudaError_t RunGemv(const DecodeArgs& a, const GemvPlan& plan, bool behind, const Device& device,
                    cudaStream_t stream) {
  Params p = {};
  p.a = a, p.behind = behind;
  p.tile_outputs = a.gate_rows != 0 ? kGemvTileRows / 2 : kGemvTileRows;
  const int tiles = CeilDiv(a.out, p.tile_outputs);
  p.tiles_each = tiles / plan.grid, p.tiles_more = tiles % plan.grid;
  p.steps = plan.steps, p.block_rows = plan.block_rows;
  p.log_share = LogShare(a.M, kGemvWarps);
  p.row_pieces = a.M * a.columns * static_cast<int>(Bytes(a.x_type)) / 16;
  return Launch(GemvOf(a.type, ShapeOf(a.type, a.group).windows, a.M), p, plan.grid,
                kGemvWarps * kLanes, plan.shared_bytes, behind && device.architecture >= 90,
                stream);
}

// The plan of SkinnyKernel, with a grid of 0 where it does not take the call.
SkinnyPlan SkinnyPlanOf(const DecodeArgs& a, const Device& device) {
  const int row_bytes = WholeRowBytes(a.columns, Bytes(a.x_type), reinterpret_cast<uintptr_t>(a.x));
  return MakeSkinnyPlan(ShapeOf(a.type, a.group), a.type != DType::kS8, a.M,
                        CeilDiv(a.out, TileOutputs(a)), a.blocks, row_bytes,
                        a.norm != nullptr ? 4 * a.columns : 0, device.multiprocessors,
                        device.shared_limit);
}

cudaError_t RunSkinny(const DecodeArgs& a, const SkinnyPlan& plan, bool behind,
                      const Device& device, cudaStream_t stream) {
  const Shape shape = ShapeOf(a.type, a.group);
  Params p = TiledParams(a, behind, plan.grid);
  p.warps = plan.warps, p.steps = plan.steps, p.block_rows = plan.block_rows;
  p.group_rows = plan.rows, p.log_share = LogShare(plan.rows, shape.block_warps());
  p.row_pieces = plan.staged ? plan.rows * a.columns * static_cast<int>(Bytes(a.x_type)) / 16 : 0;
  return Launch(SkinnyOf(a.type, shape.windows), p, dim3(plan.grid, plan.groups),
                shape.block_warps() * kLanes, plan.shared_bytes,
                behind && device.architecture >= 90, stream);
}

// One call. With `behind` its x may be written by the kernel ahead, which may still run.
cudaError_t Run(const DecodeArgs& a, bool behind, const Device& device, cudaStream_t stream) {
  if (const GemvPlan plan = GemvPlanOf(a, device); plan.grid > 0)
    return RunGemv(a, plan, behind, device, stream);
  if (const SkinnyPlan plan = SkinnyPlanOf(a, device); a.M > kGemvRows && plan.grid > 0)
    return RunSkinny(a, plan, behind, device, stream);
  const Plan plan = PlanOf(a, device);
  const Shape shape = ShapeOf(a.type, a.group);
  if (plan.warps == 0) {
    if (a.M == 1 && a.out <= TileOutputs(a)) return cudaErrorInvalidConfiguration;
    const auto [first, second] = Halves(a);
    if (auto s = Run(first, behind, device, stream)) return s;
    return Run(second, behind, device, stream);
  }
  Params p = TiledParams(a, behind, plan.grid);
  p.steps = CeilDiv(a.blocks, kStepBlocks);
  p.slices = plan.slices, p.slice_steps = plan.slice_steps, p.tile_slots = plan.tile_slots;
  p.sums_bytes = plan.sums_bytes, p.cached = plan.cached;
  p.warps = plan.warps, p.log_share = LogShare(a.M, shape.block_warps());
  p.row_pieces = plan.own ? a.M * a.columns * static_cast<int>(Bytes(a.x_type)) / 16 : 0;
  const bool early = device.architecture >= 90;
  if (!plan.own) {
    p.scale_x = static_cast<float*>(a.workspace);
    p.codes = static_cast<uint8_t*>(a.workspace) + RoundUp(4 * a.M, 16);
    if (auto s = Launch(AheadOf(a.type, a.x_type, shape.windows), p, a.M, kMaxWarps * kLanes, 0,
                        behind && early, stream))
      return s;
  }
  // The weights were written before the kernel ahead began, so they may be asked for while it runs.
  return Launch(KernelOf(a.type, shape.windows, a.M), p, plan.grid, shape.block_warps() * kLanes,
                plan.shared_bytes, (behind || !plan.own) && early, stream);
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
  if (a.M > kDecodeTokens) return "the decode kernels take at most 16 rows";
  const int64_t gate_bytes =
      int64_t{a.gate_rows} * a.blocks * ShapeOf(a.type, a.group).block_bytes();
  if (gate_bytes > kMostGateBytes) return "a gate's rows must be less than 1 GB";
  if (reinterpret_cast<uintptr_t>(a.values) % 16 != 0) return "values must be 16-byte aligned";
  if (reinterpret_cast<uintptr_t>(a.norm) % 16 != 0) return "a norm must be 16-byte aligned";
  DecodeArgs one = a;
  one.M = 1, one.out = std::min(a.out, TileOutputs(a));
  if (PlanOf(one, *device).warps == 0) return "a row of x does not fit in shared memory";
  return nullptr;
}

cudaError_t Decode(const DecodeArgs& a, cudaStream_t stream) { return DecodeChain(&a, 1, stream); }

cudaError_t DecodeChain(const DecodeArgs* args, int count, cudaStream_t stream) {
  Device* device = nullptr;
  if (auto s = GetDevice(&device)) return s;
  // The kernels before the chain belong to XLA, so its first kernel begins when they have ended.
  for (int i = 0; i < count; ++i)
    if (auto s = Run(args[i], i > 0, *device, stream)) return s;
  return cudaSuccess;
}

}  // namespace slidejax::decode

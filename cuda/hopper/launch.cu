// The host side of the Hopper GEMM: what the device can run, tensor maps, and the launch.
#include <cuda.h>

#include <algorithm>

#include "common/device.h"
#include "common/integers.h"
#include "hopper/hopper.h"
#include "hopper/kernel.cuh"
#include "hopper/metadata.cuh"

namespace slidejax::hopper {
namespace {

// With at most this many tokens it pays to begin before the lift has ended. With 1024 it costs
// time.
constexpr int kEarlyTokens = 512;

// The kernels of each tile, in the order of plan.h's table.
struct Kernels {
  const void* s8;
  const void* e4m3;
};
template <class T>
const void* KernelOf() {
  return reinterpret_cast<const void*>(SparseMatmulKernel<T>);
}
#define SLIDEJAX_KERNELS(name, warp_groups, m64_blocks, tokens, ctas, stages_x, stages_w, form, \
                         ...)                                                                   \
  {KernelOf<Tile<false, warp_groups, m64_blocks, tokens, ctas, stages_x, stages_w, form>>(),    \
   KernelOf<Tile<true, warp_groups, m64_blocks, tokens, ctas, stages_x, stages_w, form>>()},
const Kernels kKernels[] = {SLIDEJAX_HOPPER_TILES(SLIDEJAX_KERNELS)};
#undef SLIDEJAX_KERNELS
constexpr int kTileCount = sizeof(kKernels) / sizeof(kKernels[0]);

bool Aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

// ---- The device ---------------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled = nullptr;

// The facts about a device, asked for once.
struct Device {
  int multiprocessors = 0;
  // How many clusters run side by side, by tile and by CTA groups in a cluster. It is 0 where a
  // tile has no such clusters.
  int clusters[kTileCount][kMaxClusterCtas + 1] = {};

  int CtaGroups(int tile, int cluster_groups) const {
    return clusters[tile][cluster_groups] * cluster_groups;
  }
};

// Returns the configuration of a launch of `ctas` CTAs in clusters of `size`. It points to
// `attribute`, which receives the size.
cudaLaunchConfig_t LaunchConfig(const TileInfo& t, unsigned ctas, unsigned size,
                                cudaLaunchAttribute& attribute) {
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = ctas;
  config.blockDim = t.threads;
  config.dynamicSmemBytes = t.shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

cudaError_t PrepareTile(int tile, Device& device) {
  const TileInfo& t = GetTile(tile);
  const Kernels& kernels = kKernels[tile];
  for (const void* kernel : {kernels.s8, kernels.e4m3}) {
    constexpr auto kSharedLimit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (auto s = cudaFuncSetAttribute(kernel, kSharedLimit, t.shared_bytes)) return s;
  }
  for (int groups = 1; groups <= kMaxClusterCtas; ++groups) {
    const bool shares_w = groups == 2 && t.ctas == 2;
    if (groups > 1 && !t.SplitsInto(groups) && !shares_w) continue;
    const unsigned size = t.ctas * groups;
    const unsigned clusters = std::max(1u, device.multiprocessors / size);
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = LaunchConfig(t, clusters * size, size, attribute);
    int* const fit = &device.clusters[tile][groups];
    if (auto s = cudaOccupancyMaxActiveClusters(fit, kernels.e4m3, &config)) return s;
  }
  return device.clusters[tile][1] < 1 ? cudaErrorNotSupported : cudaSuccess;
}

cudaError_t PrepareDevice(int id, Device& device) {
  int major = 0;
  if (auto s = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id)) return s;
  if (major != 9) return cudaErrorNoKernelImageForDevice;
  if (auto s = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id))
    return s;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (auto s = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found))
    return s;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  encode_tiled = reinterpret_cast<EncodeTiled>(entry);
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (auto s = PrepareTile(tile, device)) return s;
  }
  return cudaSuccess;
}

cudaError_t GetDevice(Device** device) {
  static DeviceTable<Device> devices;
  return devices.Get(device, PrepareDevice);
}

// ---- Tensor maps --------------------------------------------------------------------------------

// The sizes of a tensor in memory, its strides in bytes (without the innermost, which is an
// element), and the box of it that one copy moves. The innermost dimension comes first.
struct TensorMap {
  CUtensorMapDataType type;
  int rank;
  const void* base;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3];
  CUtensorMapSwizzle swizzle;
};

bool Encode(CUtensorMap* to, const TensorMap& map) {
  const cuuint32_t ones[3] = {1, 1, 1};
  return encode_tiled(to, map.type, map.rank, const_cast<void*>(map.base), map.size, map.stride,
                      map.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, map.swizzle,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Makes the maps of W and its metadata, of which `sharers` CTAs copy a part each.
bool MakeWeightMaps(Params& p, const Args& a, const TileInfo& t, const uint32_t* metadata,
                    int sharers) {
  const cuuint64_t out = a.problem.out, columns = a.problem.columns / (t.sparse ? 2 : 1);
  const cuuint64_t slices = MetadataSlices(a.problem), m64_blocks = CeilDiv(a.problem.out, 64);
  const cuuint32_t rows = t.rows / sharers, slices_w = t.slices_w;
  const TensorMap w = {
      CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.values, {columns, out}, {columns}, {128, rows},
      CU_TENSOR_MAP_SWIZZLE_128B};
  const TensorMap e = {CU_TENSOR_MAP_DATA_TYPE_UINT32,
                       3,
                       metadata,
                       {256, slices, m64_blocks},
                       {1024, 1024 * slices},
                       {256, slices_w, rows / 64},
                       CU_TENSOR_MAP_SWIZZLE_NONE};
  if (!Encode(&p.map_w, w)) return false;
  if (t.holds_zeros) {
    const cuuint64_t groups = a.problem.groups();
    const TensorMap z = {
        CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.zeros, {groups, out}, {groups}, {32, rows},
        CU_TENSOR_MAP_SWIZZLE_32B};
    return Encode(&p.map_e, z);
  }
  return metadata == nullptr || Encode(&p.map_e, e);
}

bool MakeMaps(Params& p, const Args& a, const TileInfo& t, const uint32_t* metadata) {
  const cuuint64_t M = a.problem.M, out = a.problem.out, columns = a.problem.columns;
  // bfloat16 leaves by bulk copies where a tensor map can describe y. A copy has up to 32 tokens of
  // 64 outputs, which are a line of memory.
  p.vector_stores = Aligned(a.y, 16) && a.problem.out % 8 == 0;
  // A residual is added where warps store directly.
  p.bulk_stores = p.vector_stores && a.result == DType::kBF16 && a.residual == nullptr;
  if (p.bulk_stores) {
    const TensorMap y = {CU_TENSOR_MAP_DATA_TYPE_UINT16,
                         2,
                         a.y,
                         {out, M},
                         {2 * out},
                         {64, static_cast<cuuint32_t>(t.slab_tokens)},
                         CU_TENSOR_MAP_SWIZZLE_128B};
    if (!Encode(&p.map_y, y)) return false;
  }
  const cuuint32_t tokens = t.tokens / t.ctas;
  TensorMap x = {CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.lifted, {columns, M}, {columns}, {128, tokens},
                 CU_TENSOR_MAP_SWIZZLE_128B};
  if (!Encode(&p.map_x, x)) return false;
  x.box[1] = a.problem.M % tokens;
  if (x.box[1] != 0 && !Encode(&p.map_x_end, x)) return false;
  return MakeWeightMaps(p, a, t, metadata, 1);
}

// ---- A call -------------------------------------------------------------------------------------

// A call's plan on the current device, and what lies where in its workspace.
struct Call {
  Plan plan;
  int cta_groups;            // of all launches
  int clusters_2x2;          // of the primary launch, where CTA pairs share W
  const uint32_t* metadata;  // null where the kernel makes it
  uint32_t* own_metadata;    // where this call expands it before the kernel, or null
  uint8_t* stream_k_workspace;

  Counters counters() const {
    const TileInfo& t = GetTile(plan.tile);
    const int ctas = plan.split.groups_per_worker() * t.ctas;
    return {reinterpret_cast<unsigned long long*>(stream_k_workspace),
            plan.split.stream_k_tiles * ctas * t.warp_groups * 4};
  }
  cudaError_t ExpandOwnMetadata(const Args& a, cudaStream_t stream) const {
    return own_metadata ? ExpandMetadata(a.zeros, own_metadata, a.problem, stream) : cudaSuccess;
  }
};

// Makes a plan one that the device can run. The split is another one where fewer CTA groups run
// side by side than the cost model expects, or where the workspace has no room.
void FitPlan(const Args& a, const Device& device, size_t stream_k_bytes, Call* call) {
  Plan& plan = call->plan;
  const TileInfo& t = GetTile(plan.tile);
  const int planned = PlannedGroups(t, device.multiprocessors, 1);
  const int groups = std::min(planned, device.CtaGroups(plan.tile, 1));
  bool fits = groups == planned;
  if (plan.split.share_w) fits = fits && device.clusters[plan.tile][2] > 0;
  if (plan.split.cluster_groups > 1) {
    fits = plan.split.launched_groups <= device.CtaGroups(plan.tile, plan.split.cluster_groups);
  }
  if (!fits || stream_k_bytes < StreamKBytes(plan)) {
    Schedule whole_tiles = a.schedule;
    whole_tiles.stream_k = 0, whole_tiles.cluster_split = 1;
    whole_tiles.share_w = fits && plan.split.share_w;
    plan.split = SplitTiles(t, a.problem, whole_tiles, device.multiprocessors, groups);
  }
  const Split& s = plan.split;
  // The launch has as many CTA groups as there is work for, in whole clusters.
  const int work = std::max(s.whole, s.stream_k_workers * s.groups_per_worker());
  call->cta_groups =
      s.cluster_groups > 1 ? s.launched_groups : std::min(s.share_w ? groups & ~1 : groups, work);
  call->clusters_2x2 =
      s.share_w ? std::min(call->cta_groups / 2, device.clusters[plan.tile][2]) : 0;
}

cudaError_t Prepare(const Args& a, Call* call) {
  if (Check(a)) return cudaErrorInvalidValue;
  Device* device;
  if (auto s = GetDevice(&device)) return s;
  call->plan = MakePlan(a.problem, a.schedule, a.metadata != nullptr, device->multiprocessors);
  const bool makes_it = MakesMetadata(GetTile(call->plan.tile), a.problem);
  const size_t metadata_bytes = a.metadata || makes_it ? 0 : MetadataBytes(a.problem);
  if (a.workspace_bytes < metadata_bytes) return cudaErrorInvalidValue;
  call->own_metadata = metadata_bytes > 0 ? static_cast<uint32_t*>(a.workspace) : nullptr;
  call->metadata = a.metadata ? a.metadata : call->own_metadata;
  call->stream_k_workspace = static_cast<uint8_t*>(a.workspace) + metadata_bytes;
  FitPlan(a, *device, a.workspace_bytes - metadata_bytes, call);
  constexpr size_t kWord = sizeof(*Counters::first);
  static_assert(132 * 2 * 4 * kWord <= kCounterBytes);
  return call->counters().count * kWord > kCounterBytes ? cudaErrorInvalidValue : cudaSuccess;
}

Params MakeParams(const Args& a, const Call& call, const TileInfo& t) {
  const Split& split = call.plan.split;
  Params p = {};
  if (a.problem.sparse() && call.metadata == nullptr) {
    p.zeros = a.zeros;
    p.groups = a.problem.groups();
    p.windows = a.problem.group / 2 - 1;
    p.windows_reciprocal = static_cast<uint32_t>(((uint64_t{1} << 32) + p.windows - 1) / p.windows);
  }
  p.scale_x = a.scale_x;
  p.scale_w = a.scale_w;
  p.bias = a.bias;
  p.residual = a.residual;
  p.residual_type = a.residual_type;
  p.y = a.y;
  p.counters = call.counters().first;
  p.partials = reinterpret_cast<float*>(call.stream_k_workspace + kCounterBytes);
  p.M = a.problem.M;
  p.out = a.problem.out;
  p.steps = Steps(a.problem);
  p.row_tiles = RowTiles(t, a.problem);
  p.token_tiles = TokenTiles(t, a.problem, split.groups_per_worker());
  const int token_groups =
      std::min(p.token_tiles, CeilDiv(TokenTiles(t, a.problem, 1), call.plan.token_group));
  p.token_group_tiles = p.token_tiles / token_groups;
  p.wide_token_groups = p.token_tiles % token_groups;
  p.whole_tiles = split.whole;
  p.stream_k_tiles = split.stream_k_tiles;
  p.stream_k_workers = split.stream_k_workers;
  p.cluster_groups = split.cluster_groups;
  p.cluster_split_tiles = split.cluster_split_tiles;
  p.cta_groups = call.cta_groups;
  p.result = a.result;
  return p;
}

// Launches `cta_groups` CTA groups, from params.first_group on, in clusters of `cluster_size` CTAs.
// early: the launch may begin before the previous one has ended.
cudaError_t Launch(Params& params, const Args& a, int tile, int cta_groups, int cluster_size,
                   bool early, cudaStream_t stream) {
  const TileInfo& t = GetTile(tile);
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = LaunchConfig(t, cta_groups * t.ctas, cluster_size, attributes[0]);
  config.stream = stream;
  if (early) {
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 2;
  }
  void* arguments[] = {&params};
  const Kernels& kernels = kKernels[tile];
  return cudaLaunchKernelExC(&config, a.operand == DType::kS8 ? kernels.s8 : kernels.e4m3,
                             arguments);
}

}  // namespace

cudaError_t Init() {
  Device* device;
  return GetDevice(&device);
}

const char* Check(const Args& a) {
  if (const char* wrong = Check(a.problem, a.schedule)) return wrong;
  if (a.result == DType::kS32 && a.operand != DType::kS8) return "int32 results need int8 operands";
  if (a.residual != nullptr) {
    const bool adds = a.schedule.tile == kAuto || GetTile(a.schedule.tile).adds;
    if (a.problem.M > (a.problem.sparse() ? kResidualTokens : kDenseResidualTokens) || !adds) {
      return "a residual is added to at most 256 rows of a sparse product and 64 of a dense one, in "
             "tiles that can add it";
    }
    if (a.result == DType::kS32) return "int32 results take no residual";
  }
  if (a.problem.sparse() && a.zeros == nullptr && a.metadata == nullptr) {
    return "zeros or metadata must be given";
  }
  if (!Aligned(a.lifted, 16) || !Aligned(a.values, 16) || !Aligned(a.metadata, 16)) {
    return "lifted, values and metadata must be 16-byte aligned";
  }
  if (a.schedule.tile != kAuto && GetTile(a.schedule.tile).holds_zeros &&
      (a.zeros == nullptr || !Aligned(a.zeros, 16))) {
    return "the tile needs zeros, 16-byte aligned";
  }
  if (!Aligned(a.zeros, 8)) return "zeros must be 8-byte aligned";
  if (!Aligned(a.workspace, 128)) return "workspace must be 128-byte aligned";
  return nullptr;
}

cudaError_t ExpandMetadata(const uint8_t* zeros, uint32_t* metadata, const Problem& problem,
                           cudaStream_t stream) {
  if (MetadataBytes(problem) == 0) return cudaSuccess;
  int out = problem.out, groups = problem.groups(), windows = problem.group / 2 - 1;
  int stages = MetadataSlices(problem) / 2;
  constexpr int kAtOnce = kExpandThreads / kExpandRows;
  const bool eight = windows == 3;
  const dim3 grid(CeilDiv(stages, eight ? 3 * kAtOnce : kAtOnce), CeilDiv(out, kExpandRows));
  const void* const kernel =
      eight ? reinterpret_cast<const void*>(ExpandGroupsOfEightKernel)
            : reinterpret_cast<const void*>(windows == 1 ? ExpandMetadataKernel<8>
                                                         : ExpandMetadataKernel<kStagePieces>);
  void* parameters[] = {&zeros, &metadata, &out, &groups, &windows, &stages};
  return cudaLaunchKernel(kernel, grid, kExpandThreads, parameters, 0, stream);
}

cudaError_t BeforeLift(const Args& args, cudaStream_t stream, Counters* counters) {
  Call call;
  if (auto s = Prepare(args, &call)) return s;
  *counters = call.counters();
  return call.ExpandOwnMetadata(args, stream);
}

cudaError_t SparseMatmul(const Args& a, cudaStream_t stream) {
  Call call;
  if (auto s = Prepare(a, &call)) return s;
  const int tile = call.plan.tile;
  const TileInfo& t = GetTile(tile);
  // The kernel may begin before the metadata is there. It then waits for it with all but its start.
  const bool after_metadata = !a.after_lift && call.own_metadata != nullptr;
  if (!a.after_lift) {
    if (const Counters counters = call.counters(); counters.count > 0) {
      const size_t bytes = counters.count * sizeof(*counters.first);
      if (auto s = cudaMemsetAsync(counters.first, 0, bytes, stream)) return s;
    }
    if (auto s = call.ExpandOwnMetadata(a, stream)) return s;
  }
  Params params = MakeParams(a, call, t);
  params.after_metadata = after_metadata;
  if (!MakeMaps(params, a, t, call.metadata)) return cudaErrorInvalidValue;
  const Split& split = call.plan.split;
  if (!split.share_w) {
    const bool early = after_metadata || (a.after_lift && a.problem.M <= kEarlyTokens);
    return Launch(params, a, tile, call.cta_groups, t.ctas * split.cluster_groups, early, stream);
  }
  // The primary launch has the 2x2 clusters, the secondary one the other CTA pairs.
  const int in_2x2 = 2 * call.clusters_2x2, left = call.cta_groups - in_2x2;
  Params primary = params;
  primary.role = kPrimary;
  if (!MakeWeightMaps(primary, a, t, call.metadata, 2)) return cudaErrorInvalidValue;
  if (auto s = Launch(primary, a, tile, in_2x2, 2 * t.ctas, after_metadata, stream)) return s;
  params.role = kSecondary;
  params.first_group = in_2x2;
  return left > 0 ? Launch(params, a, tile, left, t.ctas, true, stream) : cudaSuccess;
}

}  // namespace slidejax::hopper

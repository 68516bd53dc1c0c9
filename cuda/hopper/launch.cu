// Host side of the Hopper GEMM: the tiles there are, the cost model that chooses one, tensor maps,
// the launch.
#include <cuda.h>

#include <algorithm>
#include <mutex>

#include "hopper/hopper.h"
#include "hopper/kernel.cuh"
#include "hopper/metadata.cuh"

namespace slidejax::hopper {
namespace {

constexpr int kCounterBytes = 16384;  // at the head of the workspace
constexpr int kMaxDevices = 64;
// Up to so many tokens it pays to begin before the lift has ended (10.5 to 9.8 us for one linear of
// M=16); from 1024 on it costs 2 %.
constexpr int kEarlyTokens = 512;

// A tile's kernel for both inputs. stage_clocks: measured clocks of one stage (128 columns) in the
// full pipeline; tile_clocks: what a tile costs beyond its stages; abreast: the time with two teams
// that share W as well as X, as a part of that without: it takes less energy, which is what binds,
// but the clocks of a short stage do not hide what four blocks have to tell each other.
// docs/hopper-kernel.md has the measurements.
struct TileInfo {
  HopperTile tile;
  const void* kernel[2];
  int threads, shared, partial, slab_tokens;
  int width;         // times 128 columns in a copy of W
  uint32_t divides;  // bit n: K can be divided into n parts
  bool sparse;
  float stage_clocks, tile_clocks, abreast;
};

template <class T>
constexpr uint32_t Divisions() {
  uint32_t all = 0;
  for (int parts : kClusterSplits) {
    const bool fits = T::kCanSplitInCluster && parts * T::kCtas <= 8 &&
                      (T::kUnits + parts - 1) / parts * parts <= T::kMaxUnits;
    all |= fits ? 1u << parts : 0;
  }
  return all;
}

template <int kWarpGroups, int kM64Blocks, int kTokens, int kCtas, int kStagesX, int kStagesW,
          bool kSparse = true>
TileInfo MakeTileInfo(const char* name, float stage_clocks, float tile_clocks, float abreast = 1) {
  using T = Tile<true, kWarpGroups, kM64Blocks, kTokens, kCtas, kStagesX, kStagesW, kSparse>;
  using S = Tile<false, kWarpGroups, kM64Blocks, kTokens, kCtas, kStagesX, kStagesW, kSparse>;
  return {{name, T::kRows, kTokens, kCtas, kWarpGroups, kStagesX},
          {reinterpret_cast<const void*>(SparseMatmulKernel<T>),
           reinterpret_cast<const void*>(SparseMatmulKernel<S>)},
          T::kThreads,
          T::kSharedBytes,
          T::kAccumulators * kCtas * 4,
          T::kSlabTokens,
          T::kSlicesW,
          Divisions<T>(),
          kSparse,
          stage_clocks,
          tile_clocks,
          abreast};
}

const TileInfo kTiles[] = {
    MakeTileInfo<2, 2, 192, 2, 4, 2>("256x192", 977, 3000, 0.96),
    MakeTileInfo<2, 1, 256, 2, 4, 3>("128x256", 665, 2500, 0.98),
    MakeTileInfo<2, 2, 160, 2, 4, 3>("256x160", 843, 2600, 0.95),
    MakeTileInfo<2, 2, 128, 2, 4, 3>("256x128", 710, 2000, 0.96),
    MakeTileInfo<2, 1, 128, 2, 6, 4>("128x128", 400, 1500, 1.08),
    MakeTileInfo<2, 1, 128, 4, 6, 4>("128x128 in clusters_2x2", 395, 1500),
    MakeTileInfo<2, 1, 64, 1, 5, 6>("128x64", 255, 1000),
    MakeTileInfo<2, 1, 32, 1, 7, 7>("128x32", 240, 800),
    MakeTileInfo<2, 1, 16, 1, 8, 8>("128x16", 200, 800),
    MakeTileInfo<2, 2, 192, 2, 3, 3, false>("dense 256x192", 1520, 2900, 0.97),
    MakeTileInfo<2, 1, 256, 2, 4, 4, false>("dense 128x256", 1040, 2500, 0.96),
    MakeTileInfo<2, 1, 128, 2, 6, 6, false>("dense 128x128", 560, 1500, 0.97),
    MakeTileInfo<2, 1, 64, 1, 7, 7, false>("dense 128x64", 340, 1000),
    MakeTileInfo<2, 1, 16, 1, 10, 10, false>("dense 128x16", 400, 800),
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

int CeilDiv(int a, int b) { return (a + b - 1) / b; }
bool IsSparse(const HopperArgs& a) { return a.group != 0; }
int ColumnsOf(const HopperArgs& a) { return IsSparse(a) ? a.groups * (a.group - 2) * 2 : a.groups; }
int MetadataStages(int groups, int group) {
  return group == 0 ? 0 : 2 * CeilDiv(groups * (group - 2) * 2, 256);
}
// The kernel wants two steps; what lies beyond K' is zero.
int StepsOf(const HopperArgs& a) { return std::max(2, CeilDiv(ColumnsOf(a), 256)); }
// Bytes of W and its metadata.
float WeightBytes(const HopperArgs& a) {
  return static_cast<float>(a.out) * ColumnsOf(a) * (IsSparse(a) ? 0.625f : 1.0f);
}

constexpr int kAbreastTokens = 1024;  // with fewer, power does not bind
constexpr int kFewTokens = 64;        // up to here no larger tile was ever faster

// How the tiles of a configuration fall on teams. Abreast, two teams multiply the same rows with
// tokens of adjacent tiles: then `shared` are pairs of tiles, and `clusters` pairs of teams.
struct Split {
  int whole, shared,
      clusters;        // tiles of one team each, tiles shared along K, teams that share them
  int parts, divided;  // teams of a cluster; tiles that they divide along K, one for each cluster
  float clocks;
  bool abreast = false;

  int teams_of_cluster() const { return abreast ? 2 : 1; }
};

// Teams that are expected to run side by side in clusters of `parts`: larger clusters do not fill a
// device to the last multiprocessor.
int PlannedGroups(const TileInfo& e, int multiprocessors, int parts) {
  const int all = multiprocessors / e.tile.cluster, size = e.tile.cluster * parts;
  const int fit = size <= 2 ? all : size % 3 == 0 ? all * 9 / 11 : all * 10 / 11;
  return parts == 1 ? std::max(1, fit) : fit / parts * parts;
}

// Tiles of a team along the outputs and, of `teams` abreast, along the tokens.
int RowTiles(const TileInfo& e, const HopperArgs& a) {
  return CeilDiv(a.out, e.tile.rows * e.tile.cluster);
}
int TokenTiles(const TileInfo& e, const HopperArgs& a, int cta_groups) {
  return CeilDiv(a.M, cta_groups * e.tile.tokens);
}

// A step of two stages, with so many blocks side by side, of teams of which `teams` share W: no
// faster than L2 gives all of them what each reads of it.
float StepClocks(const TileInfo& e, const HopperArgs& a, int blocks, int cta_groups) {
  const float kBytesPerClock = 5500;  // fitted together with the 72 bytes of a row below; W and its
                                      // metadata have 80 (weight_bytes)
  const float x = 128.0f * e.tile.tokens / e.tile.cluster,
              w = (e.sparse ? 72.0f : 128.0f) * e.tile.rows / cta_groups;
  // Where power does not bind, the tile with the longest stages hides the least of what each wave
  // waits for.
  const float exposed = a.M < kAbreastTokens && e.tile.rows * e.tile.tokens >= 256 * 192 ? 1.1f : 1;
  return 2 * std::max(e.stage_clocks * exposed, (x + w) * blocks / kBytesPerClock);
}

// Whole waves first; the rest either as one more wave, or cut along K by way of memory. clusters:
// of `teams` teams, each with its tile.
Split CutInMemory(const TileInfo& e, const HopperArgs& a, int clusters, int cta_groups, int want) {
  const int tiles = RowTiles(e, a) * TokenTiles(e, a, cta_groups), steps = StepsOf(a);
  const int rest = tiles % clusters, waves = tiles / clusters, blocks = e.tile.cluster * cta_groups;
  auto step_of = [&](int side_by_side) {
    return StepClocks(e, a, side_by_side * blocks, cta_groups);
  };
  const float tile = steps * step_of(std::min(tiles, clusters)) + e.tile_clocks;
  Split best{tiles * cta_groups, 0, 0, 1, 0, (waves + (rest > 0)) * tile, cta_groups > 1};
  if (rest == 0 || want == 0) return best;
  const float kBytesPerClock = 24, kLatency = 6500;  // of a multiprocessor, partial sums both ways;
                                                     // clearing the counters and waiting
  const float late =
      a.M < kAbreastTokens ? 2 : 1;  // measured with 80 to 896 tokens, docs/hopper-kernel.md
  auto consider = [&](int sharers) {
    if (sharers <= rest || sharers > clusters || sharers > rest * steps) return;
    const float parts = 1 + static_cast<float>(rest) / sharers;
    const float move = 2 * parts * (e.partial / e.tile.cluster) / kBytesPerClock;
    // Equal parts run through K side by side; unequal ones each read their own W and X from memory,
    // teams abreast at half of its rate.
    const float bytes = rest * (e.tile.rows * e.tile.cluster * WeightBytes(a) / a.out +
                                cta_groups * e.tile.tokens * 256.0f * steps);
    const float apart = sharers % rest ? cta_groups * bytes / 2900 : 0;
    const float shared = std::max(CeilDiv(rest * steps, sharers) * step_of(sharers), apart);
    const float clocks = waves * tile + late * (shared + e.tile_clocks + move + kLatency);
    if (want > 0 || clocks < best.clocks)
      best = {waves * clusters * cta_groups, rest, sharers, 1, 0, clocks, cta_groups > 1};
  };
  if (want > 0) {
    consider(want);
  } else {
    for (int parts = 2; parts * rest <= clusters; ++parts) consider(parts * rest);
    consider(clusters);
  }
  return best;
}

// The last, partial wave divided along K within clusters of several teams, on as many as fit. Not
// better than `best`: that.
Split DivideInClusters(const TileInfo& e, const HopperArgs& a, int multiprocessors, Split best) {
  const int tiles = RowTiles(e, a) * TokenTiles(e, a, 1), steps = StepsOf(a);
  const float meeting =
      1500 + 40.0f * e.tile.tokens * e.tile.rows / 128;  // of a cluster, and sending sums around
  for (int parts : kClusterSplits) {
    if (!(e.divides >> parts & 1) || parts > steps || (a.parts > 0 && parts != a.parts)) continue;
    const int cta_groups = PlannedGroups(e, multiprocessors, parts);
    if (cta_groups == 0) continue;
    const int full = tiles / cta_groups, divided = tiles % cta_groups;
    if (divided == 0 || divided > cta_groups / parts) continue;
    const float step =
        StepClocks(e, a, (full > 0 ? cta_groups : divided * parts) * e.tile.cluster, 1);
    const float clocks = full * (steps * step + e.tile_clocks) + CeilDiv(steps, parts) * step +
                         e.tile_clocks + meeting;
    if (a.parts > 0 || clocks < best.clocks)
      best = {full * cta_groups, 0,     full > 0 ? cta_groups : divided * parts, parts,
              divided,           clocks};
  }
  return best;
}

// The best way for the tiles of a configuration to fall on `clusters` teams. want:
// HopperArgs::split.
Split SplitTiles(const TileInfo& e, const HopperArgs& a, int multiprocessors, int clusters,
                 int want) {
  const bool can = e.tile.cluster == 2 && clusters > 1 && a.parts <= 1;
  const int cut = a.parts > 0 ? 0 : want;
  Split best{};
  if (a.abreast != 2 || !can) {
    best = CutInMemory(e, a, clusters, 1, cut);
    if (want <= 0) best = DivideInClusters(e, a, multiprocessors, best);
  }
  if (can && (a.abreast == 2 || (a.abreast == 0 && a.M >= kAbreastTokens))) {
    Split abreast = CutInMemory(e, a, clusters / 2, 2, cut);
    abreast.clocks *= e.abreast;
    if (a.abreast == 2 || abreast.clocks < best.clocks) best = abreast;
  }
  return best;
}

struct Plan {
  int config, token_group;
  Split split;
};

Plan MakePlan(const HopperArgs& a, int multiprocessors) {
  Plan best{-1, 0, {}};
  float best_time = 0;
  for (int c = 0; c < kTileCount; ++c) {
    const TileInfo& e = kTiles[c];
    if (e.sparse != IsSparse(a) || (a.config >= 0 && a.config != c)) continue;
    if (a.config < 0 && a.M <= kFewTokens && e.tile.tokens > kFewTokens) continue;
    const Split split =
        SplitTiles(e, a, multiprocessors, PlannedGroups(e, multiprocessors, 1), a.split);
    // Weights once for every token tile that does not fit beside the others; at 1.4 GHz a clock
    // moves about 2.9 KB.
    const float time = std::max(split.clocks, WeightBytes(a) / 2900.0f) + 0.1f * split.clocks;
    if (best.config < 0 || time < best_time) {
      best = {c, 0, split};
      best_time = time;
    }
  }
  const TileInfo& e = kTiles[best.config];
  const int fit =
      static_cast<int>((16 << 20) / (static_cast<int64_t>(e.tile.tokens) * ColumnsOf(a)));
  best.token_group =
      a.token_group > 0 ? a.token_group : std::max(1, std::min(fit, TokenTiles(e, a, 1)));
  return best;
}

size_t PartialBytes(const Plan& plan) {
  if (plan.split.shared == 0) return 0;
  return kCounterBytes + static_cast<size_t>(plan.split.shared + plan.split.clusters) *
                             plan.split.teams_of_cluster() * kTiles[plan.config].partial;
}

// What the driver and the device say once.
struct Device {
  std::once_flag once;
  cudaError_t status = cudaErrorInitializationError;
  int clusters[kTileCount][9] = {};  // of so many teams, that run side by side; of numbers that
                                     // can divide K, and of two that can share W
  int multiprocessors = 0;

  int CtaGroups(int config, int parts) const { return clusters[config][parts] * parts; }
};

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled = nullptr;
Device devices[kMaxDevices];

// A launch of so many blocks in clusters of `size`, which is written into `attribute`.
cudaLaunchConfig_t InClusters(const TileInfo& e, unsigned blocks, unsigned size,
                              cudaLaunchAttribute& attribute) {
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = e.threads;
  config.dynamicSmemBytes = e.shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
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
  for (int c = 0; c < kTileCount; ++c) {
    const TileInfo& e = kTiles[c];
    for (const void* kernel : e.kernel)
      if (auto s =
              cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, e.shared))
        return s;
    for (int parts = 1; parts <= 8; ++parts) {
      if (parts > 1 && !(e.divides >> parts & 1) && !(parts == 2 && e.tile.cluster == 2)) continue;
      const unsigned size = e.tile.cluster * parts;
      cudaLaunchAttribute attribute;
      const cudaLaunchConfig_t config =
          InClusters(e, std::max(1u, device.multiprocessors / size) * size, size, attribute);
      if (auto s = cudaOccupancyMaxActiveClusters(&device.clusters[c][parts], e.kernel[0], &config))
        return s;
    }
    if (device.clusters[c][1] < 1) return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

cudaError_t GetDevice(Device** device) {
  int id = 0;
  if (auto s = cudaGetDevice(&id)) return s;
  if (id >= kMaxDevices) return cudaErrorInvalidDevice;
  *device = &devices[id];
  std::call_once(devices[id].once, [&] { devices[id].status = PrepareDevice(id, devices[id]); });
  return devices[id].status;
}

bool MakeMap(CUtensorMap* map, CUtensorMapDataType type, int rank, const void* base,
             const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
             CUtensorMapSwizzle swizzle) {
  const cuuint32_t ones[3] = {1, 1, 1};
  return encode_tiled(map, type, rank, const_cast<void*>(base), size, stride, box, ones,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool Aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

// W and its metadata, which so many blocks copy together.
bool MakeWeightMaps(Params& p, const HopperArgs& a, const TileInfo& e, const void* meta,
                    int sharers) {
  const cuuint64_t columns = e.sparse ? ColumnsOf(a) / 2 : ColumnsOf(a),
                   stages = MetadataStages(a.groups, a.group);
  const cuuint32_t rows = e.tile.rows / sharers;
  const cuuint64_t w_size[] = {columns, static_cast<cuuint64_t>(a.out)}, w_stride[] = {columns};
  const cuuint64_t e_size[] = {256, stages, static_cast<cuuint64_t>(CeilDiv(a.out, 64))},
                   e_stride[] = {1024, 1024 * stages};
  const cuuint32_t w_box[] = {128, rows},
                   e_box[] = {256, static_cast<cuuint32_t>(e.width), rows / 64};
  return MakeMap(&p.map_w, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.values, w_size, w_stride, w_box,
                 CU_TENSOR_MAP_SWIZZLE_128B) &&
         (!e.sparse || MakeMap(&p.map_e, CU_TENSOR_MAP_DATA_TYPE_UINT32, 3, meta, e_size, e_stride,
                               e_box, CU_TENSOR_MAP_SWIZZLE_NONE));
}

bool MakeMaps(Params& p, const HopperArgs& a, const TileInfo& e, const void* meta) {
  const cuuint64_t columns = ColumnsOf(a);
  const cuuint64_t x_size[] = {columns, static_cast<cuuint64_t>(a.M)}, x_stride[] = {columns};
  const cuuint32_t x_box[] = {128, static_cast<cuuint32_t>(e.tile.tokens / e.tile.cluster)},
                   x_end[] = {128, a.M % x_box[1]};
  // bfloat16 by bulk copies where a tensor map can describe y: 64 outputs, a line, of up to 32
  // tokens at a time.
  p.vector_stores = Aligned(a.y, 16) && a.out % 8 == 0;
  p.bulk_stores = p.vector_stores && a.output == HopperOutput::kBF16;
  if (p.bulk_stores) {
    const cuuint64_t y_size[] = {static_cast<cuuint64_t>(a.out), static_cast<cuuint64_t>(a.M)},
                     y_stride[] = {2ull * a.out};
    const cuuint32_t y_box[] = {64, static_cast<cuuint32_t>(e.slab_tokens)};
    if (!MakeMap(&p.map_y, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, a.y, y_size, y_stride, y_box,
                 CU_TENSOR_MAP_SWIZZLE_128B))
      return false;
  }
  return MakeMap(&p.map_x, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.lifted, x_size, x_stride, x_box,
                 CU_TENSOR_MAP_SWIZZLE_128B) &&
         (x_end[1] == 0 || MakeMap(&p.map_x_end, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, a.lifted, x_size,
                                   x_stride, x_end, CU_TENSOR_MAP_SWIZZLE_128B)) &&
         MakeWeightMaps(p, a, e, meta, 1);
}

// A call's plan on the current device, and what is where in its workspace.
struct Ready {
  Plan plan;
  int cta_groups;    // of all launches
  int clusters_2x2;  // clusters of two teams that share W, beside which the other teams run in
                     // pairs of blocks
  const uint32_t* meta;
  uint32_t* own_meta;  // where it is to be expanded, or null
  uint8_t* workspace;  // behind it

  HopperCounters counters() const {
    const HopperTile& tile = kTiles[plan.config].tile;
    return {
        reinterpret_cast<unsigned long long*>(workspace),
        plan.split.shared * plan.split.teams_of_cluster() * tile.cluster * tile.warp_groups * 4};
  }
  cudaError_t ExpandMetadata(const HopperArgs& a, cudaStream_t stream) const {
    return own_meta ? slidejax_hopper_expand_metadata(a.zeros, own_meta, a.out, a.groups, a.group,
                                                      stream)
                    : cudaSuccess;
  }
};

cudaError_t MakeReady(const HopperArgs& args, Ready* ready) {
  if (slidejax_hopper_check(args)) return cudaErrorInvalidValue;
  Device* device;
  if (auto s = GetDevice(&device)) return s;
  HopperArgs a = args;
  const size_t meta_bytes =
      a.meta ? 0
             : slidejax_hopper_metadata_bytes(a.out, a.groups, a.group);  // 0 for a dense weight
  if (a.workspace_bytes < meta_bytes) return cudaErrorInvalidValue;
  ready->own_meta = meta_bytes > 0 ? static_cast<uint32_t*>(a.workspace) : nullptr;
  ready->meta = a.meta ? a.meta : ready->own_meta;
  ready->workspace = static_cast<uint8_t*>(a.workspace) + meta_bytes;

  Plan& plan = ready->plan;
  plan = MakePlan(a, device->multiprocessors);
  const TileInfo& e = kTiles[plan.config];
  const int planned = PlannedGroups(e, device->multiprocessors, 1),
            clusters = std::min(planned, device->CtaGroups(plan.config, 1));
  bool fits = clusters == planned;
  if (plan.split.abreast) fits = fits && device->clusters[plan.config][2] > 0;
  if (plan.split.parts > 1)
    fits = plan.split.clusters <= device->CtaGroups(plan.config, plan.split.parts);
  if (!fits || a.workspace_bytes - meta_bytes <
                   PartialBytes(plan)) {  // fewer fit than planned for, or no room
    a.config = plan.config, a.parts = 1, a.abreast = fits && plan.split.abreast ? 2 : 1;
    plan.split = SplitTiles(e, a, device->multiprocessors, clusters, 0);
  }
  const Split& s = plan.split;
  // In whole clusters, as many teams as there is work for.
  ready->cta_groups = s.parts > 1 ? s.clusters
                                  : std::min(s.abreast ? clusters & ~1 : clusters,
                                             std::max(s.whole, s.clusters * s.teams_of_cluster()));
  ready->clusters_2x2 =
      s.abreast ? std::min(ready->cta_groups / 2, device->clusters[plan.config][2]) : 0;
  static_assert(132 * 2 * 4 * sizeof(*HopperCounters::first) <= kCounterBytes);
  if (ready->counters().count * sizeof(*HopperCounters::first) > kCounterBytes)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace
}  // namespace slidejax::hopper

using namespace slidejax;
using namespace slidejax::hopper;

cudaError_t slidejax_hopper_init() {
  Device* device;
  return GetDevice(&device);
}

const char* slidejax_hopper_check(const HopperArgs& a) {
  if (a.M < 1 || a.out < 1) return "M and out must be at least 1";
  if (a.group != 0 && (a.group < 4 || a.group > 16 || a.group % 2))
    return "group must be 4, 6, ... 16, or 0 for a dense weight";
  if (IsSparse(a) && (a.groups < 8 || a.groups % 8)) return "groups must be a multiple of 8";
  if (!IsSparse(a) && (a.groups < 16 || a.groups % 16))
    return "columns of a dense weight must be a multiple of 16";
  if (a.groups > (1 << (IsSparse(a) ? 20 : 24))) return "too many groups";
  if (a.config >= kTileCount || (a.config >= 0 && kTiles[a.config].sparse != IsSparse(a)))
    return "no such config";
  if (a.output == HopperOutput::kS32 && a.input != HopperInput::kS8)
    return "int32 results need int8 operands";
  if (IsSparse(a) && a.zeros == nullptr && a.meta == nullptr) return "zeros or meta must be given";
  if (!Aligned(a.lifted, 16) || !Aligned(a.values, 16) || !Aligned(a.meta, 16))
    return "lifted, values and meta must be 16-byte aligned";
  if (!Aligned(a.workspace, 128)) return "workspace must be 128-byte aligned";
  return nullptr;
}

size_t slidejax_hopper_metadata_bytes(int out, int groups, int group) {
  return static_cast<size_t>(CeilDiv(out, 64)) * MetadataStages(groups, group) * 1024;
}

cudaError_t slidejax_hopper_expand_metadata(const uint8_t* zeros, uint32_t* meta, int out,
                                            int groups, int group, cudaStream_t stream) {
  const int stages = MetadataStages(groups, group), windows = group / 2 - 1;
  using Kernel = void (*)(const uint8_t*, uint2*, int, int, int);
  static constexpr Kernel kKernels[] = {ExpandMetadataKernel<1>, ExpandMetadataKernel<2>,
                                        ExpandMetadataKernel<3>, ExpandMetadataKernel<4>,
                                        ExpandMetadataKernel<5>, ExpandMetadataKernel<6>,
                                        ExpandMetadataKernel<7>};
  const dim3 grid(CeilDiv(stages, kMetadataGroups / 32 * windows), CeilDiv(out, 64));
  void* parameters[] = {&zeros, &meta, &out, &groups, const_cast<int*>(&stages)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kKernels[windows - 1]), grid,
                          kMetadataThreads, parameters, 0, stream);
}

int slidejax_hopper_tile_count() { return kTileCount; }
HopperTile slidejax_hopper_tile(int config) { return kTiles[config].tile; }

void slidejax_hopper_plan(HopperArgs& a, int multiprocessors) {
  const Plan plan = MakePlan(a, multiprocessors);
  a.config = plan.config;
  a.token_group = plan.token_group;
  a.split = plan.split.shared > 0 ? plan.split.clusters : 0;
  a.parts = plan.split.parts;
  a.abreast = plan.split.abreast ? 2 : 1;
}

size_t slidejax_hopper_workspace(const HopperArgs& a, int multiprocessors) {
  const size_t meta =
      a.meta ? 0
             : slidejax_hopper_metadata_bytes(a.out, a.groups, a.group);  // 0 for a dense weight
  return meta + PartialBytes(MakePlan(a, multiprocessors));
}

cudaError_t slidejax_hopper_before_lift(const HopperArgs& args, cudaStream_t stream,
                                        HopperCounters* counters) {
  Ready ready;
  if (auto s = MakeReady(args, &ready)) return s;
  *counters = ready.counters();
  return ready.ExpandMetadata(args, stream);
}

cudaError_t slidejax_hopper_sparse_matmul(const HopperArgs& a, cudaStream_t stream) {
  Ready ready;
  if (auto s = MakeReady(a, &ready)) return s;
  const Plan& plan = ready.plan;
  const TileInfo& e = kTiles[plan.config];
  const HopperCounters counters = ready.counters();
  if (!a.after_lift) {
    if (auto s = ready.ExpandMetadata(a, stream)) return s;
    if (counters.count > 0)
      if (auto s =
              cudaMemsetAsync(counters.first, 0, counters.count * sizeof(*counters.first), stream))
        return s;
  }

  Params p = {};
  if (!MakeMaps(p, a, e, ready.meta)) return cudaErrorInvalidValue;
  const Split& split = plan.split;
  p.scale_x = a.scale_x;
  p.scale_w = a.scale_w;
  p.bias = a.bias;
  p.y = a.y;
  p.counters = counters.first;
  p.partials = reinterpret_cast<float*>(ready.workspace + kCounterBytes);
  p.M = a.M;
  p.out = a.out;
  p.steps = StepsOf(a);
  p.row_tiles = RowTiles(e, a);
  p.token_tiles = TokenTiles(e, a, split.teams_of_cluster());
  const int groups = std::min(p.token_tiles, CeilDiv(TokenTiles(e, a, 1), plan.token_group));
  p.token_group_tiles = p.token_tiles / groups;
  p.wide_token_groups = p.token_tiles % groups;
  p.whole_tiles = split.whole;
  p.stream_k_tiles = split.shared;
  p.stream_k_workers = p.stream_k_tiles > 0 ? split.clusters : 0;
  p.cluster_groups = split.parts;
  p.cluster_split_tiles = split.divided;
  p.cta_groups = ready.cta_groups;
  p.output = static_cast<int>(a.output);

  // `teams` from params.first_team on in clusters of `size` blocks.
  auto launch = [&](Params& params, int cta_groups, int size, bool early) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = InClusters(e, cta_groups * e.tile.cluster, size, attributes[0]);
    config.stream = stream;
    if (early) {
      attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[1].val.programmaticStreamSerializationAllowed = 1;
      config.numAttrs = 2;
    }
    void* arguments[] = {&params};
    return cudaLaunchKernelExC(&config, e.kernel[static_cast<int>(a.input)], arguments);
  };
  if (!split.abreast)
    return launch(p, ready.cta_groups, e.tile.cluster * p.cluster_groups,
                  a.after_lift && a.M <= kEarlyTokens);

  Params four = p;
  if (!MakeWeightMaps(four, a, e, ready.meta, 2)) return cudaErrorInvalidValue;
  const int inherited = ready.cta_groups - 2 * ready.clusters_2x2;
  four.role = kPrimary;
  if (auto s = launch(four, 2 * ready.clusters_2x2, 2 * e.tile.cluster, false)) return s;
  p.first_group = 2 * ready.clusters_2x2;
  p.role = kSecondary;
  return inherited > 0 ? launch(p, inherited, e.tile.cluster, true) : cudaSuccess;
}

#include "hopper/plan.h"

#include <algorithm>
#include <iterator>

#include "common/group.h"
#include "common/integers.h"
#include "hopper/tile.h"

namespace slidejax::hopper {
namespace {

// Rates and delays of the model, fitted to measurements on an H200 (docs/hopper-kernel.md). Clocks
// are a multiprocessor's.
constexpr float kL2BytesPerClock = 5500;      // from L2 to all multiprocessors
constexpr float kMemoryBytesPerClock = 2900;  // from device memory, at 1.4 GHz
constexpr float kPartialBytesPerClock = 24;   // of a multiprocessor: partial sums, both ways
constexpr float kStreamKClocks = 6500;        // clearing the counters, and waiting
constexpr float kClusterSplitClocks = 1500;   // for the CTAs of a cluster to meet
constexpr float kClusterSumClocks = 40;       // to send sums around, for each token of 128 rows
// Bytes of W and its metadata: of a row in a slice, as they fit the rate of L2, and of a column in
// memory.
constexpr float kSparseRowBytes = 72, kDenseRowBytes = 128;
constexpr float kSparseBytesPerColumn = 0.625f, kDenseBytesPerColumn = 1;

// The cost of metadata that is not prepared. A kernel ahead has to be launched, and moves this many
// times the bytes of metadata. A tile that makes the metadata by itself takes longer by this part
// of its time: a tile of 64 rows, whose expanders make two stages at a time, and one of 128.
constexpr float kMakeMetadataClocks = 4000, kMakeMetadataBytes = 1.7f;
constexpr float kExpanding64 = 0.08f, kExpanding128 = 0.35f;
// The same where consumers make it: of tiles whose CTAs share X, and of a CTA alone.
constexpr float kConsumersExpanding = 0.12f, kLoneConsumersExpanding = 0.3f;

constexpr int64_t kTokenGroupBytes = 16 << 20;  // of X, kept in L2 while all of W passes
constexpr int kPowerLimitedTokens = 1024;       // with fewer, power does not limit
// Up to these numbers of tokens: the smallest tile of 64 rows that holds them all is taken; a CTA
// alone with 128 tokens was never slower than CTA pairs; of dense tiles none of more tokens was
// ever faster.
constexpr int kFewTokens = 128, kSomeTokens = 256, kFewDenseTokens = 64;
static_assert(kResidualTokens == kSomeTokens && kDenseResidualTokens == kFewDenseTokens);
// With fewer than kPowerLimitedTokens, stream-K costs more than modelled, and large tiles, which
// have the longest stages, hide the least of what each wave waits for.
constexpr float kFewTokensStreamKFactor = 2;
constexpr float kExposedStageFactor = 1.1f;
constexpr int kExposedTileArea = 256 * 192;

template <class T>
constexpr uint32_t ClusterSplitsOf() {
  uint32_t all = 0;
  for (const int parts : kClusterSplits) all |= T::SplitsInto(parts) ? 1u << parts : 0;
  return all;
}

template <class T>
constexpr TileInfo InfoOf(const char* name, float stage_clocks, float tile_clocks,
                          float shared_w_time) {
  return {name,
          T::kSparse,
          T::kHoldsZeros,
          T::kExpands,
          T::kAdds,
          T::kRows,
          T::kTokens,
          T::kCtas,
          T::kWarpGroups,
          T::kThreads,
          T::kSharedBytes,
          T::kSlabTokens,
          T::kSlicesW,
          T::kAccumulators * T::kCtas * 4,
          ClusterSplitsOf<T>(),
          stage_clocks,
          tile_clocks,
          shared_w_time};
}

#define SLIDEJAX_INFO(name, warp_groups, m64_blocks, tokens, ctas, stages_x, stages_w, form, \
                      stage_clocks, tile_clocks, shared_w_time)                              \
  InfoOf<Tile<true, warp_groups, m64_blocks, tokens, ctas, stages_x, stages_w, form>>(       \
      name, stage_clocks, tile_clocks, shared_w_time),
constexpr TileInfo kTiles[] = {SLIDEJAX_HOPPER_TILES(SLIDEJAX_INFO)};
#undef SLIDEJAX_INFO

float WeightBytes(const Problem& p) {
  const float per_column = p.sparse() ? kSparseBytesPerColumn : kDenseBytesPerColumn;
  return static_cast<float>(p.out) * p.columns * per_column;
}

// Returns the clocks of a step with `ctas` CTAs side by side, in CTA groups of which `sharing`
// share W. A step is no faster than L2 gives each CTA what it reads.
float StepClocks(const TileInfo& t, const Problem& p, int ctas, int sharing) {
  const float x = 128.0f * t.tokens / t.ctas;
  const float w = (t.sparse ? kSparseRowBytes : kDenseRowBytes) * t.rows / sharing;
  const bool exposed = p.M < kPowerLimitedTokens && t.rows * t.tokens >= kExposedTileArea;
  return 2 * std::max(t.stage_clocks * (exposed ? kExposedStageFactor : 1),
                      (x + w) * ctas / kL2BytesPerClock);
}

// Returns a split in which whole waves come first. The rest is either one more wave, or cut along K
// through memory. Work is dealt out to `workers`; a worker is `paired` CTA groups with a tile each.
// stream_k: Schedule::stream_k.
Split CutThroughMemory(const TileInfo& t, const Problem& p, int workers, int paired, int stream_k) {
  const int tiles = RowTiles(t, p) * TokenTiles(t, p, paired), steps = Steps(p);
  const int rest = tiles % workers, waves = tiles / workers, ctas = t.ctas * paired;
  const auto step_clocks = [&](int side_by_side) {
    return StepClocks(t, p, side_by_side * ctas, paired);
  };
  const float tile_clocks = steps * step_clocks(std::min(tiles, workers)) + t.tile_clocks;
  Split best;
  best.whole = tiles * paired;
  best.share_w = paired > 1;
  best.clocks = (waves + (rest > 0)) * tile_clocks;
  if (rest == 0 || stream_k == 0) return best;

  const float factor = p.M < kPowerLimitedTokens ? kFewTokensStreamKFactor : 1;
  const auto consider = [&](int sharers) {
    if (sharers <= rest || sharers > workers || sharers > rest * steps) return;
    const float parts = 1 + static_cast<float>(rest) / sharers;
    const float move = 2 * parts * (t.partial_bytes / t.ctas) / kPartialBytesPerClock;
    // Equal parts run through K side by side. Unequal ones each read their own W and X from memory,
    // with shared W at half of its rate.
    const float bytes = rest * (t.rows * t.ctas * WeightBytes(p) / p.out +
                                paired * t.tokens * float{kStepColumns} * steps);
    const float apart = sharers % rest ? paired * bytes / kMemoryBytesPerClock : 0;
    const float shared = std::max(CeilDiv(rest * steps, sharers) * step_clocks(sharers), apart);
    const float clocks =
        waves * tile_clocks + factor * (shared + t.tile_clocks + move + kStreamKClocks);
    if (stream_k > 0 || clocks < best.clocks) {
      best.whole = waves * workers * paired;
      best.stream_k_tiles = rest, best.stream_k_workers = sharers;
      best.clocks = clocks;
    }
  };
  if (stream_k > 0) {
    consider(stream_k);
  } else {
    for (int parts = 2; parts * rest <= workers; ++parts) consider(parts * rest);
    consider(workers);
  }
  return best;
}

// Returns a split whose last, partial wave is divided along K within clusters of several CTA
// groups, on as many clusters as fit; or `best` where that is no better.
Split SplitInClusters(const TileInfo& t, const Problem& p, const Schedule& schedule,
                      int multiprocessors, Split best) {
  const int tiles = RowTiles(t, p) * TokenTiles(t, p, 1), steps = Steps(p);
  const float meeting = kClusterSplitClocks + kClusterSumClocks * t.tokens * t.rows / 128;
  const int want = schedule.cluster_split;
  for (const int parts : kClusterSplits) {
    if (!t.SplitsInto(parts) || parts > steps || (want != kAuto && parts != want)) continue;
    const int groups = PlannedGroups(t, multiprocessors, parts);
    if (groups == 0) continue;
    const int full = tiles / groups, divided = tiles % groups;
    if (divided == 0 || divided > groups / parts) continue;
    const int launched = full > 0 ? groups : divided * parts;
    const float step = StepClocks(t, p, launched * t.ctas, 1);
    const float clocks = full * (steps * step + t.tile_clocks) + CeilDiv(steps, parts) * step +
                         t.tile_clocks + meeting;
    if (want != kAuto || clocks < best.clocks) {
      best = {};
      best.whole = full * groups;
      best.cluster_groups = parts, best.cluster_split_tiles = divided;
      best.launched_groups = launched;
      best.clocks = clocks;
    }
  }
  return best;
}

// Whether the cost model may take a tile. For few tokens memory limits, whose rate the tiles of few
// rows reach best, and W is read once. For some more, CTAs that share X wait for each other longer
// than the model knows.
bool MayTake(const TileInfo& t, const Problem& p) {
  if (!p.sparse()) return p.M > kFewDenseTokens || t.tokens <= kFewDenseTokens;
  if (p.M > kSomeTokens) return true;
  if (p.M > kFewTokens) return t.ctas == 1 && t.tokens == kFewTokens;
  const auto fits = [&](const TileInfo& other) {
    return other.sparse && other.rows == 64 && other.tokens >= p.M;
  };
  return fits(t) && std::none_of(std::begin(kTiles), std::end(kTiles), [&](const TileInfo& other) {
           return fits(other) && other.tokens < t.tokens;
         });
}

// Returns the clocks that metadata costs beside the product's `clocks` where it is not prepared.
float MetadataClocks(const TileInfo& t, const Problem& p, float clocks) {
  if (!p.sparse()) return 0;
  if (t.holds_zeros) {
    return (t.ctas > 1 ? kConsumersExpanding : kLoneConsumersExpanding) * clocks;
  }
  if (MakesMetadata(t, p)) return (t.rows > 64 ? kExpanding128 : kExpanding64) * clocks;
  return kMakeMetadataClocks + kMakeMetadataBytes * MetadataBytes(p) / kMemoryBytesPerClock;
}

}  // namespace

int TileCount() { return static_cast<int>(std::size(kTiles)); }
const TileInfo& GetTile(int index) { return kTiles[index]; }

int RowTiles(const TileInfo& t, const Problem& p) { return CeilDiv(p.out, t.rows * t.ctas); }
int TokenTiles(const TileInfo& t, const Problem& p, int paired_groups) {
  return CeilDiv(p.M, paired_groups * t.tokens);
}
// The kernel needs two steps. What lies beyond K' is zero.
int Steps(const Problem& p) { return std::max(2, CeilDiv(p.columns, kStepColumns)); }

// Larger clusters do not fill a device to the last multiprocessor.
int PlannedGroups(const TileInfo& t, int multiprocessors, int cluster_groups) {
  const int all = multiprocessors / t.ctas, size = t.ctas * cluster_groups;
  const int fit = size <= 2 ? all : size % 3 == 0 ? all * 9 / 11 : all * 10 / 11;
  return cluster_groups == 1 ? std::max(1, fit) : fit / cluster_groups * cluster_groups;
}

Split SplitTiles(const TileInfo& t, const Problem& p, const Schedule& schedule, int multiprocessors,
                 int cta_groups) {
  const bool in_clusters = schedule.cluster_split > 1;
  const bool can_share_w = t.ctas == 2 && cta_groups > 1 && !in_clusters;
  const int stream_k = in_clusters ? 0 : schedule.stream_k;
  Split best;
  if (schedule.share_w != 1 || !can_share_w) {
    best = CutThroughMemory(t, p, cta_groups, 1, stream_k);
    if (schedule.stream_k <= 0) best = SplitInClusters(t, p, schedule, multiprocessors, best);
  }
  const bool wants_shared_w =
      schedule.share_w == kAuto ? p.M >= kPowerLimitedTokens : schedule.share_w == 1;
  if (can_share_w && wants_shared_w) {
    Split shared = CutThroughMemory(t, p, cta_groups / 2, 2, stream_k);
    shared.clocks *= t.shared_w_time;
    if (schedule.share_w == 1 || shared.clocks < best.clocks) best = shared;
  }
  return best;
}

Plan MakePlan(const Problem& p, const Schedule& schedule, bool metadata_prepared,
              int multiprocessors) {
  Plan best;
  float best_time = 0;
  for (int i = 0; i < TileCount(); ++i) {
    const TileInfo& t = kTiles[i];
    if (t.sparse != p.sparse() || (schedule.tile != kAuto && schedule.tile != i)) continue;
    if (schedule.tile == kAuto && !MayTake(t, p)) continue;
    if (schedule.tile == kAuto && t.holds_zeros && (metadata_prepared || !MakesMetadata(t, p))) {
      continue;
    }
    const Split split =
        SplitTiles(t, p, schedule, multiprocessors, PlannedGroups(t, multiprocessors, 1));
    // A product is no faster than memory gives W. The tenth decides between tiles that memory
    // limits alike.
    const float time = std::max(split.clocks, WeightBytes(p) / kMemoryBytesPerClock) +
                       0.1f * split.clocks +
                       (metadata_prepared ? 0 : MetadataClocks(t, p, split.clocks));
    if (best.tile == kAuto || time < best_time) {
      best = {i, 0, split};
      best_time = time;
    }
  }
  const TileInfo& t = kTiles[best.tile];
  const int fit = static_cast<int>(kTokenGroupBytes / (static_cast<int64_t>(t.tokens) * p.columns));
  best.token_group = schedule.token_group != kAuto
                         ? schedule.token_group
                         : std::max(1, std::min(fit, TokenTiles(t, p, 1)));
  return best;
}

const char* Check(const Problem& p, const Schedule& schedule) {
  constexpr int kMaxGroups = 1 << 20, kMaxDenseColumns = 1 << 24;
  if (p.M < 1 || p.out < 1) return "M and out must be at least 1";
  if (p.group != 0 && !IsGroup(p.group)) {
    return "group must be 4, 6, ... 16, or 0 for a dense weight";
  }
  if (p.sparse()) {
    if (p.columns < 1 || p.columns % (8 * 2 * (p.group - 2))) {
      return "groups must be a multiple of 8";
    }
    if (p.groups() > kMaxGroups) return "too many groups";
  } else {
    if (p.columns < 16 || p.columns % 16) {
      return "columns of a dense weight must be a multiple of 16";
    }
    if (p.columns > kMaxDenseColumns) return "too many columns";
  }
  const int tile = schedule.tile;
  if (tile != kAuto && (tile < 0 || tile >= TileCount() || kTiles[tile].sparse != p.sparse())) {
    return "no such tile";
  }
  if (tile != kAuto && kTiles[tile].holds_zeros && !MakesMetadata(kTiles[tile], p)) {
    return "the tile needs groups of eight, and rows of zeros that are a multiple of 16";
  }
  return nullptr;
}

size_t StreamKBytes(const Plan& plan) {
  const Split& s = plan.split;
  if (s.stream_k_tiles == 0) return 0;
  return kCounterBytes + static_cast<size_t>(s.stream_k_tiles + s.stream_k_workers) *
                             s.groups_per_worker() * kTiles[plan.tile].partial_bytes;
}

int MetadataSlices(const Problem& p) {
  return p.sparse() ? 2 * CeilDiv(p.columns, kStepColumns) : 0;
}
size_t MetadataBytes(const Problem& p) {
  return static_cast<size_t>(CeilDiv(p.out, 64)) * MetadataSlices(p) * 1024;
}

bool MakesMetadata(const TileInfo& tile, const Problem& p) {
  // A tensor map's rows begin at multiples of 16 bytes.
  if (tile.holds_zeros) return p.group == 8 && p.groups() % 16 == 0;
  return tile.expands && p.group >= 6;
}

size_t WorkspaceBytes(const Problem& p, const Schedule& schedule, bool metadata_prepared,
                      int multiprocessors) {
  const Plan plan = MakePlan(p, schedule, metadata_prepared, multiprocessors);
  const TileInfo& tile = GetTile(plan.tile);
  const bool needs_metadata = !metadata_prepared && !MakesMetadata(tile, p);
  return (needs_metadata ? MetadataBytes(p) : 0) + StreamKBytes(plan);
}

}  // namespace slidejax::hopper

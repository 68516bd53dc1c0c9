// The parameters of a launch, and the work-tile scheduler. The scheduler decides which tiles of y a
// CTA group multiplies, in which order, and which steps of K.
//
// A CTA group is the CTAs that share X: one, two (a CTA pair) or four, stacked along the outputs. A
// cluster is usually one CTA group, but it can also hold several.
#pragma once

#include "common/dtype.h"
#include "hopper/ptx.cuh"
#include "hopper/tile.h"

namespace slidejax::hopper {

// A call whose CTA pairs share W is two launches. The primary one consists of 2x2 clusters, which
// do not fill the device. The secondary one fills the rest with CTA pairs: it begins when all CTAs
// of the primary one have begun, and ends after it (programmatic dependent launch).
enum LaunchRole { kSingle, kPrimary, kSecondary };

struct Params {
  // map_x_end has a smaller box, for the last tokens where M is no multiple of a CTA's share.
  CUtensorMap map_x, map_x_end, map_w, map_e, map_y;
  const uint8_t* zeros;  // [out, groups]; null: map_e describes the metadata
  uint32_t groups, windows, windows_reciprocal;  // ceil(2**32 / windows)
  const float* scale_x;
  const float* scale_w;
  const float* bias;
  const void* residual;  // [M, out] or null
  void* y;
  // [stream_k_tiles + stream_k_workers][CTAs][rows x tokens]: accumulators in register order.
  float* partials;
  // [stream_k_tiles][CTAs][warps], zero at the start. The low half counts the partial sums that are
  // in memory. The bits of the high half mark the reduction units left to the last arriver.
  unsigned long long* counters;
  int M, out;
  int steps;                    // of K: 256 columns of the product each, two slices
  int row_tiles, token_tiles;   // where CTA groups are paired, a token tile is that of a pair
  int token_group_tiles;        // token tiles of a token group, whose X fits in L2
  int wide_token_groups;        // the first token groups, which have one tile more
  int whole_tiles;              // the first tiles, of one CTA group each
  int stream_k_tiles;           // the tiles after them that stream_k_workers share along K;
                                // where CTA groups are paired, pairs of tiles
  int stream_k_workers;         // CTA groups, or pairs of them
  int cluster_groups;           // CTA groups of a cluster; if several, there are no stream_k_tiles
  int cluster_split_tiles;      // the tiles after whole_tiles whose K the CTA groups of a cluster
                                // divide, one tile for each cluster
  int first_group, cta_groups;  // the first CTA group of this launch, and all of the call
  int role;                     // LaunchRole
  int after_metadata;           // the launch before this call's makes the metadata
  DType result;                 // of y
  DType residual_type;          // bfloat16, float16 or float32
  int vector_stores;            // rows of y are 16-byte aligned
  int bulk_stores;              // y has a tensor map: it is bfloat16 with such rows

  // 1: CTA groups 2 n and 2 n + 1 multiply the same rows with the tokens of adjacent tiles; else 0.
  SJ_DEVICE int paired() const { return role != kSingle; }
};

// A CTA group's piece of work: steps [begin, end) of a tile; none if begin == end. `split` is
// kWholeTile for all steps of a tile, kSplitInCluster for a tile whose K the CTA groups of the
// cluster divide, else the tile's index among those that stream-K workers share.
inline constexpr int kWholeTile = -1, kSplitInCluster = -2;
struct WorkTile {
  int row_tile, token_tile, begin, end, split;
};

// The steps of all stream-K tiles are numbered, tile after tile. Worker w has the steps from
// FirstStep(w) on and before FirstStep(w + 1). WorkerOfStep is the inverse.
SJ_DEVICE int FirstStep(const Params& p, int worker) {
  return worker * (p.stream_k_tiles * p.steps) / p.stream_k_workers;
}
SJ_DEVICE int WorkerOfStep(const Params& p, int step) {
  return ((step + 1) * p.stream_k_workers - 1) / (p.stream_k_tiles * p.steps);
}

// Token tiles form token groups of nearly the same size, whose X fits in L2. All rows of W pass
// each group. If all groups but a small last one were equal, all of W would be read for its few
// tokens.
SJ_DEVICE void LocateTile(const Params& p, int tile, WorkTile& work) {
  const int member = tile & p.paired();
  tile >>= p.paired();
  const int wide = p.wide_token_groups * (p.token_group_tiles + 1);
  const int in_wide = wide * p.row_tiles;
  const bool is_wide = tile < in_wide;
  const int width = p.token_group_tiles + is_wide, per_group = width * p.row_tiles;
  const int from = is_wide ? 0 : wide;
  tile -= is_wide ? 0 : in_wide;
  const int group = tile / per_group, rest = tile - group * per_group;
  work.row_tile = rest / width;
  work.token_tile = ((from + group * width + rest - work.row_tile * width) << p.paired()) + member;
}

// The i-th piece of work of a CTA group.
SJ_DEVICE WorkTile GetWorkTile(const Params& p, int cta_group, int cta_groups, int i) {
  WorkTile work{0, 0, 0, 0, kWholeTile};
  int tile = cta_group + i * cta_groups;
  if (tile < p.whole_tiles) {
    work.end = p.steps;
  } else if (p.cluster_groups > 1) {  // whole_tiles is a multiple of cta_groups
    const int cluster = cta_group / p.cluster_groups;
    const int part = cta_group - cluster * p.cluster_groups;
    if (tile >= p.whole_tiles + cta_groups || cluster >= p.cluster_split_tiles) return work;
    tile = p.whole_tiles + cluster;
    work.begin = part * p.steps / p.cluster_groups;
    work.end = (part + 1) * p.steps / p.cluster_groups;
    work.split = kSplitInCluster;
  } else {
    const int worker = cta_group >> p.paired();
    if (worker >= p.stream_k_workers) return work;
    const int begin = FirstStep(p, worker), end = FirstStep(p, worker + 1);
    i -= p.whole_tiles / cta_groups;  // which divides whole_tiles where there are stream-K tiles
    work.split = begin / p.steps + i;
    tile = p.whole_tiles + (work.split << p.paired()) + (cta_group & p.paired());
    work.begin = max(begin - work.split * p.steps, 0);
    work.end = max(min(end - work.split * p.steps, p.steps), work.begin);
    if (work.end - work.begin == p.steps) work.split = kWholeTile;
  }
  LocateTile(p, tile, work);
  return work;
}

}  // namespace slidejax::hopper

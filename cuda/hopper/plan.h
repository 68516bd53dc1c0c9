// How a product is cut into tiles, and how the tiles fall on a device: the table of tiles, and the
// cost model that chooses one. This is host code, which needs no CUDA header, no nvcc and no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace slidejax::hopper {

// y [M, out] = lifted [M, columns] x W [out, columns]^T.
struct Problem {
  int32_t M, out;
  int32_t columns;  // K': lifted columns; with a dense weight K
  int32_t group;    // 2N of the pattern; 0: a dense weight

  bool sparse() const { return group != 0; }
  int groups() const { return columns / (2 * (group - 2)); }  // of a sparse weight
};

// How to run a product. The cost model chooses what is kAuto.
inline constexpr int32_t kAuto = -1;
struct Schedule {
  // An index into the table of tiles.
  int32_t tile = kAuto;
  // Token tiles whose X is kept in L2 while all of W passes.
  int32_t token_group = kAuto;
  // Workers that share the tiles of the last wave along K, through memory; 0: none.
  int32_t stream_k = kAuto;
  // CTA groups of a cluster that divide K of the last tiles; 1: K is not divided.
  int32_t cluster_split = kAuto;
  // 1: two CTA pairs with adjacent tokens share W by multicast; 0: they do not.
  int32_t share_w = kAuto;
};

// One way to cut y into pieces. A CTA computes `rows` outputs of `tokens` tokens. A CTA group is
// `ctas` of them, stacked along the outputs, which share the tokens.
struct TileInfo {
  const char* name;
  bool sparse, holds_zeros, expands, adds;  // Tile::kSparse, kHoldsZeros, kExpands, kAdds
  int rows, tokens, ctas, warp_groups;
  int threads, shared_bytes;                       // of a CTA
  int slab_tokens, slices_w;                       // Tile::kSlabTokens, Tile::kSlicesW
  int partial_bytes;                               // the accumulators of a CTA group
  uint32_t cluster_splits;                         // bit n: n CTA groups of a cluster can divide K
  float stage_clocks, tile_clocks, shared_w_time;  // tile.h says what they are

  bool SplitsInto(int parts) const { return cluster_splits >> parts & 1; }
};
int TileCount();
const TileInfo& GetTile(int index);

// How the tiles of y fall on CTA groups. The first `whole` tiles go to one CTA group each. The
// others are cut along K, through memory or within clusters.
struct Split {
  int whole = 0;
  int stream_k_tiles = 0, stream_k_workers = 0;
  int cluster_groups = 1;       // CTA groups in a cluster
  int cluster_split_tiles = 0;  // tiles that the groups of a cluster divide, one for each cluster
  int launched_groups = 0;      // all CTA groups, if cluster_groups > 1
  bool share_w = false;         // stream-K tiles are pairs of tiles, workers pairs of CTA groups
  float clocks = 0;

  int groups_per_worker() const { return share_w ? 2 : 1; }
};

// Most rows of x for which the cost model takes none but tiles that can add a residual.
inline constexpr int kResidualTokens = 256, kDenseResidualTokens = 64;  // of a dense weight

struct Plan {
  int tile = kAuto;
  int token_group = 0;
  Split split;
};

// Returns the cost model's choice on a device with that many multiprocessors. Where metadata is not
// prepared, the call makes it.
Plan MakePlan(const Problem& problem, const Schedule& schedule, bool metadata_prepared,
              int multiprocessors);

// Returns the best split for a tile on `cta_groups` CTA groups that run side by side.
Split SplitTiles(const TileInfo& tile, const Problem& problem, const Schedule& schedule,
                 int multiprocessors, int cta_groups);

// Returns how many CTA groups are expected to run side by side in clusters of `cluster_groups`.
int PlannedGroups(const TileInfo& tile, int multiprocessors, int cluster_groups);

// Tiles of a CTA group along the outputs; tiles of `paired_groups` CTA groups along the tokens;
// steps along K, of kStepColumns each (tile.h).
int RowTiles(const TileInfo& tile, const Problem& problem);
int TokenTiles(const TileInfo& tile, const Problem& problem, int paired_groups);
int Steps(const Problem& problem);

// Returns null if a problem can be run with a schedule, else what is wrong.
const char* Check(const Problem& problem, const Schedule& schedule);

// Bytes at the head of the workspace for the counters of stream-K.
inline constexpr size_t kCounterBytes = 16384;

// Bytes of stream-K's counters and partial sums; 0 where no tile is cut through memory.
size_t StreamKBytes(const Plan& plan);

// The 2:4 metadata in the kernel's order is [ceil(out / 64)][MetadataSlices][64 rows][4] words.
int MetadataSlices(const Problem& problem);
size_t MetadataBytes(const Problem& problem);  // 0 for a dense weight

// Whether the kernel of a tile makes the metadata by itself: in shared memory, where stages have
// room for the zeros of groups with two windows or more, or in registers, of groups of eight.
bool MakesMetadata(const TileInfo& tile, const Problem& problem);

// Bytes of workspace. Metadata that is not prepared is expanded into it, for tiles that do not make
// it by themselves.
size_t WorkspaceBytes(const Problem& problem, const Schedule& schedule, bool metadata_prepared,
                      int multiprocessors);

}  // namespace slidejax::hopper

// The cost models as C functions, which tests/cuda/test_plans.py calls. Only the host's C++
// compiler is needed to build them.
#include "decode/gemv_plan.h"
#include "decode/plan.h"
#include "decode/skinny_plan.h"
#include "hopper/plan.h"
#include "lift/geometry.h"

using namespace slidejax;

extern "C" {

// ---- decode/plan.h

int decode_most_rows(int value_bytes) { return decode::MostTokens(value_bytes); }
decode::Plan decode_plan(int windows, int value_bytes, int M, int out, int blocks, int row_bytes,
                         int multiprocessors, int shared_limit) {
  return decode::MakePlan({windows, value_bytes}, M, out, blocks, row_bytes, multiprocessors,
                          shared_limit);
}
int64_t decode_workspace(int windows, int value_bytes, int M, int blocks) {
  return decode::WorkspaceBytes({windows, value_bytes}, M, blocks);
}

int gemv_most_rows() { return decode::kGemvRows; }
int gemv_ring_bytes(int windows) { return decode::GemvShape{windows}.ring_bytes(); }
decode::GemvPlan gemv_plan(int windows, bool floats, int M, int rows, int blocks, int row_bytes,
                           int norm_bytes, int multiprocessors, int shared_limit) {
  return decode::MakeGemvPlan({windows}, floats, M, rows, blocks, row_bytes, norm_bytes,
                              multiprocessors, shared_limit);
}

int skinny_most_rows() { return decode::kSkinnyRows * decode::kSkinnyGroups; }
int skinny_ring_bytes(int windows) {
  const decode::Shape s{windows};
  return s.depth() * s.slot_bytes();
}
int64_t skinny_token_bytes(int windows, int steps) { return decode::TokenBytes({windows}, steps); }
decode::SkinnyPlan skinny_plan(int windows, bool floats, int M, int tiles, int blocks,
                               int row_bytes, int norm_bytes, int multiprocessors,
                               int shared_limit) {
  return decode::MakeSkinnyPlan({windows}, floats, M, tiles, blocks, row_bytes, norm_bytes,
                                multiprocessors, shared_limit);
}

// ---- hopper/plan.h

struct HopperPlan {
  const char* tile;
  int32_t rows, tokens, ctas;  // of the tile
  int32_t token_group, whole, stream_k_tiles, stream_k_workers, cluster_groups;
  int32_t cluster_split_tiles, share_w, makes_metadata;
  uint64_t workspace_bytes;
};
HopperPlan hopper_plan(const hopper::Problem& problem, const hopper::Schedule& schedule,
                       bool metadata_prepared, int multiprocessors) {
  const hopper::Plan plan = hopper::MakePlan(problem, schedule, metadata_prepared, multiprocessors);
  const hopper::TileInfo& t = hopper::GetTile(plan.tile);
  const hopper::Split& s = plan.split;
  return {t.name,
          t.rows,
          t.tokens,
          t.ctas,
          plan.token_group,
          s.whole,
          s.stream_k_tiles,
          s.stream_k_workers,
          s.cluster_groups,
          s.cluster_split_tiles,
          s.share_w,
          hopper::MakesMetadata(t, problem),
          hopper::WorkspaceBytes(problem, schedule, metadata_prepared, multiprocessors)};
}
int hopper_counters(const hopper::Problem& problem, bool metadata_prepared, int multiprocessors) {
  const hopper::Plan plan = hopper::MakePlan(problem, {}, metadata_prepared, multiprocessors);
  const hopper::TileInfo& t = hopper::GetTile(plan.tile);
  return plan.split.stream_k_tiles * plan.split.groups_per_worker() * t.ctas * t.warp_groups * 4;
}
uint64_t hopper_counter_bytes() { return hopper::kCounterBytes; }
uint64_t hopper_metadata_bytes(const hopper::Problem& problem) {
  return hopper::MetadataBytes(problem);
}
const char* hopper_check(const hopper::Problem& problem, const hopper::Schedule& schedule) {
  return hopper::Check(problem, schedule);
}

// ---- lift/geometry.h

lift::RingGeometry lift_geometry(const lift::RowShape& shape, int sources, int in_bytes,
                                 int out_bytes, const lift::DeviceLimits& device) {
  return lift::ChooseGeometry(shape, sources, in_bytes, out_bytes, device);
}
int lift_steps(int n) { return lift::StepsOf(n); }
int64_t lift_columns(int64_t columns, int group) { return lift::LiftedColumns(columns, group); }

}  // extern "C"

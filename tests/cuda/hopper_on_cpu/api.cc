// The kernel's host interface as C functions, which tests/hopper_emulator.py calls.
#include "hopper/hopper.h"

using namespace slidejax::hopper;

extern "C" {

int hopper_dtype(const char* name) { return static_cast<int>(slidejax::DTypeNamed(name).value()); }

int hopper_tile_count() { return TileCount(); }

struct TileShape {
  const char* name;
  int32_t rows, tokens, ctas;
};
TileShape hopper_tile(int index) {
  const TileInfo& t = GetTile(index);
  return {t.name, t.rows, t.tokens, t.ctas};
}

const char* hopper_check(const Args& args) { return Check(args); }
size_t hopper_metadata_bytes(const Problem& problem) { return MetadataBytes(problem); }
size_t hopper_workspace_bytes(const Args& args, int multiprocessors) {
  return WorkspaceBytes(args.problem, args.schedule, args.metadata != nullptr, multiprocessors);
}
int hopper_expand_metadata(const uint8_t* zeros, uint32_t* metadata, const Problem& problem) {
  return ExpandMetadata(zeros, metadata, problem, nullptr);
}
int hopper_before_lift(const Args& args, Counters& counters) {
  return BeforeLift(args, nullptr, &counters);
}
int hopper_sparse_matmul(const Args& args) { return SparseMatmul(args, nullptr); }

}  // extern "C"

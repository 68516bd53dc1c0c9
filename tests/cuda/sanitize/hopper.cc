#include "hopper/hopper.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "cases.h"
#include "lift/lift.h"

namespace slidejax::sanitize {
namespace {

using hopper::GetTile;
using hopper::kAuto;
using hopper::TileInfo;

// Tiles of which each way to split the work is a kernel of its own for --one.
constexpr const char* kEveryWay[] = {"64x32", "256x128", "dense 128x128"};
constexpr int kMultiprocessors = 132;  // of an H100 and an H200, for the size of the workspace

// A call, before its arrays are there.
struct Case {
  hopper::Problem problem;
  hopper::Schedule schedule;
  DType operand = DType::kS8, result = DType::kBF16;
  bool prepared = false, adds = false, bias = false;
};

// Fills in all arrays but the activations and y.
void TakeWeight(Memory& m, const Case& c, hopper::Args& a) {
  const hopper::Problem& p = c.problem;
  a.problem = p, a.schedule = c.schedule, a.operand = c.operand, a.result = c.result;
  const int64_t row = p.sparse() ? int64_t{p.groups()} * (p.group - 2) : p.columns;
  a.values = m.Codes(c.operand, p.out * row);
  if (p.sparse()) a.zeros = m.Zeros(int64_t{p.out} * p.groups(), p.group);
  a.scale_w = m.Scales(p.out);
  if (c.bias) a.bias = static_cast<float*>(m.Floats(DType::kF32, p.out));
  a.residual_type = c.result == DType::kS32 ? DType::kBF16 : c.result;
  if (c.adds) a.residual = m.Floats(a.residual_type, int64_t{p.M} * p.out);
  a.workspace_bytes = WorkspaceBytes(p, c.schedule, c.prepared, kMultiprocessors);
  a.workspace = m.Take(static_cast<int64_t>(a.workspace_bytes));
}

cudaError_t Multiply(Memory& m, cudaStream_t stream, const Case& c) {
  hopper::Args a = {};
  TakeWeight(m, c, a);
  const hopper::Problem& p = c.problem;
  a.lifted = m.Codes(c.operand, int64_t{p.M} * p.columns);
  a.scale_x = m.Scales(p.M);
  const bool bulk = c.result == DType::kBF16 && p.out % 8 == 0 && !c.adds;
  const int64_t count = int64_t{p.M} * p.out;
  a.y = bulk ? m.BulkResult(c.result, count) : m.Result(c.result, count);
  if (c.prepared) {
    const auto words = static_cast<int64_t>(MetadataBytes(p) / 4);
    auto* const metadata = static_cast<uint32_t*>(m.Result(DType::kS32, words));
    if (auto s = ExpandMetadata(a.zeros, metadata, p, stream)) return s;
    a.metadata = metadata;
  }
  if (hopper::Check(a) != nullptr) return cudaErrorInvalidValue;
  return SparseMatmul(a, stream);
}

// Layers one after another, each a lift and a product whose kernel may begin early: a norm, a gate
// of half as many columns, and the sum with the first input.
cudaError_t Chain(Memory& m, cudaStream_t stream, int M, int group, DType operand) {
  constexpr int kWidth = 200, kWide = 328;
  struct Stage {
    lift::Args lift;
    hopper::Args product;
  } stages[2] = {};
  const void* const x = m.Floats(DType::kBF16, int64_t{M} * kWidth);
  const void* input = x;
  for (int i = 0; i < 2; ++i) {
    const int columns = i == 0 ? kWidth : kWide, outputs = i == 0 ? 2 * kWide : kWidth;
    const int lifted_columns = group == 0 ? (columns + 31) / 32 * 32
                                          : static_cast<int>(lift::LiftedColumns(columns, group));
    Case c = {{M, outputs, lifted_columns, group}, {}};
    c.operand = operand;
    hopper::Args& product = stages[i].product;
    TakeWeight(m, c, product);
    if (i == 1) product.residual = x;
    product.y = m.BulkResult(DType::kBF16, int64_t{M} * outputs);
    product.after_lift = true;
    lift::Args& lift = stages[i].lift;
    lift.x = input, lift.x_type = DType::kBF16, lift.rows = M, lift.columns = columns;
    lift.x_stride = i == 0 ? columns : 2 * columns, lift.group = group;
    lift.lifted_columns = lifted_columns, lift.lifted_type = operand;
    lift.lifted = m.Result(operand, int64_t{M} * lifted_columns);
    lift.scale = m.ScaleResult(M);
    lift.behind = i > 0;
    if (i == 0) {
      lift.prologue = lift::PrologueKind::kRmsNorm, lift.eps = 1e-5f;
      lift.weight = static_cast<float*>(m.Floats(DType::kF32, columns));
    } else {
      lift.prologue = lift::PrologueKind::kGlu;
      lift.up = static_cast<const char*>(input) + 2 * int64_t{columns};
    }
    product.lifted = lift.lifted, product.scale_x = lift.scale;
    if (hopper::Check(product) != nullptr) return cudaErrorInvalidValue;
    input = product.y;
  }
  for (Stage& stage : stages) {
    hopper::Counters counters = {};
    if (auto s = BeforeLift(stage.product, stream, &counters)) return s;
    stage.lift.counters = counters.first, stage.lift.counter_count = counters.count;
  }
  for (const Stage& stage : stages) {
    if (auto s = lift::LiftQuantize(stage.lift, stream)) return s;
    if (auto s = SparseMatmul(stage.product, stream)) return s;
  }
  return cudaSuccess;
}

// What a tile can do, one case each. M, out and K are a little more than whole tiles.
void TileCases(Runner& run, int index) {
  const TileInfo& t = GetTile(index);
  const bool every_way = std::any_of(std::begin(kEveryWay), std::end(kEveryWay),
                                     [&](const char* name) { return name == std::string(t.name); });
  const auto one = [&](const std::string& details, Case c) {
    c.schedule.tile = index;
    for (const DType operand : kCodes) {
      if (c.result == DType::kS32 && operand != DType::kS8) continue;
      c.operand = operand;
      const hopper::Problem& p = c.problem;
      run(std::string("hopper ") + t.name + (every_way ? ", " + details : ""),
          details + ", " + Name(operand) + " to " + Name(c.result) + ", group " +
              std::to_string(p.group) + ", [" + std::to_string(p.M) + ", " +
              std::to_string(p.columns) + "] to " + std::to_string(p.out),
          [c](Memory& m, cudaStream_t stream) { return Multiply(m, stream, c); });
    }
  };
  // Groups of eight, 80 of them: 960 columns are three steps of 256 and a part of one.
  const int group = t.sparse ? 8 : 0, columns = 960;
  const int M = t.tokens + 1, out = t.rows * t.ctas + 5;
  const bool prepared = t.sparse && !t.holds_zeros;
  Case c = {{M, out, columns, group}, {}};
  c.schedule.stream_k = 0, c.schedule.cluster_split = 1, c.schedule.share_w = 0;
  c.prepared = prepared;
  one("whole tiles", c);
  c.problem.out += 3, c.bias = true;  // rows of y are whole lines of 16 bytes
  one("bulk stores, bias", c);
  c.result = DType::kF32;
  one("vector stores", c);
  c.result = DType::kS32, c.bias = false;
  one("sums", c);
  c.result = DType::kF16;
  if (prepared) {
    c.prepared = false;
    one("nothing prepared", c);
    c.prepared = true;
  }
  const int tiles = RowTiles(t, c.problem) * TokenTiles(t, c.problem, 1);
  c.schedule.stream_k = 2 * tiles + 1;
  one("stream-K", c);
  c.prepared = false;
  one("stream-K, nothing prepared", c);
  c.prepared = prepared, c.schedule.stream_k = 0;
  for (const int parts : {2, 3, 4}) {
    if (!t.SplitsInto(parts)) continue;
    c.schedule.cluster_split = parts;
    one("K split in clusters of " + std::to_string(parts), c);
  }
  c.schedule.cluster_split = 1;
  if (t.ctas == 2) {
    c.problem.M = 2 * t.tokens + 1, c.schedule.share_w = 1;
    one("W shared", c);
    c.schedule.stream_k = kAuto;
    one("W shared, split by the cost model", c);
    c.schedule.stream_k = 0, c.schedule.share_w = 0, c.problem.M = M;
  }
  if (t.adds) {
    c.problem.M = std::min(M, t.sparse ? hopper::kResidualTokens : hopper::kDenseResidualTokens);
    c.adds = true;
    one("residual", c);
    c.problem.out -= 3, c.result = DType::kBF16;
    one("residual, odd outputs", c);
  }
}

}  // namespace

void HopperCases(Runner& run) {
  for (int index = 0; index < hopper::TileCount(); ++index) TileCases(run, index);
  // Every group in the tile that the cost model takes, from one row on.
  for (const int group : {0, 4, 6, 8, 10, 12, 14, 16}) {
    for (const int M : {1, 17, 40, 100, 200, 300}) {
      for (const bool prepared : {false, true}) {
        if (prepared && group == 0) continue;
        Case c = {{M, 77, group == 0 ? 352 : 5 * 16 * (group - 2), group}, {}};
        c.prepared = prepared, c.operand = kCodes[M % 2], c.bias = true;
        run(std::string("hopper auto") + (prepared ? " prepared" : ""),
            "group " + std::to_string(group) + ", " + std::to_string(M) + " rows",
            [c](Memory& m, cudaStream_t stream) { return Multiply(m, stream, c); });
      }
    }
  }
  for (const int group : {0, 6, 8}) {
    for (const int M : {5, 16, 33, 64, 130, 256}) {
      if (group == 0 && M > hopper::kDenseResidualTokens) continue;
      for (const DType operand : kCodes) {
        run("hopper chain",
            std::string(Name(operand)) + ", group " + std::to_string(group) + ", " +
                std::to_string(M) + " rows",
            [=](Memory& m, cudaStream_t stream) { return Chain(m, stream, M, group, operand); });
      }
    }
  }
}

}  // namespace slidejax::sanitize

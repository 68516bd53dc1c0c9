#include "lift/lift.h"

#include <iterator>

#include "cases.h"

namespace slidejax::sanitize {
namespace {

using lift::Activation;
using lift::PrologueKind;

// One row, rows that are not aligned, more rows than an H100 has multiprocessors.
struct Shape {
  int64_t rows, columns;
};
constexpr Shape kShapes[] = {{1, 7}, {3, 64}, {2, 130}, {5, 1000}, {140, 96}, {1, 1}, {133, 36}};
constexpr DType kLifted[] = {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16, DType::kF32};
constexpr int kGroups[] = {0, 4, 6, 8, 10, 12, 14, 16};
constexpr const char* kPrologues[] = {"none", "rms_norm", "layer_norm", "activation", "glu"};

lift::Args ArgsOf(Memory& m, DType x, DType lifted, int group, Shape s,
                  PrologueKind prologue = PrologueKind::kNone) {
  lift::Args a = {};
  // A gate and the other factor lie side by side in a row.
  const bool glu = prologue == PrologueKind::kGlu;
  a.x_stride = (glu ? 2 : 1) * s.columns;
  a.x = m.Pieces(x, s.rows * a.x_stride), a.x_type = x;
  a.rows = s.rows, a.columns = s.columns;
  a.group = group;
  a.lifted_columns = group == 0 ? s.columns + 5 : lift::LiftedColumns(s.columns, group);
  a.lifted = m.Result(lifted, a.rows * a.lifted_columns), a.lifted_type = lifted;
  a.scale = m.ScaleResult(a.rows);
  a.prologue = prologue;
  if (glu) a.up = static_cast<const char*>(a.x) + s.columns * static_cast<int64_t>(Bytes(x));
  if (prologue == PrologueKind::kRmsNorm || prologue == PrologueKind::kLayerNorm) {
    a.weight = static_cast<float*>(m.Floats(DType::kF32, s.columns));
    a.eps = 1e-5f;
  }
  if (prologue == PrologueKind::kLayerNorm)
    a.bias = static_cast<float*>(m.Floats(DType::kF32, s.columns));
  return a;
}

std::string Details(const lift::Args& a) {
  return std::string(Name(a.x_type)) + " to " + Name(a.lifted_type) + ", group " +
         std::to_string(a.group) + ", [" + std::to_string(a.rows) + ", " +
         std::to_string(a.columns) + "]";
}

// Runs a case: the arguments, and what changes in them.
template <typename Change>
void Lift(Runner& run, const std::string& kernel, DType x, DType lifted, int group, Shape s,
          PrologueKind prologue, const std::string& more, const Change& change) {
  lift::Args described = {};
  described.x_type = x, described.lifted_type = lifted, described.group = group;
  described.rows = s.rows, described.columns = s.columns;
  run("lift " + kernel, Details(described) + more, [=](Memory& m, cudaStream_t stream) {
    lift::Args a = ArgsOf(m, x, lifted, group, s, prologue);
    change(m, a);
    return lift::LiftQuantize(a, stream);
  });
}
void Lift(Runner& run, const std::string& kernel, DType x, DType lifted, int group, Shape s,
          PrologueKind prologue = PrologueKind::kNone) {
  Lift(run, kernel, x, lifted, group, s, prologue, "", [](Memory&, lift::Args&) {});
}

}  // namespace

void LiftCases(Runner& run) {
  int turn = 0;
  const auto next = [&] { return kShapes[turn++ % std::size(kShapes)]; };
  for (const DType x : kFloats) {
    for (const DType lifted : kLifted) {
      const std::string kernel = Bytes(lifted) == 1 ? "rows" : "cast";
      for (const int group : kGroups) Lift(run, kernel, x, lifted, group, next());
      Lift(run, kernel, x, lifted, 8, {140, 1032});
    }
    for (const DType lifted : kCodes) {
      Lift(run, "absmax", x, lifted, 8, {3, 130}, PrologueKind::kNone, ", absmax given",
           [](Memory& m, lift::Args& a) { a.absmax = m.Scales(a.rows); });
      // A row that shared memory does not hold.
      Lift(run, "long", x, lifted, 6, {1, 120007});
    }
  }
  for (const DType x : kFloats) {
    for (const DType lifted : kCodes) {
      for (int prologue = 1; prologue < 5; ++prologue) {
        for (const int group : {0, 6, 8}) {
          Lift(run, kPrologues[prologue], x, lifted, group, next(),
               static_cast<PrologueKind>(prologue), "",
               [&](Memory&, lift::Args& a) { a.activation = static_cast<Activation>(turn % 4); });
        }
        Lift(run, kPrologues[prologue], x, lifted, 8, {140, 520},
             static_cast<PrologueKind>(prologue));
      }
    }
  }
  // Behind another launch, whose counters it clears.
  run("lift behind", "a gate behind a norm", [](Memory& m, cudaStream_t stream) {
    constexpr int kCounters = 37;
    lift::Args first = ArgsOf(m, DType::kBF16, DType::kS8, 8, {5, 200}, PrologueKind::kRmsNorm);
    lift::Args second = ArgsOf(m, DType::kBF16, DType::kS8, 8, {5, 200}, PrologueKind::kGlu);
    second.counters = static_cast<unsigned long long*>(m.Result(DType::kF32, 2 * kCounters));
    second.counter_count = kCounters, second.behind = true;
    if (auto s = lift::LiftQuantize(first, stream)) return s;
    return lift::LiftQuantize(second, stream);
  });
}

}  // namespace slidejax::sanitize

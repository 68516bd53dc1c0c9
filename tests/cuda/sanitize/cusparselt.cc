// The kernels around cuSPARSELt. The library itself takes no part, so the order of the compressed
// form is one of its kind, made here.
#include "cases.h"
#include "common/integers.h"
#include "cusparselt/helpers.h"
#include "cusparselt/pack.h"

namespace slidejax::sanitize {
namespace {

constexpr DType kTypes[] = {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16};
constexpr int64_t kOutputs = 37, kPaddedOutputs = 64;

cudaError_t Expand(Memory& m, cudaStream_t stream, DType type, int group, int64_t groups) {
  cusparselt::ExpandArgs a = {};
  a.values = m.Codes(type, kOutputs * groups * (group - 2)), a.type = type;
  a.zeros = m.Zeros(kOutputs * groups, group);
  a.outputs = kOutputs, a.padded_outputs = kPaddedOutputs, a.groups = groups, a.group = group;
  a.lifted = m.Result(type, kPaddedOutputs * groups * (group / 2 - 1) * 4);
  return cusparselt::ExpandLifted(a, stream);
}

// The nibbles of a row side by side, one row after another.
cusparselt::Layout RowByRow(int64_t windows) {
  cusparselt::Layout layout = {};
  for (int bit = 0; bit < cusparselt::Layout::kBits; ++bit) {
    layout.of_window[bit] = int64_t{1} << bit;
    layout.of_row[bit] = windows << bit;
  }
  layout.run = cusparselt::RunOf(layout);
  return layout;
}

cudaError_t Pack(Memory& m, cudaStream_t stream, DType type, int group, int64_t groups, int run) {
  cusparselt::PackArgs a = {};
  const int64_t windows = groups * (group / 2 - 1);
  const int64_t values = kPaddedOutputs * groups * (group - 2) * static_cast<int64_t>(Bytes(type));
  a.values = m.Codes(type, kOutputs * groups * (group - 2)), a.type = type;
  a.zeros = m.Zeros(kOutputs * groups, group);
  a.compressed_bytes = values + kPaddedOutputs * windows / 2 + 16;
  a.compressed = m.Result(DType::kS8, a.compressed_bytes);
  a.outputs = kOutputs, a.padded_outputs = kPaddedOutputs, a.groups = groups, a.group = group;
  a.layout = RowByRow(windows);
  if (run > 0) a.layout.run = run;
  return cusparselt::PackCompressed(a, stream);
}

cudaError_t Finish(Memory& m, cudaStream_t stream, DType accumulator, DType y, int64_t rows,
                   int64_t outputs, bool adds) {
  cusparselt::DequantizeArgs a = {};
  a.rows = rows, a.outputs = outputs, a.pitch = RoundUp<int64_t>(outputs, 8);
  a.accumulator_type = accumulator;
  a.accumulators = accumulator == DType::kS32 ? m.Codes(DType::kS8, rows * a.pitch * 4)
                                              : m.Floats(accumulator, rows * a.pitch);
  a.scale_x = m.Scales(rows), a.scale_w = m.Scales(outputs);
  if (adds) {
    a.bias = static_cast<float*>(m.Floats(DType::kF32, outputs));
    a.residual = m.Floats(y, rows * outputs), a.residual_type = y;
    a.most_blocks = 3;
  }
  a.y = m.Result(y, rows * outputs), a.y_type = y;
  return cusparselt::Dequantize(a, stream);
}

cudaError_t ScaleRows(Memory& m, cudaStream_t stream, DType y) {
  cusparselt::DequantizeArgs a = {};
  a.rows = 19, a.outputs = a.pitch = 40;
  a.accumulators = a.y = m.Changed(m.Floats(y, a.rows * a.outputs), y, a.rows * a.outputs);
  a.accumulator_type = a.y_type = y, a.scale_x = m.Scales(a.rows);
  return cusparselt::Dequantize(a, stream);
}

// What the search and the learning of the order fill arrays with.
cudaError_t Fill(Memory& m, cudaStream_t stream, DType type) {
  constexpr int64_t kGroups = 1003;
  void* const random = m.Result(type, 4 * kGroups);
  if (auto s = cusparselt::FillRandom(type, random, 4 * kGroups, true, stream)) return s;
  void* const values = m.Result(type, 2 * kGroups);
  auto* const zeros = static_cast<uint8_t*>(m.Result(DType::kS8, kGroups));
  if (auto s = cusparselt::FillPacked(type, values, zeros, kGroups, stream)) return s;
  void* const windows = m.Result(type, 4 * kGroups);
  if (auto s = cusparselt::FillWindows(type, windows, kGroups, true, stream)) return s;
  auto* const found =
      static_cast<cusparselt::Difference*>(m.Result(DType::kS8, sizeof(cusparselt::Difference)));
  return cusparselt::Compare(random, windows, 4 * kGroups, found, stream);
}

}  // namespace

void CusparseltCases(Runner& run) {
  for (const DType type : kTypes) {
    const std::string of = std::string(" of ") + Name(type);
    for (const int group : {4, 6, 8, 14, 16}) {
      for (const int64_t groups : {8, 24}) {
        const std::string details =
            "group " + std::to_string(group) + ", " + std::to_string(groups) + " groups" + of;
        run("cusparselt expand", details,
            [=](Memory& m, cudaStream_t stream) { return Expand(m, stream, type, group, groups); });
        for (const int pieces : {0, 1, 2, 4}) {
          run("cusparselt pack", details + ", run " + std::to_string(pieces),
              [=](Memory& m, cudaStream_t stream) {
                return Pack(m, stream, type, group, groups, pieces);
              });
        }
      }
    }
    run("cusparselt fill", of.substr(1),
        [=](Memory& m, cudaStream_t stream) { return Fill(m, stream, type); });
  }
  for (const DType y : kFloats) {
    for (const DType accumulator : {DType::kS32, DType::kF32, DType::kBF16, DType::kF16}) {
      const std::string types = std::string(Name(accumulator)) + " to " + Name(y);
      for (const int64_t outputs : {1, 40, 259}) {
        for (const int64_t rows : {1, 35}) {
          run("cusparselt finish",
              types + ", [" + std::to_string(rows) + ", " + std::to_string(outputs) + "]",
              [=](Memory& m, cudaStream_t stream) {
                return Finish(m, stream, accumulator, y, rows, outputs, rows > 1);
              });
        }
      }
    }
    run("cusparselt scale rows", Name(y),
        [=](Memory& m, cudaStream_t stream) { return ScaleRows(m, stream, y); });
  }
}

}  // namespace slidejax::sanitize

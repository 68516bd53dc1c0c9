// Activation lifting fused with dynamic quantisation: the kernel's host interface (docs/design.md,
// section 1).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace slidejax {

// What is computed on x before it is quantised; the numbers are those of the attributes in
// slidejax/ops/cuda/prologues.py.
enum class PrologueKind : int {
  kNone = 0,
  kRmsNorm = 1,
  kLayerNorm = 2,
  kActivation = 3,
  kGlu = 4
};
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

struct LiftArgs {
  const void* x;        // [rows, columns], row-major, 16-byte aligned base
  DType x_type;         // bfloat16, float16 or float32
  const float* absmax;  // [rows]: largest |x| of each row, when the row is split over devices;
                        // nullptr: found here
  void* lifted;         // [rows, lifted_columns], row-major, 16-byte aligned base
  DType lifted_type;    // int8, float8_e4m3fn (quantised) or bfloat16, float16, float32 (cast)
  float* scale;         // [rows]
  int64_t rows;
  int64_t columns;
  int64_t lifted_columns;
  int group;  // 2N in 4..16; 0: quantise only, columns copied and zero-padded to lifted_columns
  // A prologue other than kNone needs an 8-bit lifted_type and no absmax.
  PrologueKind prologue;
  Activation activation;  // of kActivation and kGlu
  const void* up;         // kGlu: like x
  const float* weight;    // norms: [columns], 16-byte aligned
  const float* bias;      // kLayerNorm: [columns], 16-byte aligned, or nullptr
  float eps;              // norms
  // 64-bit words that the kernel sets to zero, for the one that is launched to follow it and to
  // begin before it has ended.
  unsigned long long* counters;
  int counter_count;
};

// Columns that lifting `columns` columns gives: whole blocks of 8 groups, four for each of a
// group's N-1 windows.
inline int64_t LiftedColumns(int64_t columns, int group) {
  const int64_t groups = (columns + 8 * group - 1) / (8 * group) * 8;
  return groups * (group / 2 - 1) * 4;
}

// Largest number of columns that the kernel's 32-bit arithmetic within a row takes.
inline constexpr int64_t kMaxColumns = int64_t{1} << 26;
// Bytes of a row of x (of x and up together) with which a prologue runs on every GPU.
inline constexpr int64_t kMaxFusedBytes = 64 * 1024;

// Launches the kernel on `stream`. The caller has checked shapes and dtypes. Allocates nothing;
// returns the launch status: cudaErrorInvalidConfiguration where a prologue's row does not fit in
// shared memory (kMaxFusedBytes is what every GPU takes).
cudaError_t LiftQuantize(const LiftArgs& args, cudaStream_t stream);

}  // namespace slidejax

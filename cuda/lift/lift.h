// Activation lifting fused with dynamic quantisation: the kernels' host interface. The formulas are
// in docs/contract.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "common/dtype.h"
#include "lift/geometry.h"

namespace slidejax::lift {

// The computations on x before it is quantised. Python passes the names as attributes.
enum class PrologueKind : int { kNone, kRmsNorm, kLayerNorm, kActivation, kGlu };
enum class Activation : int { kSilu, kGelu, kGeluTanh, kRelu };

inline std::optional<PrologueKind> PrologueOf(std::string_view name) {
  constexpr std::string_view kNames[] = {"none", "rms_norm", "layer_norm", "activation", "glu"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<PrologueKind>(i);
  }
  return std::nullopt;
}
inline std::optional<Activation> ActivationOf(std::string_view name) {
  constexpr std::string_view kNames[] = {"silu", "gelu", "gelu_tanh", "relu"};
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  return std::nullopt;
}

struct Args {
  // [rows, columns], row-major, 16-byte aligned base. It is read in whole pieces of 16 bytes, so
  // memory behind it must be readable to the next multiple of 16.
  const void* x;
  DType x_type;         // bfloat16, float16 or float32
  const float* absmax;  // [rows]: largest |x| of each row, where the row is split over devices;
                        // nullptr: the kernel finds it
  void* lifted;         // [rows, lifted_columns], row-major, 16-byte aligned base
  DType lifted_type;    // int8, float8_e4m3fn (quantised) or bfloat16, float16, float32 (cast)
  float* scale;         // [rows]
  int64_t rows;
  int64_t columns;
  int64_t x_stride;  // elements from a row of x, and of up, to the next
  int64_t lifted_columns;
  int group;  // 2N, 4 to 16; 0: quantise only, columns copied and zero-padded to lifted_columns
  // A prologue other than kNone needs an 8-bit lifted_type and no absmax.
  PrologueKind prologue;
  Activation activation;  // of kActivation and kGlu
  const void* up;         // kGlu: like x
  const float* weight;    // norms: [columns], 16-byte aligned
  const float* bias;      // kLayerNorm: [columns], 16-byte aligned, or nullptr
  float eps;              // norms
  // 64-bit words that the kernel sets to zero, for a kernel that is launched to follow it and to
  // begin before it has ended.
  unsigned long long* counters;
  int counter_count;
  // The launch ahead may still run and write what this one reads, but no weight or bias of a norm.
  // Where a row fits in shared memory, this one begins early and waits for it (Hopper and later).
  bool behind;
};

// The largest number of columns that the kernels' 32-bit arithmetic within a row takes.
inline constexpr int64_t kMaxColumns = int64_t{1} << 26;

// Launches the kernel on `stream`. The caller has checked shapes and dtypes. Allocates nothing;
// returns the launch status, which is cudaErrorInvalidConfiguration where a prologue's row does not
// fit in shared memory.
cudaError_t LiftQuantize(const Args& args, cudaStream_t stream);

}  // namespace slidejax::lift

// Cases that launch the kernels of cuda/ under compute-sanitizer, without JAX: their device memory,
// and the list that runs them (main.cc).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace slidejax::sanitize {

// The device memory of one case. Every array is an allocation of its own and as long as the kernel
// may use it, so that memcheck sees the first byte beyond. It is filled from the host, which
// initcheck follows.
class Memory {
 public:
  explicit Memory(uint32_t seed) : random_(seed) {}
  ~Memory();
  Memory(const Memory&) = delete;

  void* Take(int64_t bytes);                // holds nothing yet
  void* Codes(DType type, int64_t count);   // finite values of any size
  void* Floats(DType type, int64_t count);  // about 1
  // The same, and behind it what fills up 16 bytes, which a lift reads as a whole.
  void* Pieces(DType type, int64_t count);
  float* Scales(int64_t count);               // positive, about 0.01
  uint8_t* Zeros(int64_t groups, int group);  // z1 | z2 << 4
  int32_t* Integers(const std::vector<int32_t>& numbers);

  // What the case writes. Check reads all of it back.
  void* Result(DType type, int64_t count);
  float* ScaleResult(int64_t count) { return static_cast<float*>(Result(DType::kF32, count)); }
  // The same, of zeros at first: for bulk copies out of shared memory, which initcheck does not
  // see.
  void* BulkResult(DType type, int64_t count);
  // The same for an array that is there before, and is changed in its place.
  void* Changed(void* array, DType type, int64_t count);

  // Returns what is wrong with the results, or "". `hash` becomes a number of all their bytes, by
  // which runs can be compared.
  std::string Check(uint64_t* hash);

 private:
  void* Copy(const void* bytes, int64_t count);

  struct Written {
    void* array;
    DType type;
    int64_t count;
  };
  std::mt19937 random_;
  std::vector<void*> all_;
  std::vector<Written> results_;
};

// Runs cases and prints a line for each.
class Runner {
 public:
  // What to run: the kernels whose names begin with `prefix`; with `one` a single case for each; of
  // those cases every `parts`-th from number `part` on.
  struct Choice {
    std::string prefix;
    bool one = false;
    int part = 0, parts = 1;
  };
  explicit Runner(Choice choice) : choice_(std::move(choice)) {}

  using Launch = std::function<cudaError_t(Memory&, cudaStream_t)>;
  // kernel: which one, in words. details: what the case is.
  void operator()(const std::string& kernel, const std::string& details, const Launch& launch);

  int cases() const { return cases_; }
  int failures() const { return failures_; }

 private:
  const Choice choice_;
  std::set<std::string> seen_;
  int chosen_ = 0, cases_ = 0, failures_ = 0;
};

// Element types of x and of results.
inline constexpr DType kFloats[] = {DType::kBF16, DType::kF16, DType::kF32};
// Of weights of eight bits.
inline constexpr DType kCodes[] = {DType::kS8, DType::kE4M3};

// The cases of each folder of cuda/.
void LiftCases(Runner& run);
void DecodeCases(Runner& run);
void HopperCases(Runner& run);
void AttentionCases(Runner& run);
void CusparseltCases(Runner& run);
// Kernels with a fault each, which the tools must find.
void PlantedCases(Runner& run);

}  // namespace slidejax::sanitize

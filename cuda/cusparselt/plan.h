// cuSPARSELt plans: D[tokens, outputs] = X[tokens, columns] * W[outputs, columns]^T with W in the
// library's compressed 2:4 form.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/integers.h"
#include "cusparselt/api.h"

namespace slidejax::cusparselt {

// Says what went wrong, with the sizes. Handlers turn it into an FFI error, the Python module into
// an exception.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void CheckCuda(cudaError_t status, const std::string& context);  // throws Failure

// How a problem is computed. Ids of algorithms change with the library's release.
struct Choice {
  int algorithm = -1;  // one of the library's kernels; -1: its default
  int split_k = 1;
  int split_k_mode = 0;  // of split_k > 1
  int parts = 1;         // the tokens are cut into this many products (see product.h)
  int beside = 1;        // of several parts: finish one beside the next, or 0: before the next
};

struct Problem {
  DType operand;    // int8, float8_e4m3fn, bfloat16, float16
  DType result;     // of D: the sums, rounded to it where it has 16 bits
  int64_t outputs;  // a multiple of Multiple(operand)
  int64_t tokens;   // likewise
  int64_t columns;  // K', a multiple of 32
  Choice choice;

  auto Key() const {
    return std::tuple(operand, result, outputs, tokens, columns, choice.algorithm, choice.split_k,
                      choice.split_k_mode, choice.parts, choice.beside);
  }
  std::string Describe() const;
};

// Outputs and tokens must be multiples of this.
inline constexpr int64_t Multiple(DType operand) { return Bytes(operand) == 1 ? 32 : 16; }

// A plan of one call of the library, for all tokens of its problem. It cannot be moved, because
// the library's structs point at each other. Its device must be current when it is made and when it
// is used. Running it changes nothing in it, so that threads and streams may share it.
class Plan {
 public:
  explicit Plan(const Problem& problem);  // throws Failure
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  size_t workspace_bytes() const { return workspace_bytes_; }
  const Problem& problem() const { return problem_; }

  // Throws Failure.
  void Run(const void* compressed, const void* x, void* d, void* workspace,
           cudaStream_t stream) const;

  // Returns the number of algorithms that the library has for this problem.
  int AlgorithmCount() const;

 private:
  Problem problem_;
  const Api& api_;
  const Handle* handle_;
  MatDescriptor w_, x_, d_;
  MatmulDescriptor matmul_;
  AlgSelection selection_;
  MatmulPlan plan_;
  size_t workspace_bytes_ = 0;
  std::vector<std::function<void()>> cleanup_;
};

struct CompressedSize {
  size_t compressed;  // bytes of the compressed form
  size_t buffer;      // bytes of scratch that compressing takes
};

// Throws Failure. `outputs` is rounded up to Multiple(operand).
CompressedSize SizeOfCompressed(DType operand, int64_t outputs, int64_t columns);

// Compresses a dense 2:4 matrix [outputs rounded up, columns]. Throws Failure.
void Compress(DType operand, int64_t outputs, int64_t columns, const void* dense, void* compressed,
              void* buffer, cudaStream_t stream);

}  // namespace slidejax::cusparselt

// A product as a call runs it: cuSPARSELt's kernel, and behind it slidejax's own, which applies the
// scales and the bias.
//
// The library's epilogue knows no scale of a token, so the results are read and written once more.
// The tokens can be cut into parts to make that cheaper. A part is finished by a few
// multiprocessors, on a stream of its own, while the next part is multiplied. Or it is finished
// before the next part, while the L2 cache still holds it. The search decides by time (tune.h).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cusparselt/helpers.h"
#include "cusparselt/plan.h"

namespace slidejax::cusparselt {

// Like a plan it belongs to one device, and threads and streams may share it.
class Product {
 public:
  explicit Product(const Problem& problem);  // throws Failure
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  size_t workspace_bytes() const { return workspace_bytes_; }

  // Multiplies x [tokens, columns] into d [tokens, outputs], then runs `finish`, if there is one,
  // whose accumulators are d. Its rows are at most the tokens. Throws Failure.
  void Run(const void* compressed, const void* x, void* d, void* workspace,
           const DequantizeArgs* finish, cudaStream_t stream) const;

 private:
  Problem problem_;
  int64_t part_tokens_;                       // of every part but the last
  std::vector<std::unique_ptr<Plan>> plans_;  // of a part, and of the last one where it differs
  size_t workspace_bytes_ = 0;
  // With several parts, the stream that finishes, and an event for each part that is multiplied and
  // for all that are finished. Calls of several threads share them.
  struct Destroy {
    void operator()(CUstream_st* stream) const { cudaStreamDestroy(stream); }
    void operator()(CUevent_st* event) const { cudaEventDestroy(event); }
  };
  int most_blocks_ = 0;
  std::unique_ptr<CUstream_st, Destroy> beside_;
  std::vector<std::unique_ptr<CUevent_st, Destroy>> events_;
  mutable std::mutex mutex_;
};

}  // namespace slidejax::cusparselt

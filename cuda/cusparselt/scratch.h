// Device memory, a stream and a clock, outside of XLA, for what is found out before a program runs.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "cusparselt/helpers.h"
#include "cusparselt/plan.h"

namespace slidejax::cusparselt {

// Every function throws Failure. Memory is freed at the end, when the stream's work is done.
class Scratch {
 public:
  explicit Scratch(std::string context) : context_(std::move(context)) {
    CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), context_);
    for (cudaEvent_t& event : events_) CheckCuda(cudaEventCreate(&event), context_);
  }
  ~Scratch() {
    cudaStreamSynchronize(stream);
    for (void* memory : memory_) cudaFree(memory);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
    cudaStreamDestroy(stream);
  }
  Scratch(const Scratch&) = delete;

  void* Allocate(size_t bytes) {
    void* memory = nullptr;
    CheckCuda(cudaMalloc(&memory, std::max<size_t>(bytes, 256)),
              "allocating " + std::to_string(bytes) + " bytes for " + context_);
    memory_.push_back(memory);
    return memory;
  }

  // Random elements of a dtype. With `two_of_four`, two of each four are zero.
  void* Random(DType type, int64_t count, bool two_of_four) {
    void* memory = Allocate(count * Bytes(type));
    CheckCuda(FillRandom(type, memory, count, two_of_four, stream), "filling " + context_);
    return memory;
  }

  void Wait() { CheckCuda(cudaStreamSynchronize(stream), context_); }

  // Returns the microseconds of a run, as the mean of `repeats`.
  template <typename F>
  double Time(int repeats, const F& run) {
    CheckCuda(cudaEventRecord(events_[0], stream), context_);
    for (int i = 0; i < repeats; ++i) run();
    CheckCuda(cudaEventRecord(events_[1], stream), context_);
    CheckCuda(cudaEventSynchronize(events_[1]), context_);
    float milliseconds = 0;
    CheckCuda(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]), context_);
    return 1e3 * milliseconds / repeats;
  }

  cudaStream_t stream = nullptr;

 private:
  std::string context_;
  cudaEvent_t events_[2] = {};
  std::vector<void*> memory_;
};

}  // namespace slidejax::cusparselt

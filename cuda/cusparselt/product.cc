#include "cusparselt/product.h"

#include <algorithm>
#include <string>

namespace slidejax::cusparselt {
namespace {

constexpr int64_t kPartMultiple = 256;  // tokens of a part: whole tiles of the library's kernels
// The share of the multiprocessors that finish a part beside a product, and the thread blocks that
// fill one of them.
constexpr int kShare = 4, kBlocksOfMultiprocessor = 3;

const char* At(const void* data, int64_t elements, DType type) {
  return static_cast<const char*>(data) + elements * static_cast<int64_t>(Bytes(type));
}
char* At(void* data, int64_t elements, DType type) {
  return static_cast<char*>(data) + elements * static_cast<int64_t>(Bytes(type));
}

// Finishes those of the rows of `finish` that are tokens `first` to `first + tokens`.
void FinishPart(const DequantizeArgs& finish, int64_t first, int64_t tokens, int most_blocks,
                cudaStream_t stream) {
  DequantizeArgs part = finish;
  part.rows = std::min(finish.rows - first, tokens);
  part.accumulators = At(finish.accumulators, first * finish.pitch, finish.accumulator_type);
  part.y = At(finish.y, first * finish.outputs, finish.y_type);
  part.scale_x = finish.scale_x + first;
  if (finish.residual != nullptr)
    part.residual = At(finish.residual, first * finish.outputs, finish.residual_type);
  part.most_blocks = most_blocks;
  CheckCuda(Dequantize(part, stream), "dequantising");
}

bool IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CheckCuda(cudaStreamIsCapturing(stream, &status), "asking whether a stream is captured");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

Product::Product(const Problem& problem) : problem_(problem), part_tokens_(problem.tokens) {
  const std::string context = problem.Describe();
  const int parts = problem.choice.parts;
  if (parts < 1) throw Failure("parts must be at least 1 for " + context);
  if (parts > 1) {
    part_tokens_ = RoundUp<int64_t>((problem.tokens + parts - 1) / parts, kPartMultiple);
    if (part_tokens_ * (parts - 1) >= problem.tokens)
      throw Failure("there are too few tokens for " + context);
  }
  const auto add = [&](int64_t tokens) {
    Problem part = problem;
    part.tokens = tokens, part.choice.parts = 1;
    plans_.push_back(std::make_unique<Plan>(part));
    workspace_bytes_ = std::max(workspace_bytes_, plans_.back()->workspace_bytes());
  };
  add(part_tokens_);
  const int64_t last = problem.tokens - part_tokens_ * (parts - 1);
  if (last != part_tokens_) add(last);
  if (parts == 1 || problem.choice.beside == 0) return;
  int device = 0, multiprocessors = 0, least = 0, greatest = 0;
  CheckCuda(cudaGetDevice(&device), context);
  CheckCuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
            context);
  most_blocks_ = std::max(1, multiprocessors / kShare) * kBlocksOfMultiprocessor;
  CheckCuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), context);
  cudaStream_t stream = nullptr;
  CheckCuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), context);
  beside_.reset(stream);
  for (int i = 0; i < parts; ++i) {
    cudaEvent_t event = nullptr;
    CheckCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), context);
    events_.emplace_back(event);
  }
}

void Product::Run(const void* compressed, const void* x, void* d, void* workspace,
                  const DequantizeArgs* finish, cudaStream_t stream) const {
  const Problem& p = problem_;
  const int parts = p.choice.parts;
  std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
  if (beside_ != nullptr) lock.lock();
  // Another thread's capture of a CUDA graph may still hold the stream. Then nothing overlaps.
  const bool overlaps = finish != nullptr && beside_ != nullptr && !IsCapturing(beside_.get());
  for (int part = 0; part < parts; ++part) {
    const bool is_last = part + 1 == parts;
    const Plan& plan = is_last ? *plans_.back() : *plans_.front();
    const int64_t first = part * part_tokens_, tokens = plan.problem().tokens;
    plan.Run(compressed, At(x, first * p.columns, p.operand), At(d, first * p.outputs, p.result),
             plan.workspace_bytes() > 0 ? workspace : nullptr, stream);
    if (finish == nullptr) continue;
    if (!overlaps || is_last) {
      FinishPart(*finish, first, tokens, 0, stream);
      continue;
    }
    CheckCuda(cudaEventRecord(events_[part].get(), stream), "recording a part");
    CheckCuda(cudaStreamWaitEvent(beside_.get(), events_[part].get(), 0), "waiting for a part");
    FinishPart(*finish, first, tokens, most_blocks_, beside_.get());
  }
  if (!overlaps) return;
  CheckCuda(cudaEventRecord(events_.back().get(), beside_.get()), "recording the end");
  CheckCuda(cudaStreamWaitEvent(stream, events_.back().get(), 0), "waiting for the end");
}

}  // namespace slidejax::cusparselt

#include "cusparselt/tune.h"

#include <algorithm>
#include <string>
#include <utility>

#include "cusparselt/helpers.h"
#include "cusparselt/product.h"
#include "cusparselt/scratch.h"

namespace slidejax::cusparselt {
namespace {

// A candidate is timed well only if its first run takes at most this multiple of the best time.
constexpr double kWorthTiming = 1.3;
constexpr double kMicrosecondsOfGroup = 3000;  // of repeated runs that are timed together
constexpr int kMostRepeats = 20;

// Returns the splits of K and the parts that are worth a try. The modes of a split are
// CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL and _TWO_KERNELS. From compute capability 9.0 on, the
// library's kernels schedule K themselves, and a forced split has ended in an illegal instruction,
// which loses the CUDA context of the process. So there only the algorithms are tried.
std::vector<Choice> Variants(const Problem& problem, bool finish) {
  int device = 0, major = 0;
  CheckCuda(cudaGetDevice(&device), "finding the current device");
  CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
            "asking for the compute capability");
  std::vector<Choice> variants = {{}};
  if (major < 9) {
    for (const int split : {2, 4})
      for (const int mode : {1, 2}) variants.push_back({-1, split, mode});
  }
  // A part must fill the device several times over, or more is lost at its end than is hidden.
  // Products of 16-bit values have no scales, and nothing to hide.
  constexpr int64_t kLeastResults = int64_t{1} << 23;
  const bool scales = finish && Bytes(problem.operand) == 1;
  for (int parts = 2; scales && parts <= 16; parts *= 2) {
    for (const int beside : {0, 1}) {
      if (problem.tokens / parts * problem.outputs >= kLeastResults)
        variants.push_back({-1, 1, 0, parts, beside});
    }
  }
  return variants;
}

// One problem's operands, and runs of it.
class Search {
 public:
  Search(Problem problem, size_t workspace_limit, bool finish)
      : problem_(problem),
        limit_(workspace_limit),
        finishes_(finish),
        scratch_(problem.Describe()),
        compressed_(Compressed()),
        x_(scratch_.Random(problem.operand, problem.tokens * problem.columns, false)),
        d_(scratch_.Allocate(problem.tokens * problem.outputs * Bytes(problem.result))),
        workspace_(scratch_.Allocate(workspace_limit)) {
    finish_.accumulators = finish_.y = d_;
    finish_.accumulator_type = problem.result;
    finish_.y_type = Bytes(problem.result) == 4 ? DType::kF32 : problem.result;
    finish_.pitch = finish_.outputs = problem.outputs;
    finish_.rows = problem.tokens;
    const auto random = [&](int64_t count) {
      return static_cast<const float*>(scratch_.Random(DType::kF32, count, false));
    };
    if (Bytes(problem.operand) == 1) {
      finish_.scale_x = random(problem.tokens), finish_.scale_w = random(problem.outputs);
    } else {  // Rows that are not quantised have scales of one.
      const std::vector<float> ones(problem.tokens, 1.0f);
      void* scale_x = scratch_.Allocate(ones.size() * sizeof(float));
      CheckCuda(
          cudaMemcpy(scale_x, ones.data(), ones.size() * sizeof(float), cudaMemcpyHostToDevice),
          "filling scales");
      finish_.scale_x = static_cast<const float*>(scale_x);
    }
    CheckCuda(cudaStreamSynchronize(scratch_.stream), "preparing the search");
  }

  // Times a choice. Returns whether it is near the best. Throws Failure where the library refuses
  // it.
  bool Try(const Choice& choice) {
    problem_.choice = choice;
    const Product product(problem_);
    if (product.workspace_bytes() > limit_) return false;
    const auto run = [&] {
      product.Run(compressed_, x_, d_, workspace_, finishes_ ? &finish_ : nullptr, scratch_.stream);
    };
    scratch_.Time(1, run);  // warms up
    double us = scratch_.Time(1, run);
    if (us > kWorthTiming * best_) return false;
    const int repeats = std::clamp(static_cast<int>(kMicrosecondsOfGroup / us), 1, kMostRepeats);
    for (int group = 0; group < 3; ++group) us = std::min(us, scratch_.Time(repeats, run));
    best_ = std::min(best_, us);
    timings_.push_back({choice, us, product.workspace_bytes()});
    return true;
  }

  std::vector<Timing> Sorted() {
    if (timings_.empty()) throw Failure("cuSPARSELt has no algorithm for " + problem_.Describe());
    std::sort(timings_.begin(), timings_.end(),
              [](const Timing& a, const Timing& b) { return a.microseconds < b.microseconds; });
    return std::move(timings_);
  }

 private:
  // A random weight in the library's form.
  void* Compressed() {
    const Problem& p = problem_;
    const CompressedSize size = SizeOfCompressed(p.operand, p.outputs, p.columns);
    void* compressed = scratch_.Allocate(size.compressed);
    Scratch scratch(p.Describe());
    const void* dense = scratch.Random(p.operand, p.outputs * p.columns, true);
    Compress(p.operand, p.outputs, p.columns, dense, compressed, scratch.Allocate(size.buffer),
             scratch.stream);
    CheckCuda(cudaStreamSynchronize(scratch.stream), "compressing a weight");
    return compressed;
  }

  Problem problem_;
  size_t limit_;
  bool finishes_;
  Scratch scratch_;
  void *compressed_, *x_, *d_, *workspace_;
  DequantizeArgs finish_ = {};
  double best_ = 1e30;
  std::vector<Timing> timings_;
};

}  // namespace

std::vector<Timing> Tune(Problem problem, size_t workspace_limit, bool finish) {
  problem.outputs = RoundUp<int64_t>(problem.outputs, Multiple(problem.operand));
  problem.tokens = RoundUp<int64_t>(problem.tokens, Multiple(problem.operand));
  problem.choice = {};
  const std::vector<Choice> variants = Variants(problem, finish);
  const int algorithms = Plan(problem).AlgorithmCount();
  Search search(problem, workspace_limit, finish);
  for (int algorithm = 0; algorithm < algorithms; ++algorithm) {
    bool is_near = false;  // the best, in one part
    for (Choice choice : variants) {
      if (choice.parts > 1 && !is_near) continue;
      choice.algorithm = algorithm;
      try {
        is_near = search.Try(choice) || is_near;
      } catch (const Failure&) {
        // Where the library refuses an algorithm nothing else of it is tried. A refused split or
        // cut says nothing about others.
        if (choice.split_k == 1 && choice.parts == 1) break;
      }
    }
  }
  return search.Sorted();
}

}  // namespace slidejax::cusparselt

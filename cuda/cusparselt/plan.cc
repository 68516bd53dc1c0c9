#include "cusparselt/plan.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "cusparselt/helpers.h"

namespace slidejax::cusparselt {
namespace {

const Api& LoadedOrThrow() {
  const Api* api = Loaded();
  if (api == nullptr) throw Failure("cuSPARSELt is not loaded: `slidejax info` says why");
  return *api;
}

void Check(Status status, const char* function, const std::string& context) {
  if (status != kSuccess)
    throw Failure(std::string("cusparseLt") + function + " failed with " + Describe(status) +
                  " for " + context);
}

void CheckCuda(cudaError_t status, const std::string& context) {
  if (status != cudaSuccess)
    throw Failure(std::string("CUDA: ") + cudaGetErrorString(status) + " in " + context);
}

cudaDataType CudaType(DType type) {
  switch (type) {
    case DType::kS8: return CUDA_R_8I;
    case DType::kE4M3: return CUDA_R_8F_E4M3;
    case DType::kBF16: return CUDA_R_16BF;
    case DType::kF16: return CUDA_R_16F;
    case DType::kF32: return CUDA_R_32F;
    case DType::kS32: return CUDA_R_32I;
  }
  throw Failure("unknown dtype");
}

// Returns the library's handle for the current device. It holds the device's properties and no
// stream, and is only read after this. It is never destroyed: when the process ends, the CUDA
// context may be gone first.
const Handle* HandleOfDevice() {
  static std::mutex mutex;
  static auto* handles = new std::map<int, std::unique_ptr<Handle>>;
  int device = 0;
  CheckCuda(cudaGetDevice(&device), "finding the current device");
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Handle>& handle = (*handles)[device];
  if (handle == nullptr) {
    auto fresh = std::make_unique<Handle>();
    Check(LoadedOrThrow().Init(fresh.get()), "Init", "device " + std::to_string(device));
    handle = std::move(fresh);
  }
  return handle.get();
}

constexpr uint32_t kAlignment = 16;  // bytes, of every matrix

// W's descriptor for the functions that need no plan.
class WeightDescriptor {
 public:
  WeightDescriptor(DType operand, int64_t outputs, int64_t columns)
      : api_(LoadedOrThrow()),
        handle_(HandleOfDevice()),
        context_(std::string(Name(operand)) + " weights [" + std::to_string(outputs) + ", " +
                 std::to_string(columns) + "]") {
    Check(api_.StructuredDescriptorInit(handle_, &descriptor_, RoundUp(outputs, Multiple(operand)),
                                        columns, columns, kAlignment, CudaType(operand), kRowMajor,
                                        kHalf),
          "StructuredDescriptorInit", context_);
  }
  ~WeightDescriptor() { api_.MatDescriptorDestroy(&descriptor_); }
  WeightDescriptor(const WeightDescriptor&) = delete;

  const Api& api_;
  const Handle* handle_;
  std::string context_;
  MatDescriptor descriptor_;
};

}  // namespace

std::string Problem::Describe() const {
  return std::string(Name(operand)) + " x[" + std::to_string(tokens) + ", " +
         std::to_string(columns) + "] * w[" + std::to_string(outputs) + ", " +
         std::to_string(columns) + "]^T -> " + Name(result) +
         (alpha_vector ? " with a scale for each output" : "") + ", algorithm " +
         std::to_string(choice.algorithm) + ", split_k " + std::to_string(choice.split_k) +
         " mode " + std::to_string(choice.split_k_mode);
}

Plan::Plan(const Problem& problem)
    : problem_(problem), api_(LoadedOrThrow()), handle_(HandleOfDevice()) {
  const std::string context = problem.Describe();
  const auto undo = [this] {
    for (auto step = cleanup_.rbegin(); step != cleanup_.rend(); ++step) (*step)();
  };
  try {
    const cudaDataType type = CudaType(problem.operand);
    const auto& p = problem;
    Check(api_.StructuredDescriptorInit(handle_, &w_, p.outputs, p.columns, p.columns, kAlignment,
                                        type, kRowMajor, kHalf),
          "StructuredDescriptorInit", context);
    cleanup_.push_back([this] { api_.MatDescriptorDestroy(&w_); });
    Check(api_.DenseDescriptorInit(handle_, &x_, p.tokens, p.columns, p.columns, kAlignment, type,
                                   kRowMajor),
          "DenseDescriptorInit", context);
    cleanup_.push_back([this] { api_.MatDescriptorDestroy(&x_); });
    // The library computes D^T = W X^T, whose column-major form is D as it is kept here.
    Check(api_.DenseDescriptorInit(handle_, &d_, p.outputs, p.tokens, p.outputs, kAlignment,
                                   CudaType(p.result), kColumnMajor),
          "DenseDescriptorInit", context);
    cleanup_.push_back([this] { api_.MatDescriptorDestroy(&d_); });
    Check(api_.MatmulDescriptorInit(handle_, &matmul_, kNonTranspose, kTranspose, &w_, &x_, &d_,
                                    &d_, p.operand == DType::kS8 ? kCompute32I : kCompute32F),
          "MatmulDescriptorInit", context);
    if (p.alpha_vector) {
      const int on = 1;
      Check(api_.MatmulDescSetAttribute(handle_, &matmul_, kAlphaVectorScaling, &on, sizeof(on)),
            "MatmulDescSetAttribute", context);
    }
    Check(api_.MatmulAlgSelectionInit(handle_, &selection_, &matmul_, kDefaultAlgorithm),
          "MatmulAlgSelectionInit", context);
    cleanup_.push_back([this] { api_.MatmulAlgSelectionDestroy(&selection_); });
    const auto set = [&](AlgorithmAttribute attribute, int value) {
      Check(api_.MatmulAlgSetAttribute(handle_, &selection_, attribute, &value, sizeof(value)),
            "MatmulAlgSetAttribute", context);
    };
    if (p.choice.algorithm >= 0) set(kConfigId, p.choice.algorithm);
    if (p.choice.split_k > 1) set(kSplitK, p.choice.split_k);
    if (p.choice.split_k_mode > 0) set(kSplitKMode, p.choice.split_k_mode);
    Check(api_.MatmulPlanInit(handle_, &plan_, &matmul_, &selection_), "MatmulPlanInit", context);
    cleanup_.push_back([this] { api_.MatmulPlanDestroy(&plan_); });
    Check(api_.MatmulGetWorkspace(handle_, &plan_, &workspace_bytes_), "MatmulGetWorkspace",
          context);
  } catch (...) {
    undo();
    throw;
  }
}

Plan::~Plan() {
  for (auto step = cleanup_.rbegin(); step != cleanup_.rend(); ++step) (*step)();
}

void Plan::Run(const void* alpha, const void* compressed, const void* x, void* d, void* workspace,
               cudaStream_t stream) const {
  const float zero = 0.0f;
  const Status status =
      api_.Matmul(handle_, &plan_, alpha, compressed, x, &zero, d, d, workspace, &stream, 1);
  if (status != kSuccess) Check(status, "Matmul", problem_.Describe());
}

int Plan::AlgorithmCount() const {
  int count = 0;
  Check(api_.MatmulAlgGetAttribute(handle_, &selection_, kConfigMaxId, &count, sizeof(count)),
        "MatmulAlgGetAttribute", problem_.Describe());
  return count;
}

CompressedSize SizeOfCompressed(DType operand, int64_t outputs, int64_t columns) {
  const WeightDescriptor w(operand, outputs, columns);
  CompressedSize size;
  Check(w.api_.SpMMACompressedSize2(w.handle_, &w.descriptor_, &size.compressed, &size.buffer),
        "SpMMACompressedSize2", w.context_);
  return size;
}

void Compress(DType operand, int64_t outputs, int64_t columns, const void* dense, void* compressed,
              void* buffer, cudaStream_t stream) {
  const WeightDescriptor w(operand, outputs, columns);
  Check(w.api_.SpMMACompress2(w.handle_, &w.descriptor_, /*is_sparse_a=*/1, kNonTranspose, dense,
                              compressed, buffer, stream),
        "SpMMACompress2", w.context_);
}

// ---- Tuning -------------------------------------------------------------------------------------

namespace {

// Device memory and a stream for one search, outside of XLA's pool.
class Bench {
 public:
  explicit Bench(std::string context) : context_(std::move(context)) {
    CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), context_);
    for (cudaEvent_t& event : events) CheckCuda(cudaEventCreate(&event), context_);
  }
  ~Bench() {
    cudaStreamSynchronize(stream);
    for (void* memory : memory_) cudaFree(memory);
    for (cudaEvent_t event : events) cudaEventDestroy(event);
    cudaStreamDestroy(stream);
  }
  Bench(const Bench&) = delete;

  void* Allocate(size_t bytes) {
    void* memory = nullptr;
    CheckCuda(cudaMalloc(&memory, std::max<size_t>(bytes, 256)),
              "allocating " + std::to_string(bytes) + " bytes for " + context_);
    memory_.push_back(memory);
    return memory;
  }

  // Returns the microseconds of one call of `run`, the least of a few groups of calls.
  template <typename F>
  double Time(int repeats, const F& run) {
    double best = 1e30;
    for (int group = 0; group < 4; ++group) {  // the first warms up
      CheckCuda(cudaEventRecord(events[0], stream), context_);
      for (int i = 0; i < repeats; ++i) run();
      CheckCuda(cudaEventRecord(events[1], stream), context_);
      CheckCuda(cudaEventSynchronize(events[1]), context_);
      float milliseconds = 0;
      CheckCuda(cudaEventElapsedTime(&milliseconds, events[0], events[1]), context_);
      if (group > 0) best = std::min(best, 1e3 * milliseconds / repeats);
    }
    return best;
  }

  cudaStream_t stream = nullptr;
  cudaEvent_t events[2] = {};

 private:
  std::string context_;
  std::vector<void*> memory_;
};

// Returns the splits of K that are worth a try. The modes are CUSPARSELT_SPLIT_K_MODE_ONE_KERNEL
// and _TWO_KERNELS. From compute capability 9.0 on, the library's kernels schedule K themselves,
// and a forced split has ended in an illegal instruction, which loses the CUDA context of the
// process. So there only the algorithms are tried.
std::vector<Choice> Splits() {
  int device = 0, major = 0;
  CheckCuda(cudaGetDevice(&device), "finding the current device");
  CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
            "asking for the compute capability");
  if (major >= 9) return {{-1, 1, 0}};
  return {{-1, 1, 0}, {-1, 2, 1}, {-1, 2, 2}, {-1, 4, 1}, {-1, 4, 2}};
}

}  // namespace

std::vector<Timing> Tune(Problem problem, size_t workspace_limit, int repeats) {
  problem.outputs = RoundUp(problem.outputs, Multiple(problem.operand));
  problem.tokens = RoundUp(problem.tokens, Multiple(problem.operand));
  problem.choice = {};
  Bench bench(problem.Describe());
  const int algorithms = Plan(problem).AlgorithmCount();

  const size_t element = Bytes(problem.operand);
  const CompressedSize size = SizeOfCompressed(problem.operand, problem.outputs, problem.columns);
  void* compressed = bench.Allocate(size.compressed);
  void* x = bench.Allocate(problem.tokens * problem.columns * element);
  void* d = bench.Allocate(problem.tokens * problem.outputs * Bytes(problem.result));
  void* workspace = bench.Allocate(workspace_limit);
  {
    Bench scratch(problem.Describe());
    void* dense = scratch.Allocate(problem.outputs * problem.columns * element);
    void* buffer = scratch.Allocate(size.buffer);
    CheckCuda(
        FillRandom(problem.operand, dense, problem.outputs * problem.columns, true, scratch.stream),
        "filling weights");
    Compress(problem.operand, problem.outputs, problem.columns, dense, compressed, buffer,
             scratch.stream);
    CheckCuda(
        FillRandom(problem.operand, x, problem.tokens * problem.columns, false, scratch.stream),
        "filling activations");
    CheckCuda(cudaStreamSynchronize(scratch.stream), "preparing the search");
  }

  const std::vector<Choice> splits = Splits();
  const float one = 1.0f;
  std::vector<Timing> timings;
  for (int algorithm = 0; algorithm < algorithms; ++algorithm) {
    for (Choice choice : splits) {
      choice.algorithm = algorithm;
      problem.choice = choice;
      try {
        const Plan plan(problem);
        if (plan.workspace_bytes() > workspace_limit) continue;
        plan.Run(&one, compressed, x, d, workspace, bench.stream);
        CheckCuda(cudaStreamSynchronize(bench.stream), "running " + problem.Describe());
        const double us =
            bench.Time(repeats, [&] { plan.Run(&one, compressed, x, d, workspace, bench.stream); });
        timings.push_back({choice, us, plan.workspace_bytes()});
      } catch (const Failure&) {
        if (choice.split_k == 1)
          break;  // the library refuses the algorithm; a refused split says nothing about others
      }
    }
  }
  if (timings.empty()) throw Failure("cuSPARSELt has no algorithm for " + problem.Describe());
  std::sort(timings.begin(), timings.end(),
            [](const Timing& a, const Timing& b) { return a.microseconds < b.microseconds; });
  return timings;
}

}  // namespace slidejax::cusparselt

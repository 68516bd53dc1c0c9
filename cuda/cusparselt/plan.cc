#include "cusparselt/plan.h"

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
    Check(api_.StructuredDescriptorInit(handle_, &descriptor_,
                                        RoundUp<int64_t>(outputs, Multiple(operand)), columns,
                                        columns, kAlignment, CudaType(operand), kRowMajor, kHalf),
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

void CheckCuda(cudaError_t status, const std::string& context) {
  if (status != cudaSuccess)
    throw Failure(std::string("CUDA: ") + cudaGetErrorString(status) + " in " + context);
}

std::string Problem::Describe() const {
  return std::string(Name(operand)) + " x[" + std::to_string(tokens) + ", " +
         std::to_string(columns) + "] * w[" + std::to_string(outputs) + ", " +
         std::to_string(columns) + "]^T -> " + Name(result) + ", algorithm " +
         std::to_string(choice.algorithm) + ", split_k " + std::to_string(choice.split_k) +
         " mode " + std::to_string(choice.split_k_mode) + ", " + std::to_string(choice.parts) +
         " parts" + (choice.parts > 1 && choice.beside ? " beside each other" : "");
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

void Plan::Run(const void* compressed, const void* x, void* d, void* workspace,
               cudaStream_t stream) const {
  const float one = 1.0f, zero = 0.0f;
  const Status status =
      api_.Matmul(handle_, &plan_, &one, compressed, x, &zero, d, d, workspace, &stream, 1);
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

}  // namespace slidejax::cusparselt

#include "cases.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/integers.h"

namespace slidejax::sanitize {
namespace {

// A case that cannot be prepared or read back would make all that follow it meaningless.
void Must(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("stopped: %s: %s\n", what, cudaGetErrorString(status));
  std::fflush(stdout);
  std::_Exit(1);
}

// FNV-1a, of what was hashed before and some bytes more.
constexpr uint64_t kStart = 14695981039346656037ull;
uint64_t Hash(uint64_t hash, const void* bytes, size_t count) {
  for (size_t i = 0; i < count; ++i)
    hash = (hash ^ static_cast<const uint8_t*>(bytes)[i]) * 1099511628211ull;
  return hash;
}

void Store(DType type, uint8_t* to, float value) {
  switch (type) {
    case DType::kBF16: {
      const __nv_bfloat16 v = __float2bfloat16(value);
      std::memcpy(to, &v, sizeof(v));
      break;
    }
    case DType::kF16: {
      const __half v = __float2half(value);
      std::memcpy(to, &v, sizeof(v));
      break;
    }
    default: std::memcpy(to, &value, sizeof(value)); break;
  }
}

bool IsNan(DType type, const uint8_t* from) {
  uint16_t half = 0;
  uint32_t word = 0;
  switch (type) {
    case DType::kE4M3: return (*from & 0x7f) == 0x7f;
    case DType::kBF16: std::memcpy(&half, from, 2); return (half & 0x7fff) > 0x7f80;
    case DType::kF16: std::memcpy(&half, from, 2); return (half & 0x7fff) > 0x7c00;
    case DType::kF32: std::memcpy(&word, from, 4); return (word & 0x7fffffff) > 0x7f800000;
    default: return false;
  }
}

}  // namespace

Memory::~Memory() {
  for (void* array : all_) cudaFree(array);
}

void* Memory::Take(int64_t bytes) {
  void* array = nullptr;
  Must(cudaMalloc(&array, bytes > 0 ? bytes : 1), "allocating");
  all_.push_back(array);
  return array;
}

void* Memory::Copy(const void* bytes, int64_t count) {
  void* array = Take(count);
  Must(cudaMemcpy(array, bytes, count, cudaMemcpyHostToDevice), "copying operands");
  return array;
}

void* Memory::Codes(DType type, int64_t count) {
  if (Bytes(type) > 1) return Floats(type, count);
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) {
    do {
      code = static_cast<uint8_t>(random_() >> 24);
    } while (IsNan(type, &code) || (type == DType::kS8 && code == 0x80));
  }
  return Copy(codes.data(), count);
}

void* Memory::Floats(DType type, int64_t count) {
  const int64_t size = Bytes(type);
  std::vector<uint8_t> bytes(count * size);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) Store(type, &bytes[i * size], normal(random_));
  return Copy(bytes.data(), count * size);
}

void* Memory::Pieces(DType type, int64_t count) {
  const auto size = static_cast<int64_t>(Bytes(type));
  return Floats(type, RoundUp<int64_t>(count * size, 16) / size);
}

float* Memory::Scales(int64_t count) {
  std::vector<float> scales(count);
  std::uniform_real_distribution<float> uniform(0.001f, 0.02f);
  for (float& scale : scales) scale = uniform(random_);
  return static_cast<float*>(Copy(scales.data(), count * sizeof(float)));
}

uint8_t* Memory::Zeros(int64_t groups, int group) {
  std::vector<uint8_t> zeros(groups);
  for (uint8_t& z : zeros) {
    const int z1 = random_() % (group - 1), z2 = z1 + 1 + random_() % (group - 1 - z1);
    z = static_cast<uint8_t>(z1 | z2 << 4);
  }
  return static_cast<uint8_t*>(Copy(zeros.data(), groups));
}

int32_t* Memory::Integers(const std::vector<int32_t>& numbers) {
  return static_cast<int32_t*>(Copy(numbers.data(), numbers.size() * sizeof(int32_t)));
}

void* Memory::Result(DType type, int64_t count) {
  return Changed(Take(count * static_cast<int64_t>(Bytes(type))), type, count);
}

void* Memory::BulkResult(DType type, int64_t count) {
  void* array = Result(type, count);
  Must(cudaMemset(array, 0, count * static_cast<int64_t>(Bytes(type))), "clearing a result");
  return array;
}

void* Memory::Changed(void* array, DType type, int64_t count) {
  results_.push_back({array, type, count});
  return array;
}

std::string Memory::Check(uint64_t* hash) {
  *hash = kStart;
  for (const Written& result : results_) {
    const int64_t size = Bytes(result.type);
    std::vector<uint8_t> bytes(result.count * size);
    Must(cudaMemcpy(bytes.data(), result.array, bytes.size(), cudaMemcpyDeviceToHost),
         "reading results");
    *hash = Hash(*hash, bytes.data(), bytes.size());
    for (int64_t i = 0; i < result.count; ++i) {
      if (IsNan(result.type, &bytes[i * size])) {
        return "nan in element " + std::to_string(i) + " of a result of " +
               std::to_string(result.count) + " " + Name(result.type);
      }
    }
  }
  return "";
}

void Runner::operator()(const std::string& kernel, const std::string& details,
                        const Launch& launch) {
  if (kernel.rfind(choice_.prefix, 0) != 0) return;
  if (choice_.one && !seen_.insert(kernel).second) return;
  if (chosen_++ % choice_.parts != choice_.part) return;
  ++cases_;
  // The same numbers whichever cases are chosen.
  const std::string name = kernel + ": " + details;
  Memory memory(static_cast<uint32_t>(Hash(kStart, name.data(), name.size())));
  cudaStream_t stream = nullptr;
  Must(cudaStreamCreate(&stream), "making a stream");
  std::string wrong;
  if (const cudaError_t status = launch(memory, stream)) {
    wrong = std::string("refused: ") + cudaGetErrorString(status);
    cudaGetLastError();
  }
  Must(cudaStreamSynchronize(stream), name.c_str());
  uint64_t hash = 0;
  if (wrong.empty()) wrong = memory.Check(&hash);
  failures_ += !wrong.empty();
  std::printf("%s: %s\n", name.c_str(),
              wrong.empty() ? std::to_string(hash).c_str() : ("FAILED: " + wrong).c_str());
  std::fflush(stdout);
  Must(cudaStreamDestroy(stream), "ending a stream");
}

}  // namespace slidejax::sanitize

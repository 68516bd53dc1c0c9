// The part of cuSPARSELt's C interface that slidejax uses. It is found at run time.
//
// It is declared here, and not taken from the library's header, so that one build runs with every
// release that was checked against these declarations, needs no wheel to build, and has no
// load-time dependency. The releases are 0.8, 0.9 and 0.10, whose headers differ in comments and
// version numbers only. Others are refused by name, because the sizes of opaque structs and the
// enumerators have changed between releases before.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace slidejax::cusparselt {

inline constexpr int kMajor = 0;
inline constexpr int kOldestMinor = 8, kNewestMinor = 10;

// Opaque structs of the library; 512 bytes in the releases above.
struct alignas(16) Handle {
  unsigned char data[512];
};
struct alignas(16) MatDescriptor {
  unsigned char data[512];
};
struct alignas(16) MatmulDescriptor {
  unsigned char data[512];
};
struct alignas(16) AlgSelection {
  unsigned char data[512];
};
struct alignas(16) MatmulPlan {
  unsigned char data[512];
};

using Status = int;
inline constexpr Status kSuccess = 0;

enum Operation : int { kNonTranspose = 0, kTranspose = 1 };
enum Order : int { kColumnMajor = 1, kRowMajor = 2 };
enum Sparsity : int { kHalf = 0 };
enum ComputeType : int { kCompute32I = 0, kCompute32F = 2 };
enum Algorithm : int { kDefaultAlgorithm = 0 };
enum AlgorithmAttribute : int {
  kConfigId = 0,
  kConfigMaxId = 1,
  kSplitK = 3,
  kSplitKMode = 4,
};

// The functions: name without its prefix, and parameters. Each returns Status.
#define SLIDEJAX_CUSPARSELT_FUNCTIONS(F)                                                        \
  F(Init, (Handle*))                                                                            \
  F(GetProperty, (libraryPropertyType, int*))                                                   \
  F(DenseDescriptorInit, (const Handle*, MatDescriptor*, int64_t rows, int64_t columns,         \
                          int64_t ld, uint32_t alignment, cudaDataType, Order))                 \
  F(StructuredDescriptorInit, (const Handle*, MatDescriptor*, int64_t rows, int64_t columns,    \
                               int64_t ld, uint32_t alignment, cudaDataType, Order, Sparsity))  \
  F(MatDescriptorDestroy, (const MatDescriptor*))                                               \
  F(MatmulDescriptorInit,                                                                       \
    (const Handle*, MatmulDescriptor*, Operation a, Operation b,                                \
     const MatDescriptor* a_descriptor, const MatDescriptor* b_descriptor,                      \
     const MatDescriptor* c_descriptor, const MatDescriptor* d_descriptor, ComputeType))        \
  F(MatmulAlgSelectionInit, (const Handle*, AlgSelection*, const MatmulDescriptor*, Algorithm)) \
  F(MatmulAlgSelectionDestroy, (const AlgSelection*))                                           \
  F(MatmulAlgSetAttribute,                                                                      \
    (const Handle*, AlgSelection*, AlgorithmAttribute, const void*, size_t))                    \
  F(MatmulAlgGetAttribute,                                                                      \
    (const Handle*, const AlgSelection*, AlgorithmAttribute, void*, size_t))                    \
  F(MatmulPlanInit, (const Handle*, MatmulPlan*, const MatmulDescriptor*, const AlgSelection*)) \
  F(MatmulPlanDestroy, (const MatmulPlan*))                                                     \
  F(MatmulGetWorkspace, (const Handle*, const MatmulPlan*, size_t*))                            \
  F(Matmul, (const Handle*, const MatmulPlan*, const void* alpha, const void* a, const void* b, \
             const void* beta, const void* c, void* d, void* workspace, cudaStream_t* streams,  \
             int32_t stream_count))                                                             \
  F(SpMMACompressedSize2,                                                                       \
    (const Handle*, const MatDescriptor*, size_t* compressed_bytes, size_t* buffer_bytes))      \
  F(SpMMACompress2, (const Handle*, const MatDescriptor*, int is_sparse_a, Operation,           \
                     const void* dense, void* compressed, void* buffer, cudaStream_t))

struct Api {
#define SLIDEJAX_DECLARE(name, parameters) Status(*name) parameters = nullptr;
  SLIDEJAX_CUSPARSELT_FUNCTIONS(SLIDEJAX_DECLARE)
#undef SLIDEJAX_DECLARE
  const char* (*GetErrorString)(Status) = nullptr;
  std::string path;
  int version[3] = {0, 0, 0};
};

// Loads the library from the first of `candidates` (paths, or a name for the system's search) that
// can be loaded and is a release this code was checked with. Returns an empty string, or why there
// is none. A second call keeps the library that is loaded.
std::string Load(const std::vector<std::string>& candidates);

// The loaded library, or nullptr.
const Api* Loaded();

// Describes a status, as in "status 10 (operation not supported)".
std::string Describe(Status status);

}  // namespace slidejax::cusparselt

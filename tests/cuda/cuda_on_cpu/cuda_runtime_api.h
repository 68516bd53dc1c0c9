// Just enough of CUDA for the lift, decode and attention kernels to run on a CPU, thread by thread,
// so that their logic is tested where there is no GPU.
//
// The threads of a block are fibres that run one at a time, in an order that the test chooses, from
// one barrier or warp-wide operation to the next. A kernel that is right in one order only fails in
// another. Asynchronous copies arrive either when they are issued or only when they are waited for.
// The emulator cannot show speed, nor how real hardware orders memory.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

// The indices of the fibre that runs.
struct Thread {
  dim3 thread, block;
};
extern Thread* current;
extern dim3 block_dim, grid_dim;
extern int multiprocessors, shared_of_block, shared_of_multiprocessor;
constexpr int kSharedBytes = 232448;
extern char* const shared_memory;  // of the block, where the kernels declare it

void SyncWarp();
void SyncThreads();
uint32_t Exchange(uint32_t value, int from);  // the value of lane `from`
uint32_t ReduceMax(uint32_t value);
cudaError_t Launch(const std::function<void()>& run, dim3 grid, dim3 block, size_t shared);
void Copy(void* shared, const void* global, bool wanted, int bytes);  // or of zeros
void CommitCopies();
void WaitForCopies(int pending);
// What Copy and CheckRead take from now on, and in which order threads run.
void Begin(bool lazy, int seed);
void Allow(const void* from, int64_t bytes);
[[noreturn]] void Fail(const char* what);
// What a lane shows the others of its warp, until they meet the next time.
struct Words {
  uint32_t v[9];
};
void Publish(const Words& words);
Words WordsOf(int lane);
int Poll(const int* shared);  // reads it. A thread that reads the same again waits for a change
int Device();                 // a number for each device that a test makes up
// Ends the process if the bytes lie outside those that the test allowed.
void CheckRead(const void* address, size_t bytes);
// Whether the next kernel is launched to begin before the one ahead has ended. Its threads may then
// read what was given to Make, and let the next kernel begin, only when they have waited.
extern bool early;
void WaitForGrid();
void ReleaseGrid();
void Make(const void* from, int64_t bytes);

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block)
#define blockDim (emulated::block_dim)
#define gridDim (emulated::grid_dim)

inline cudaError_t cudaGetDevice(int* device) { return *device = emulated::Device(), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated::multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
               ? emulated::shared_of_block
               : emulated::shared_of_multiprocessor;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const auto run = [=] {
    int at = 0;
    std::tuple<Params...> all{*static_cast<Params*>(arguments[at++])...};
    std::apply(kernel, all);
  };
  return emulated::Launch(run, grid, block, shared);
}

inline void __syncwarp() { emulated::SyncWarp(); }
inline void __syncthreads() { emulated::SyncThreads(); }
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) { return emulated::ReduceMax(value); }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emulated::Exchange(bits, lane);
  std::memcpy(&value, &bits, 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
template <typename T>
T __ldg(const T* address) {
  emulated::CheckRead(address, sizeof(T));
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return __ldg(address);
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
// The products of four signed bytes, added.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

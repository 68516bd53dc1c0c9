// Launching the ring kernel, and the dispatch over dtypes.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <type_traits>

#include "common/launch.h"
#include "lift/lift.h"
#include "lift/ring.cuh"

namespace slidejax::lift {

inline cudaError_t CurrentDevice(DeviceLimits* device) {
  thread_local int known = -1;  // the device that `copy` describes
  thread_local DeviceLimits copy;
  int current = 0;
  if (const cudaError_t status = cudaGetDevice(&current); status != cudaSuccess) return status;
  if (current != known) {
    const auto ask = [&](int* value, cudaDeviceAttr attribute) {
      return cudaDeviceGetAttribute(value, attribute, current);
    };
    cudaError_t status = ask(&copy.multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status == cudaSuccess)
      status = ask(&copy.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (status == cudaSuccess)
      status = ask(&copy.shared_of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    if (status != cudaSuccess) return status;
    known = current;
  }
  *device = copy;
  return cudaSuccess;
}

template <typename In, typename Out, int kN, typename Prologue, int kSteps = kN ? StepsOf(kN) : 0>
cudaError_t LaunchRing(RingParams p, const DeviceLimits& device, const RingGeometry& geometry,
                       cudaStream_t stream) {
  const auto kernel = RingKernel<In, Out, kN, Prologue, kSteps>;
  p.depth = geometry.depth;
  if (geometry.bytes > kDefaultSharedBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.bytes);
    if (status != cudaSuccess) return status;
  }
  const int64_t blocks =
      std::min<int64_t>(p.rows, static_cast<int64_t>(device.multiprocessors) * geometry.blocks);
  void* arguments[] = {&p};
  const dim3 grid(static_cast<unsigned>(blocks)), block(kLanes * geometry.warps);
  if (p.behind) return LaunchBehind(kernel, grid, block, arguments, geometry.bytes, stream);
  return cudaLaunchKernel(kernel, grid, block, arguments, geometry.bytes, stream);
}

// Launches the kernel for p.n: one of its own where models use it, else the kernel that reads N.
template <typename In, typename Out, typename Prologue>
cudaError_t LaunchRingForN(const RingParams& p, const DeviceLimits& device,
                           const RingGeometry& geometry, cudaStream_t stream) {
  constexpr bool kPlain = std::is_same_v<Prologue, NoPrologue>;
  if constexpr (kPlain || std::is_same_v<In, __nv_bfloat16>) {
    if (p.n == 1) return LaunchRing<In, Out, 1, Prologue>(p, device, geometry, stream);
    if (p.n == 4) {
      return p.steps == 1 ? LaunchRing<In, Out, 4, Prologue, 1>(p, device, geometry, stream)
                          : LaunchRing<In, Out, 4, Prologue>(p, device, geometry, stream);
    }
  }
  if constexpr (kPlain && sizeof(In) == 2) {
    switch (p.n) {
      case 2: return LaunchRing<In, Out, 2, Prologue>(p, device, geometry, stream);
      case 3: return LaunchRing<In, Out, 3, Prologue>(p, device, geometry, stream);
      case 5: return LaunchRing<In, Out, 5, Prologue>(p, device, geometry, stream);
      case 6: return LaunchRing<In, Out, 6, Prologue>(p, device, geometry, stream);
      case 7: return LaunchRing<In, Out, 7, Prologue>(p, device, geometry, stream);
      case 8: return LaunchRing<In, Out, 8, Prologue>(p, device, geometry, stream);
      default: break;
    }
  }
  return LaunchRing<In, Out, 0, Prologue>(p, device, geometry, stream);
}

// Calls launch(T{}) with the C++ type of a dtype: of x and of casts, and of codes.
template <typename Launch>
cudaError_t WithFloat(DType type, const Launch& launch) {
  switch (type) {
    case DType::kBF16: return launch(__nv_bfloat16{});
    case DType::kF16: return launch(__half{});
    case DType::kF32: return launch(float{});
    default: return cudaErrorInvalidValue;
  }
}
template <typename Launch>
cudaError_t WithCode(DType type, const Launch& launch) {
  switch (type) {
    case DType::kS8: return launch(int8_t{});
    case DType::kE4M3: return launch(__nv_fp8_e4m3{});
    default: return cudaErrorInvalidValue;
  }
}

inline RingParams RingParamsOf(const Args& a, const DeviceLimits& device) {
  RingParams p = {};
  p.x = a.x, p.lifted = a.lifted, p.scale = a.scale, p.rows = a.rows;
  p.columns = static_cast<int>(a.columns), p.lifted_columns = static_cast<int>(a.lifted_columns);
  p.x_stride = a.x_stride * static_cast<int64_t>(Bytes(a.x_type));
  p.n = a.group == 0 ? 1 : a.group / 2;
  // With a multiprocessor for each row, latency counts: many warps with small tiles.
  p.steps = p.n == 4 && a.rows <= device.multiprocessors ? TileSteps(p.n) : StepsOf(p.n);
  const int64_t tile_columns = kLanes * kChunk * p.steps;
  const int64_t padded = p.n == 1 ? a.lifted_columns : a.lifted_columns / (4 * (p.n - 1)) * 2 * p.n;
  p.tiles = static_cast<int>(std::max<int64_t>(1, (padded + tile_columns - 1) / tile_columns));
  const auto aligned = [](const void* address) {
    return reinterpret_cast<uintptr_t>(address) % kGranule == 0;
  };
  // Where there is no a.up, it is nullptr, which is aligned.
  p.x_aligned = a.columns % kChunk == 0 && aligned(a.x) && aligned(a.up);
  p.out_aligned = a.lifted_columns % kChunk == 0 && aligned(a.lifted);
  p.normed = a.weight != nullptr;
  p.prologue = {a.up,      a.weight,    a.bias, a.eps, 1.0f / static_cast<float>(a.columns),
                p.columns, a.activation};
  p.counters = a.counters, p.counter_count = a.counter_count;
  p.behind = a.behind;
  return p;
}

}  // namespace slidejax::lift

// Activation lifting fused with dynamic quantisation (SlideSparse, arXiv 2603.05232). The formulas
// are those of docs/contract.md.
//
//   lifted[m, g, w, l] = code(x[m, 2N*g + 2*w + l]),  scale[m] = absmax[m] * float32(1/qmax),
//   code(v) = round_half_even(v * (1/scale)) clipped to +-qmax.
//
// ring.cuh holds the kernel for rows that fit in shared memory, fused.cu its variants with a
// prologue. This file holds the dispatch and the streaming kernel for all other rows. Rows that are
// too long are read twice from global memory, the second time mostly out of the L2 cache. Rows
// whose absmax is given, and casts without quantisation, need one pass only.
#include "lift/launch.cuh"
#include "lift/lift.h"

namespace slidejax::lift {

cudaError_t LaunchFused(const Args& args, cudaStream_t stream);  // fused.cu

// A row of x in global memory.
template <typename T>
class GlobalRow {
 public:
  __device__ GlobalRow(const RingParams& p, int64_t row)
      : begin_(static_cast<const char*>(p.x) + row * p.columns * static_cast<int64_t>(sizeof(T))),
        columns_(p.columns),
        aligned_(p.x_aligned) {}

  // Returns the eight columns from `column` on, with zeros past the end of the row.
  __device__ Chunk<T> Load(int column) const {
    Chunk<T> chunk = {};
    if (column >= columns_) return chunk;
    const char* address = begin_ + static_cast<int64_t>(column) * sizeof(T);
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < Chunk<T>::kWords; i += 4) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(address + 4 * i));
        chunk.word[i] = v.x, chunk.word[i + 1] = v.y, chunk.word[i + 2] = v.z,
        chunk.word[i + 3] = v.w;
      }
      return chunk;
    }
    // Reads every aligned granule that holds a byte of the row. A granule that is partly outside
    // the array shares its 16 bytes with a byte inside, so it is never outside the allocation.
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15);
    const char* const end = begin_ + static_cast<int64_t>(columns_) * sizeof(T);
    chunk = Shifted<T>(shift, [&](int i) {
      const char* const granule = address - shift + 16 * i;
      return granule < end ? __ldg(reinterpret_cast<const uint4*>(granule)) : uint4{};
    });
    return Masked(chunk, columns_ - column);
  }

 private:
  const char* begin_;
  int columns_;
  bool aligned_;
};

constexpr int kStreamingWarps = 8;

// Each thread block takes one row.
template <typename In, typename Out>
__global__ void __launch_bounds__(kLanes* kStreamingWarps)
    StreamKernel(const RingParams p, const float* const absmax_of_rows) {
  extern __shared__ __align__(16) char shared[];
  Begin(p);
  uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared);
  const int warps = blockDim.x / kLanes, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  char* const stage = shared + kReductionBytes + warp * StageBytes(p, p.n, p.steps, sizeof(Out));
  const int64_t row_index = blockIdx.x;
  const GlobalRow<In> row(p, row_index);
  const auto load = [&](int tile, int index) {
    return row.Load((tile * p.steps * kLanes + index) * kChunk);
  };

  AbsMax<In> absmax;
  if constexpr (kQuantised<Out>) {
    uint32_t bits;
    if (absmax_of_rows != nullptr) {
      bits = __float_as_uint(absmax_of_rows[row_index]) & 0x7fffffffu;
    } else {
      for (int tile = warp; tile < p.tiles; tile += warps) {
        for (int step = 0; step < p.steps; ++step) absmax.Add(load(tile, step * kLanes + lane));
      }
      bits = BlockMax(absmax.Bits(), maxima);
    }
    const RowScale s = ScaleOf<Out>(bits);
    if (threadIdx.x == 0) p.scale[row_index] = s.scale;
    for (int tile = warp; tile < p.tiles; tile += warps) {
      EmitTile<0, 0, true, In, Out>(p, row_index, tile, stage, s.factor,
                                    [&](int index) { return load(tile, index); });
    }
  } else {
    // The only use of absmax here is to find inf and nan.
    for (int tile = warp; tile < p.tiles; tile += warps) {
      EmitTile<0, 0, false, In, Out>(p, row_index, tile, stage, 1.0f, [&](int index) {
        const Chunk<In> chunk = load(tile, index);
        absmax.Add(chunk);
        return chunk;
      });
    }
    uint32_t bits = BlockMax(absmax.Bits(), maxima);
    if (absmax_of_rows != nullptr)
      bits = max(bits, __float_as_uint(absmax_of_rows[row_index]) & 0x7fffffffu);
    if (threadIdx.x == 0) p.scale[row_index] = ScaleOf<Out>(bits).scale;
  }
}

namespace {

template <typename In, typename Out>
cudaError_t LaunchStream(RingParams p, const float* absmax, cudaStream_t stream) {
  const int warps = std::min(p.tiles, kStreamingWarps);
  const int bytes = kReductionBytes + warps * StageBytes(p, p.n, p.steps, sizeof(Out));
  const auto kernel = StreamKernel<In, Out>;
  if (bytes > kDefaultSharedBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  void* arguments[] = {&p, &absmax};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(kLanes * warps),
                          arguments, bytes, stream);
}

template <typename In, typename Out>
cudaError_t LaunchQuantised(RingParams p, const float* absmax, const DeviceLimits& device,
                            cudaStream_t stream) {
  const RingGeometry geometry = ChooseGeometry(p, 1, sizeof(In), sizeof(Out), device);
  if (absmax == nullptr && geometry.warps > 0)
    return LaunchRingForN<In, Out, NoPrologue>(p, device, geometry, stream);
  return LaunchStream<In, Out>(p, absmax, stream);
}

}  // namespace

cudaError_t LiftQuantize(const Args& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  if (a.prologue != PrologueKind::kNone) return LaunchFused(a, stream);
  DeviceLimits device;
  if (const cudaError_t status = CurrentDevice(&device); status != cudaSuccess) return status;
  const RingParams p = RingParamsOf(a, device);
  return WithFloat(a.x_type, [&](auto x) {
    using In = decltype(x);
    if (Bytes(a.lifted_type) > 1) {
      return WithFloat(a.lifted_type, [&](auto to) {
        return LaunchStream<In, decltype(to)>(p, a.absmax, stream);
      });
    }
    return WithCode(a.lifted_type, [&](auto code) {
      return LaunchQuantised<In, decltype(code)>(p, a.absmax, device, stream);
    });
  });
}

}  // namespace slidejax::lift

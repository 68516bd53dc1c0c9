// The lift with a prologue (lift_prologue.cuh): a norm or an activation, and what it feeds, in one pass over x.
#include "lift_quantize.h"
#include "lift_ring.cuh"

namespace slidejax {
namespace {

template <typename In, typename Out, typename Prologue>
cudaError_t LaunchN(RingParams p, cudaStream_t stream) {
  RingDevice device;
  if (const cudaError_t status = CurrentDevice(&device); status != cudaSuccess) return status;
  const RingGeometry geometry = ChooseGeometry(p, Prologue::kSources, sizeof(In), sizeof(Out), device);
  if (geometry.warps == 0) return cudaErrorInvalidConfiguration;
  if constexpr (std::is_same_v<In, __nv_bfloat16>) {  // what models run in gets kernels of its own
    if (p.n == 1) return LaunchRing<In, Out, 1, Prologue>(p, device, geometry, stream);
    if (p.n == 4) return LaunchRing<In, Out, 4, Prologue>(p, device, geometry, stream);
  }
  return LaunchRing<In, Out, 0, Prologue>(p, device, geometry, stream);
}

template <typename In, typename Out>
cudaError_t LaunchPrologue(const RingParams& p, PrologueKind kind, cudaStream_t stream) {
  switch (kind) {
    case PrologueKind::kRmsNorm: return LaunchN<In, Out, RmsNormPrologue>(p, stream);
    case PrologueKind::kLayerNorm: return LaunchN<In, Out, LayerNormPrologue>(p, stream);
    case PrologueKind::kActivation: return LaunchN<In, Out, ActivationPrologue>(p, stream);
    case PrologueKind::kGlu: return LaunchN<In, Out, GluPrologue>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename In>
cudaError_t LaunchIn(const RingParams& p, const LiftArgs& a, cudaStream_t stream) {
  if (a.lifted_type == DType::kS8) return LaunchPrologue<In, int8_t>(p, a.prologue, stream);
  if (a.lifted_type == DType::kE4M3) return LaunchPrologue<In, __nv_fp8_e4m3>(p, a.prologue, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchFused(const LiftArgs& a, cudaStream_t stream) {
  const RingParams p = RingParamsOf(a);
  switch (a.x_type) {
    case DType::kBF16: return LaunchIn<__nv_bfloat16>(p, a, stream);
    case DType::kF16: return LaunchIn<__half>(p, a, stream);
    case DType::kF32: return LaunchIn<float>(p, a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace slidejax

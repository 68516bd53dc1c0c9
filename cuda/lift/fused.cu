// The lift with a prologue (prologue.cuh): a norm or an activation, and the lift of its result, in
// one pass over x.
#include "lift/launch.cuh"
#include "lift/lift.h"

namespace slidejax::lift {
namespace {

template <typename In, typename Out, typename Prologue>
cudaError_t Launch(RingParams p, const DeviceLimits& device, cudaStream_t stream) {
  const RingGeometry geometry =
      ChooseGeometry(p, Prologue::kSources, sizeof(In), sizeof(Out), device);
  if (geometry.warps == 0) return cudaErrorInvalidConfiguration;
  return LaunchRingForN<In, Out, Prologue>(p, device, geometry, stream);
}

}  // namespace

cudaError_t LaunchFused(const Args& a, cudaStream_t stream) {
  DeviceLimits device;
  if (const cudaError_t status = CurrentDevice(&device); status != cudaSuccess) return status;
  const RingParams p = RingParamsOf(a, device);
  return WithFloat(a.x_type, [&](auto x) {
    return WithCode(a.lifted_type, [&](auto code) {
      using In = decltype(x);
      using Out = decltype(code);
      switch (a.prologue) {
        case PrologueKind::kRmsNorm: return Launch<In, Out, RmsNormPrologue>(p, device, stream);
        case PrologueKind::kLayerNorm: return Launch<In, Out, LayerNormPrologue>(p, device, stream);
        case PrologueKind::kActivation:
          return Launch<In, Out, ActivationPrologue>(p, device, stream);
        case PrologueKind::kGlu: return Launch<In, Out, GluPrologue>(p, device, stream);
        default: return cudaErrorInvalidValue;
      }
    });
  });
}

}  // namespace slidejax::lift

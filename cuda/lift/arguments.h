// What FFI handlers that lift have in common.
#pragma once

#include <string>

#include "common/ffi_util.h"
#include "lift/lift.h"

namespace slidejax {

// Fills in the arguments of a lift with a prologue (0: none, else lift.h's numbers): x [M, K], up
// like x or [0], weight [K] or [0], bias [K] or [0] -> lifted [M, K'] in 8 bits, scale [M]. Returns
// what is wrong with them, or "".
std::string LiftArguments(const ffi::AnyBuffer& x, const ffi::AnyBuffer& up,
                          const ffi::Buffer<ffi::F32>& weight, const ffi::Buffer<ffi::F32>& bias,
                          const ffi::AnyBuffer& lifted, const ffi::Buffer<ffi::F32>& scale,
                          int32_t group, int32_t prologue, int32_t activation, float eps,
                          LiftArgs& args);

}  // namespace slidejax

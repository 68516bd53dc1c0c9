// The operands that the FFI handlers of the lifts have in common.
#pragma once

#include <string>
#include <string_view>

#include "common/ffi_util.h"
#include "lift/lift.h"

namespace slidejax::lift {

// The operands, results and attributes of a lift with a prologue, as a handler receives them.
struct FusedOperands {
  ffi::AnyBuffer x;              // [M, K]; of kGlu without up [M, 2 K]
  ffi::AnyBuffer up;             // like x, or [0]
  ffi::Buffer<ffi::F32> weight;  // [K] or [0]
  ffi::Buffer<ffi::F32> bias;    // [K] or [0]
  ffi::AnyBuffer lifted;         // [M, K'] of 8 bits
  ffi::Buffer<ffi::F32> scale;   // [M]
  int32_t group;                 // 2N, or 0
  std::string_view prologue, activation;
  float eps;
};

// Checks the operands and fills in the arguments of the lift. Returns what is wrong with them, or
// "".
std::string FusedArguments(const FusedOperands& operands, Args& args);

}  // namespace slidejax::lift

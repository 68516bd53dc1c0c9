// Helpers of the FFI handlers: dtypes, shapes in words, errors.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "common/dtype.h"
#include "xla/ffi/api/ffi.h"

namespace slidejax {

namespace ffi = ::xla::ffi;

inline std::optional<DType> DTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::S8: return DType::kS8;
    case ffi::F8E4M3FN: return DType::kE4M3;
    case ffi::BF16: return DType::kBF16;
    case ffi::F16: return DType::kF16;
    case ffi::F32: return DType::kF32;
    case ffi::S32: return DType::kS32;
    default: return std::nullopt;
  }
}

// Describes a buffer by its dtype and shape, as in "bfloat16[16,64]".
inline std::string Describe(const ffi::AnyBuffer& buffer) {
  const std::optional<DType> type = DTypeOf(buffer.element_type());
  std::string text =
      type ? Name(*type) : "dtype" + std::to_string(static_cast<int>(buffer.element_type()));
  text += "[";
  for (const int64_t dimension : buffer.dimensions())
    text += (text.back() == '[' ? "" : ",") + std::to_string(dimension);
  return text + "]";
}

template <typename Buffer>
int64_t Count(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

inline ffi::Error InvalidArgument(const std::string& op, const std::string& message) {
  return ffi::Error::InvalidArgument("slidejax " + op + ": " + message);
}

inline ffi::Error CudaError(const std::string& op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal("slidejax " + op + ": CUDA error " + std::to_string(status) + " (" +
                              cudaGetErrorString(status) + ")");
}

}  // namespace slidejax

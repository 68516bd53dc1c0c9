// The element types of slidejax's kernels.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

namespace slidejax {

enum class DType : int { kS8 = 0, kE4M3 = 1, kBF16 = 2, kF16 = 3, kF32 = 4, kS32 = 5 };

inline constexpr std::size_t Bytes(DType type) {
  return type == DType::kS8 || type == DType::kE4M3    ? 1
         : type == DType::kBF16 || type == DType::kF16 ? 2
                                                       : 4;
}

// The name that NumPy and JAX give a dtype.
inline constexpr const char* Name(DType type) {
  constexpr const char* kNames[] = {"int8",    "float8_e4m3fn", "bfloat16",
                                    "float16", "float32",       "int32"};
  return kNames[static_cast<int>(type)];
}

inline std::optional<DType> DTypeNamed(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(DType::kS32); ++i) {
    if (name == Name(static_cast<DType>(i))) return static_cast<DType>(i);
  }
  return std::nullopt;
}

}  // namespace slidejax

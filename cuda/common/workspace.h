// A call's workspace.
#pragma once

#include <cstdint>

#include "common/ffi_util.h"
#include "common/integers.h"

namespace slidejax {

// A workspace that is handed out from its beginning.
class Workspace {
 public:
  // alignment: of all parts, in bytes.
  Workspace(const ffi::Buffer<ffi::U8>& buffer, uintptr_t alignment)
      : alignment_(alignment),
        at_(reinterpret_cast<uintptr_t>(buffer.typed_data())),
        end_(at_ + buffer.element_count()) {}

  // Aligned memory.
  void* Take(int64_t bytes) {
    at_ = RoundUp<uintptr_t>(at_, alignment_) + bytes;
    return reinterpret_cast<void*>(at_ - bytes);
  }
  bool enough() const { return at_ <= end_; }

 private:
  uintptr_t alignment_, at_, end_;
};

}  // namespace slidejax

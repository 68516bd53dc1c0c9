// A table with one entry for each GPU of the process.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>

namespace slidejax {

// An Entry for each GPU. Any thread may ask for one.
template <typename Entry>
class DeviceTable {
 public:
  // Sets *entry to that of the current device. The first call for a device fills it in with
  // prepare(device number, entry), whose error this call and all later ones return.
  template <typename Prepare>
  cudaError_t Get(Entry** entry, const Prepare& prepare) {
    int id = 0;
    if (auto s = cudaGetDevice(&id)) return s;
    if (id >= kMaxDevices) return cudaErrorInvalidDevice;
    Slot& slot = slots_[id];
    std::call_once(slot.once, [&] { slot.status = prepare(id, slot.entry); });
    *entry = &slot.entry;
    return slot.status;
  }

 private:
  static constexpr int kMaxDevices = 64;
  struct Slot {
    std::once_flag once;
    cudaError_t status = cudaErrorInitializationError;
    Entry entry;
  };
  Slot slots_[kMaxDevices];
};

}  // namespace slidejax

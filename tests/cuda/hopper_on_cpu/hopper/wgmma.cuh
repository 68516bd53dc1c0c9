// The emulator's version of cuda/hopper/wgmma.cuh.
#pragma once

#include <type_traits>

#include "hopper/ptx.cuh"

namespace slidejax::hopper {

template <bool kFp8, int kN>
struct Wgmma {
  using Accumulator = std::conditional_t<kFp8, float, int>;
  static void Mma(Accumulator (&d)[kN / 2], uint64_t a, uint64_t b, uint32_t metadata, int add) {
    Issue(d, a, b, metadata, add, true);
  }
  static void Dense(Accumulator (&d)[kN / 2], uint64_t a, uint64_t b, int add) {
    Issue(d, a, b, 0, add, false);
  }

 private:
  static void Issue(Accumulator (&d)[kN / 2], uint64_t a, uint64_t b, uint32_t metadata, int add,
                    bool sparse) {
    auto& fiber = emulator::Current();
    auto& group = fiber.block->groups[fiber.thread / 128];
    const size_t index = fiber.instructions++;
    if (group.queue.size() <= index)
      group.queue.push_back(std::make_unique<emulator::Instruction>());
    auto& instruction = *group.queue[index];
    uint32_t* variable = reinterpret_cast<uint32_t*>(&d[0]);
    auto shadow = fiber.shadows.begin();
    while (shadow != fiber.shadows.end() && shadow->variable != variable) ++shadow;
    if (shadow == fiber.shadows.end()) {
      fiber.shadows.push_back({variable, {variable, variable + kN / 2}, 0});
      shadow = std::prev(fiber.shadows.end());
      for (auto& v : d) reinterpret_cast<uint32_t&>(v) = 0x7FA7A7A7;
    }
    shadow->last = index;
    const int thread = fiber.thread % 128;
    instruction.sums[thread] = shadow->values.data();
    instruction.metadata[thread] = metadata;
    if (instruction.issued++ == 0) {
      instruction.tokens = kN, instruction.add = add, instruction.a = a, instruction.b = b,
      instruction.fp8 = kFp8;
      instruction.sparse = sparse;
    } else if (instruction.tokens != kN || instruction.a != a || instruction.b != b ||
               instruction.add != add || instruction.sparse != sparse) {
      emulator::Fail("the threads of a warp group issue different instructions");
    }
  }
};

inline void WgmmaFence() {}
inline void WgmmaCommit() {
  emulator::Current().groups.push_back(emulator::Current().instructions);
}
template <int kPending>
void WgmmaWait() {
  auto& fiber = emulator::Current();
  if (fiber.groups.size() <= kPending) return;
  const size_t upto = fiber.groups[fiber.groups.size() - 1 - kPending];
  auto& group = fiber.block->groups[fiber.thread / 128];
  emulator::WaitUntil("wgmma", [&group, upto] { return group.done >= upto; });
  for (auto shadow = fiber.shadows.begin(); shadow != fiber.shadows.end();) {
    if (shadow->last >= upto) {
      ++shadow;
      continue;
    }
    std::memcpy(shadow->variable, shadow->values.data(), shadow->values.size() * 4);
    shadow = fiber.shadows.erase(shadow);
  }
}

template <int kSpan>
uint64_t Descriptor(uint32_t address) {
  if (address % 16) emulator::Fail("an operand is not 16-byte aligned");
  return uint64_t{kSpan} << 32 | address;
}

template <int kSize>
void Pin(float (&)[kSize]) {}
template <int kSize>
void Pin(int (&)[kSize]) {}

}  // namespace slidejax::hopper

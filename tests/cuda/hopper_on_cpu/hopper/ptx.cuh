// The emulator's version of cuda/hopper/ptx.cuh.
#pragma once

#include <cuda.h>

#include <utility>

#include "emulator.h"

#define SJ_DEVICE inline
#define SJ_DYNAMIC_SHARED(name) const void* name = nullptr

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

inline void __syncwarp() {
  auto& fiber = emulator::Current();
  auto& meeting = fiber.CurrentWarp().meeting;
  const uint64_t generation = meeting.generation;
  meeting.Arrive(32);
  emulator::WaitUntil("syncwarp",
                      [&meeting, generation] { return meeting.generation != generation; });
}
inline int __shfl_sync(unsigned, int value, int lane) {
  auto& warp = emulator::Current().CurrentWarp();
  warp.values[emulator::Current().thread % 32] = value;
  __syncwarp();
  const int result = warp.values[lane];
  __syncwarp();
  return result;
}
inline void __syncthreads() {
  auto& block = *emulator::Current().block;
  const uint64_t generation = block.all.generation;
  block.all.Arrive(static_cast<int>(block.warps.size()) * 32);
  emulator::WaitUntil("syncthreads",
                      [&block, generation] { return block.all.generation != generation; });
}
inline void __threadfence() {}
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline void __stcg(uint4* p, uint4 v) { *p = v; }
inline void LetOthersRun() {
  emulator::WaitUntil("its turn", [] { return true; });
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  LetOthersRun();
  return std::exchange(*p, *p + v);
}
inline unsigned long long atomicOr(unsigned long long* p, unsigned long long v) {
  LetOthersRun();
  return std::exchange(*p, *p | v);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    const auto byte = static_cast<uint8_t>(bytes >> (8 * (pick & 7)));
    const uint32_t sign = byte & 0x80 ? 0xff : 0;
    result |= (pick & 8 ? sign : byte) << (8 * i);
  }
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace slidejax::hopper {

inline uint32_t BytePermute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
inline constexpr uint64_t kEvictNormal = 0, kEvictFirst = 1, kEvictLast = 2;

inline uint32_t SharedAddress(const void* variable) { return emulator::SharedOffset(variable); }
inline uint32_t ClusterRank() { return emulator::Current().block->rank; }
inline int FreshThread() { return emulator::Current().thread; }

inline emulator::Barrier& BarrierAt(emulator::Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) emulator::Fail("no barrier at this address");
  return found->second;
}
inline emulator::Barrier& BarrierAt(uint32_t address) {
  return BarrierAt(*emulator::Current().block, address);
}
inline void BarrierInit(uint32_t barrier, int arrivals) {
  emulator::SharedBytes(*emulator::Current().block, barrier, 8);
  emulator::Current().block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void Arrive(emulator::Barrier& barrier) {
  if (--barrier.pending < 0) emulator::Fail("too many arrivals at a barrier");
  barrier.Settle();
}
inline void BarrierExpect(uint32_t barrier, int bytes) {
  BarrierAt(barrier).bytes += bytes;
  Arrive(BarrierAt(barrier));
}
inline void BarrierArrive(uint32_t barrier) { Arrive(BarrierAt(barrier)); }
inline void BarrierArriveAt(uint32_t barrier, uint32_t rank) {
  Arrive(BarrierAt(emulator::BlockOfCluster(rank), barrier));
}
inline void BarrierWait(uint32_t barrier, uint32_t parity) {
  auto& state = BarrierAt(barrier);
  emulator::WaitUntil("mbarrier", [&state, parity] { return (state.phase & 1) != parity; });
}
inline void FenceBarrierInit() {}
inline void ClusterSync() {
  auto& cluster = *emulator::Current().block->cluster;
  const uint64_t generation = cluster.all.generation;
  cluster.all.Arrive(cluster.threads);
  emulator::WaitUntil("cluster",
                      [&cluster, generation] { return cluster.all.generation != generation; });
}
inline void GridWait() {
  emulator::WaitUntil("the launch before", [] { return emulator::lift_has_ended; });
}
inline void GridRelease() {}
inline void NamedArrive(int id, int threads) {
  emulator::Current().block->named[id].Arrive(threads);
}
inline void NamedSync(int id, int threads) {
  auto& meeting = emulator::Current().block->named[id];
  const uint64_t generation = meeting.generation;
  meeting.Arrive(threads);
  emulator::WaitUntil("named barrier",
                      [&meeting, generation] { return meeting.generation != generation; });
}
inline constexpr int kSpinLimit = 50;  // turns of a thread, which are now and then too few
inline bool WaitCount(const int* counter, int n, int spins) {
  emulator::WaitUntil("count", [=]() mutable { return *counter >= n || --spins <= 0; });
  return *counter >= n;
}

inline void LoadTensor(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier,
                       uint16_t ranks) {
  const auto tensor = reinterpret_cast<const emulator::Tensor&>(*map);
  if (x * tensor.element % 16) emulator::Fail("a tensor copy does not begin at 16 bytes");
  size_t bytes = tensor.element;
  for (int i = 0; i < tensor.rank; ++i) bytes *= tensor.box[i];
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    auto& block = emulator::BlockOfCluster(rank);
    // From now on the copy may overwrite the bytes.
    std::memset(emulator::SharedBytes(block, dst, bytes), 0xA7, bytes);
    emulator::Later([=, &block] {
      emulator::CopyBox(tensor, {x, y, z}, block.shared.data(), dst, false);
      BarrierAt(block, barrier).bytes -= static_cast<int>(bytes);
      BarrierAt(block, barrier).Settle();
    });
  }
}
inline void TmaLoad2d(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier,
                      uint64_t) {
  LoadTensor(dst, map, x, y, 0, barrier, 1 << ClusterRank());
}
inline void TmaLoad2dMulticast(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier,
                               uint16_t ranks, uint64_t) {
  LoadTensor(dst, map, x, y, 0, barrier, ranks);
}
inline void TmaLoad3d(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier,
                      uint64_t) {
  LoadTensor(dst, map, x, y, z, barrier, 1 << ClusterRank());
}
inline void TmaLoad3dMulticast(uint32_t dst, const CUtensorMap* map, int x, int y, int z,
                               uint32_t barrier, uint16_t ranks, uint64_t) {
  LoadTensor(dst, map, x, y, z, barrier, ranks);
}
inline void TmaStore2d(const CUtensorMap* map, uint32_t src, int x, int y, uint64_t) {
  const auto tensor = reinterpret_cast<const emulator::Tensor&>(*map);
  auto& block = *emulator::Current().block;
  if (x * tensor.element % 16) emulator::Fail("a tensor copy does not begin at 16 bytes");
  const auto line = block.unfenced.lower_bound(src);
  if (line != block.unfenced.end() &&
      line->first < src + tensor.box[0] * tensor.box[1] * tensor.element) {
    emulator::Fail("a bulk copy may not see what a thread has written");
  }
  auto read = std::make_shared<bool>(false);
  emulator::Current().stores.push_back(read);
  emulator::Later([=, &block] {
    emulator::CopyBox(tensor, {x, y, 0}, block.shared.data(), src, true);
    *read = true;
  });
}
inline void BulkCommit() {}  // each store is a group of its own
template <int kPending>
void BulkWaitRead() {
  auto& stores = emulator::Current().stores;
  if (stores.size() <= kPending) return;
  emulator::WaitUntil("bulk store", [&stores] {
    for (size_t i = 0; i + kPending < stores.size(); ++i)
      if (!*stores[i]) return false;
    return true;
  });
}
inline void FenceAsyncShared() {
  auto& fiber = emulator::Current();
  std::erase_if(fiber.block->unfenced,
                [&](const auto& line) { return line.second == fiber.thread; });
}
inline void PrefetchMap(const CUtensorMap*) {}

template <int kRegisters>
void RegistersIncrease() {}
template <int kRegisters>
void RegistersDecrease() {}

template <class V>
V LoadShared(uint32_t address) {
  V v;
  std::memcpy(&v, emulator::SharedBytes(*emulator::Current().block, address, sizeof v), sizeof v);
  return v;
}
inline uint2 LoadShared2(uint32_t address) { return LoadShared<uint2>(address); }
inline float LoadSharedF32(uint32_t address) { return LoadShared<float>(address); }
inline float2 LoadShared2F(uint32_t address) { return LoadShared<float2>(address); }
inline uint4 LoadShared4(uint32_t address) { return LoadShared<uint4>(address); }
inline int4 LoadShared4I(uint32_t address) { return LoadShared<int4>(address); }
inline void StoreShared4(uint32_t address, int a, int b, int c, int d) {
  const int v[4] = {a, b, c, d};
  std::memcpy(emulator::SharedBytes(*emulator::Current().block, address, 16), v, 16);
}
inline void StoreRemote4(uint32_t address, uint32_t rank, uint4 v) {
  auto& block = emulator::BlockOfCluster(rank);
  if (!block.begun) emulator::Fail("a block that has not begun has no shared memory");
  std::memcpy(emulator::SharedBytes(block, address, 16), &v, 16);
}
inline void StoreShared4(uint32_t address, uint4 v) {
  std::memcpy(emulator::SharedBytes(*emulator::Current().block, address, 16), &v, 16);
}
inline void StoreSharedU32(uint32_t address, uint32_t v) {
  std::memcpy(emulator::SharedBytes(*emulator::Current().block, address, 4), &v, 4);
}
inline void StoreSharedF32(uint32_t address, float v) {
  std::memcpy(emulator::SharedBytes(*emulator::Current().block, address, 4), &v, 4);
}
inline void StoreMatricesTransposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                    uint32_t d) {
  auto& fiber = emulator::Current();
  auto& warp = fiber.CurrentWarp();
  const int lane = fiber.thread % 32;
  warp.addresses[lane] = address;
  const uint32_t values[4] = {a, b, c, d};
  std::memcpy(warp.registers[lane], values, 16);
  __syncwarp();
  // Lane i writes row i % 8 of matrix i / 8. As they are transposed, element j of the row is in
  // lane 4 j + row / 2, half row % 2.
  const int matrix = lane / 8, row = lane % 8;
  uint16_t line[8];
  for (int j = 0; j < 8; ++j)
    line[j] = static_cast<uint16_t>(warp.registers[4 * j + row / 2][matrix] >> (16 * (row % 2)));
  std::memcpy(emulator::SharedBytes(*fiber.block, address, 16), line, 16);
  fiber.block->unfenced[address] = fiber.thread;
  __syncwarp();
}
inline void CopyAsync4(uint32_t dst, const void* src, bool inside) {
  auto& block = *emulator::Current().block;
  std::memset(emulator::SharedBytes(block, dst, 4), 0xA7, 4);
  emulator::Current().copies.push_back([=, &block] {
    uint32_t v = 0;
    if (inside) std::memcpy(&v, src, 4);
    std::memcpy(emulator::SharedBytes(block, dst, 4), &v, 4);
  });
}
inline void CopyAsync8(uint32_t dst, const void* src, bool inside) {
  CopyAsync4(dst, src, inside);
  CopyAsync4(dst + 4, static_cast<const uint8_t*>(src) + 4, inside);
}
inline void CopyAsyncArrive(uint32_t barrier) {
  auto& block = *emulator::Current().block;
  emulator::Later([copies = std::exchange(emulator::Current().copies, {}), barrier, &block] {
    for (auto& copy : copies) copy();
    Arrive(BarrierAt(block, barrier));
  });
}
inline void CopyAsyncWait() {
  for (auto& copy : emulator::Current().copies) copy();
  emulator::Current().copies.clear();
}

}  // namespace slidejax::hopper

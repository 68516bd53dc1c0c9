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
  auto& fiber = emulator::current();
  auto& meeting = fiber.warp().meeting;
  const uint64_t generation = meeting.generation;
  meeting.arrive(32);
  emulator::wait_until("syncwarp",
                       [&meeting, generation] { return meeting.generation != generation; });
}
inline int __shfl_sync(unsigned, int value, int lane) {
  auto& warp = emulator::current().warp();
  warp.values[emulator::current().thread % 32] = value;
  __syncwarp();
  const int result = warp.values[lane];
  __syncwarp();
  return result;
}
inline void __syncthreads() {
  auto& block = *emulator::current().block;
  const uint64_t generation = block.all.generation;
  block.all.arrive(static_cast<int>(block.warps.size()) * 32);
  emulator::wait_until("syncthreads",
                       [&block, generation] { return block.all.generation != generation; });
}
inline void __threadfence() {}
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint4 __ldcg(const uint4* p) { return *p; }
inline void __stcg(uint4* p, uint4 v) { *p = v; }
inline void let_others_run() {
  emulator::wait_until("its turn", [] { return true; });
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  let_others_run();
  return std::exchange(*p, *p + v);
}
inline unsigned long long atomicOr(unsigned long long* p, unsigned long long v) {
  let_others_run();
  return std::exchange(*p, *p | v);
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace slidejax::hopper {

inline constexpr uint64_t kEvictNormal = 0, kEvictFirst = 1, kEvictLast = 2;

inline uint32_t shared_address(const void* variable) { return emulator::shared_offset(variable); }
inline uint32_t cluster_rank() { return emulator::current().block->rank; }
inline int fresh_thread() { return emulator::current().thread; }

inline emulator::Barrier& barrier_at(emulator::Block& block, uint32_t address) {
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) emulator::fail("no barrier at this address");
  return found->second;
}
inline emulator::Barrier& barrier_at(uint32_t address) {
  return barrier_at(*emulator::current().block, address);
}
inline void barrier_init(uint32_t barrier, int arrivals) {
  emulator::shared_bytes(*emulator::current().block, barrier, 8);
  emulator::current().block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void arrive(emulator::Barrier& barrier) {
  if (--barrier.pending < 0) emulator::fail("too many arrivals at a barrier");
  barrier.settle();
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  arrive(barrier_at(barrier));
}
inline void barrier_arrive(uint32_t barrier) { arrive(barrier_at(barrier)); }
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  arrive(barrier_at(emulator::block_of_cluster(rank), barrier));
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  auto& state = barrier_at(barrier);
  emulator::wait_until("mbarrier", [&state, parity] { return (state.phase & 1) != parity; });
}
inline void fence_barrier_init() {}
inline void cluster_sync() {
  auto& cluster = *emulator::current().block->cluster;
  const uint64_t generation = cluster.all.generation;
  cluster.all.arrive(cluster.threads);
  emulator::wait_until("cluster",
                       [&cluster, generation] { return cluster.all.generation != generation; });
}
inline void grid_wait() {
  emulator::wait_until("the launch before", [] { return emulator::lift_has_ended; });
}
inline void grid_release() {}
inline void named_arrive(int id, int threads) {
  emulator::current().block->named[id].arrive(threads);
}
inline void named_sync(int id, int threads) {
  auto& meeting = emulator::current().block->named[id];
  const uint64_t generation = meeting.generation;
  meeting.arrive(threads);
  emulator::wait_until("named barrier",
                       [&meeting, generation] { return meeting.generation != generation; });
}
inline constexpr int kPatience = 50;  // times that a thread's turn comes: now and then too few
inline bool wait_count(const int* counter, int n, int patience) {
  emulator::wait_until("count", [=]() mutable { return *counter >= n || --patience <= 0; });
  return *counter >= n;
}

inline void load_tensor(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier,
                        uint16_t ranks) {
  const auto tensor = reinterpret_cast<const emulator::Tensor&>(*map);
  size_t bytes = tensor.element;
  for (int i = 0; i < tensor.rank; ++i) bytes *= tensor.box[i];
  for (uint32_t rank = 0; rank < 16; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    auto& block = emulator::block_of_cluster(rank);
    std::memset(emulator::shared_bytes(block, dst, bytes), 0xA7,
                bytes);  // from now on it may be overwritten
    emulator::later([=, &block] {
      emulator::copy_box(tensor, {x, y, z}, block.shared.data(), dst, false);
      barrier_at(block, barrier).bytes -= static_cast<int>(bytes);
      barrier_at(block, barrier).settle();
    });
  }
}
inline void tma_load_2d(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier,
                        uint64_t) {
  load_tensor(dst, map, x, y, 0, barrier, 1 << cluster_rank());
}
inline void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, int x, int y,
                                  uint32_t barrier, uint16_t ranks, uint64_t) {
  load_tensor(dst, map, x, y, 0, barrier, ranks);
}
inline void tma_load_3d(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier,
                        uint64_t) {
  load_tensor(dst, map, x, y, z, barrier, 1 << cluster_rank());
}
inline void tma_load_3d_multicast(uint32_t dst, const CUtensorMap* map, int x, int y, int z,
                                  uint32_t barrier, uint16_t ranks, uint64_t) {
  load_tensor(dst, map, x, y, z, barrier, ranks);
}
inline void tma_store_2d(const CUtensorMap* map, uint32_t src, int x, int y, uint64_t) {
  const auto tensor = reinterpret_cast<const emulator::Tensor&>(*map);
  auto& block = *emulator::current().block;
  const auto line = block.unfenced.lower_bound(src);
  if (line != block.unfenced.end() &&
      line->first < src + tensor.box[0] * tensor.box[1] * tensor.element) {
    emulator::fail("a bulk copy may not see what a thread has written");
  }
  auto read = std::make_shared<bool>(false);
  emulator::current().stores.push_back(read);
  emulator::later([=, &block] {
    emulator::copy_box(tensor, {x, y, 0}, block.shared.data(), src, true);
    *read = true;
  });
}
inline void bulk_commit() {}  // each store is a group of its own
template <int kPending>
void bulk_wait_read() {
  auto& stores = emulator::current().stores;
  if (stores.size() <= kPending) return;
  emulator::wait_until("bulk store", [&stores] {
    for (size_t i = 0; i + kPending < stores.size(); ++i)
      if (!*stores[i]) return false;
    return true;
  });
}
inline void fence_async_shared() {
  auto& fiber = emulator::current();
  std::erase_if(fiber.block->unfenced,
                [&](const auto& line) { return line.second == fiber.thread; });
}
inline void prefetch_map(const CUtensorMap*) {}

template <int kRegisters>
void registers_increase() {}
template <int kRegisters>
void registers_decrease() {}

template <class V>
V load_shared(uint32_t address) {
  V v;
  std::memcpy(&v, emulator::shared_bytes(*emulator::current().block, address, sizeof v), sizeof v);
  return v;
}
inline uint2 load_shared_2(uint32_t address) { return load_shared<uint2>(address); }
inline float load_shared_f32(uint32_t address) { return load_shared<float>(address); }
inline float2 load_shared_2f(uint32_t address) { return load_shared<float2>(address); }
inline uint4 load_shared_4(uint32_t address) { return load_shared<uint4>(address); }
inline int4 load_shared_4i(uint32_t address) { return load_shared<int4>(address); }
inline void store_shared_4(uint32_t address, int a, int b, int c, int d) {
  const int v[4] = {a, b, c, d};
  std::memcpy(emulator::shared_bytes(*emulator::current().block, address, 16), v, 16);
}
inline void store_remote_4(uint32_t address, uint32_t rank, uint4 v) {
  auto& block = emulator::block_of_cluster(rank);
  if (!block.begun) emulator::fail("a block that has not begun has no shared memory");
  std::memcpy(emulator::shared_bytes(block, address, 16), &v, 16);
}
inline void store_shared_4(uint32_t address, uint4 v) {
  std::memcpy(emulator::shared_bytes(*emulator::current().block, address, 16), &v, 16);
}
inline void store_shared_f32(uint32_t address, float v) {
  std::memcpy(emulator::shared_bytes(*emulator::current().block, address, 4), &v, 4);
}
inline void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                      uint32_t d) {
  auto& fiber = emulator::current();
  auto& warp = fiber.warp();
  const int lane = fiber.thread % 32;
  warp.addresses[lane] = address;
  const uint32_t values[4] = {a, b, c, d};
  std::memcpy(warp.registers[lane], values, 16);
  __syncwarp();
  // Lane i writes row i % 8 of matrix i / 8: transposed, so element j of it is in lane 4 j + row /
  // 2, half row % 2.
  const int matrix = lane / 8, row = lane % 8;
  uint16_t line[8];
  for (int j = 0; j < 8; ++j)
    line[j] = static_cast<uint16_t>(warp.registers[4 * j + row / 2][matrix] >> (16 * (row % 2)));
  std::memcpy(emulator::shared_bytes(*fiber.block, address, 16), line, 16);
  fiber.block->unfenced[address] = fiber.thread;
  __syncwarp();
}
inline void copy_async_4(uint32_t dst, const void* src, bool inside) {
  auto& block = *emulator::current().block;
  std::memset(emulator::shared_bytes(block, dst, 4), 0xA7, 4);
  emulator::current().copies.push_back([=, &block] {
    uint32_t v = 0;
    if (inside) std::memcpy(&v, src, 4);
    std::memcpy(emulator::shared_bytes(block, dst, 4), &v, 4);
  });
}
inline void copy_async_wait() {
  for (auto& copy : emulator::current().copies) copy();
  emulator::current().copies.clear();
}

}  // namespace slidejax::hopper

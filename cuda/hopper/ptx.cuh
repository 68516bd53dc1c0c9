// Hopper's instructions that CUDA C++ has no names for: barriers, bulk tensor copies, warp-group
// fences.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace slidejax::hopper {

#define SJ_DEVICE __device__ __forceinline__
#define SJ_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

SJ_DEVICE uint32_t ClusterRank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}

// Returns threadIdx.x, which the compiler reads anew each time. So it keeps no registers for values
// that follow from it.
SJ_DEVICE int FreshThread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Looks at most `spins` times whether the counter has reached n, and returns whether it has. If so,
// this thread can read the data that others wrote before they fenced and counted.
SJ_DEVICE bool WaitCount(const int* counter, int n, int spins) {
  int v;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  } while (v < n && --spins > 0);
  return v >= n;
}
// This number of looks takes some milliseconds, far more than clusters that run side by side need.
inline constexpr int kSpinLimit = 4096;

// ---- mbarrier. Arrive and wait carry no .release.cluster and no .acquire.cluster, because those
// forms compile to MEMBAR.ALL.GPU and CCTL.IVALL for each stage. They are not needed: what is
// handed over to another CTA is read and written by the asynchronous proxy alone (TMA, wgmma), or
// TMA has written it and LDS reads it, which the barrier's completion orders.
SJ_DEVICE void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
SJ_DEVICE void BarrierExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
SJ_DEVICE void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
SJ_DEVICE void BarrierArriveAt(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
SJ_DEVICE bool BarrierTry(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
SJ_DEVICE void BarrierWait(uint32_t barrier, uint32_t parity) {
#ifdef SLIDEJAX_HOPPER_TRAP  // for development: a hang becomes an error
  for (uint32_t i = 0; !BarrierTry(barrier, parity); ++i)
    if (i > (1u << 22)) __trap();
#else
  while (!BarrierTry(barrier, parity)) {
  }
#endif
}

SJ_DEVICE void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SJ_DEVICE void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
SJ_DEVICE void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

SJ_DEVICE void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Bulk tensor copies. `policy` is an L2 eviction policy in the encoding of createpolicy.
inline constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
inline constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

SJ_DEVICE void TmaLoad2d(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier,
                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}
SJ_DEVICE void TmaLoad2dMulticast(uint32_t dst, const CUtensorMap* map, int x, int y,
                                  uint32_t barrier, uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(ctas), "l"(policy)
      : "memory");
}
SJ_DEVICE void TmaLoad3d(uint32_t dst, const CUtensorMap* map, int x, int y, int z,
                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
      : "memory");
}
SJ_DEVICE void TmaLoad3dMulticast(uint32_t dst, const CUtensorMap* map, int x, int y, int z,
                                  uint32_t barrier, uint16_t ctas, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6, %7;" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(ctas), "l"(policy)
      : "memory");
}
// Copies from shared memory to a tensor, asynchronously. The thread that has issued groups of
// stores can wait for them.
SJ_DEVICE void TmaStore2d(const CUtensorMap* map, uint32_t src, int x, int y, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint "
      "[%0, {%1, %2}], [%3], %4;" ::"l"(map),
      "r"(x), "r"(y), "r"(src), "l"(policy)
      : "memory");
}
SJ_DEVICE void BulkCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
SJ_DEVICE void BulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
SJ_DEVICE void FenceAsyncShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
SJ_DEVICE void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- Warp groups
template <int kRegisters>
SJ_DEVICE void RegistersIncrease() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SJ_DEVICE void RegistersDecrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
SJ_DEVICE void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SJ_DEVICE void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
SJ_DEVICE void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The shared-memory matrix descriptor of a K-major operand whose rows are exactly one swizzle span
// wide (64 or 128 bytes). Eight rows are 8 spans apart, and the leading offset is unused. A step
// along K inside the span adds bytes / 16 to the descriptor.
template <int kSpan>
SJ_DEVICE uint64_t Descriptor(uint32_t address) {
  static_assert(kSpan == 64 || kSpan == 128);
  constexpr uint64_t kFixed =
      (1ull << 16) | (uint64_t{kSpan * 8 / 16} << 32) | (uint64_t{kSpan == 128 ? 1 : 2} << 62);
  return kFixed | (address >> 4);
}

// __byte_perm without its mask for bits that no selector here has.
SJ_DEVICE uint32_t BytePermute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// ---- Small copies
SJ_DEVICE uint2 LoadShared2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
SJ_DEVICE float LoadSharedF32(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
SJ_DEVICE float2 LoadShared2F(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
SJ_DEVICE uint4 LoadShared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
SJ_DEVICE int4 LoadShared4I(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
SJ_DEVICE void StoreShared4(uint32_t address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// The same into the shared memory of another CTA of the cluster.
SJ_DEVICE void StoreRemote4(uint32_t address, uint32_t rank, uint4 v) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};}" ::"r"(address),
      "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
}
SJ_DEVICE void StoreShared4(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
SJ_DEVICE void StoreSharedU32(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
SJ_DEVICE void StoreSharedF32(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
// Stores four 8x8 matrices of 16-bit elements, transposed. Lane i gives the address of row i % 8 of
// matrix i / 8.
SJ_DEVICE void StoreMatricesTransposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                       uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}
// Copies four or eight bytes asynchronously. Where `inside` is false they write zeros and read
// nothing. The copy of eight bytes brings 256 bytes to L2, where the next ones will find theirs.
SJ_DEVICE void CopyAsync4(uint32_t dst, const void* src, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src),
               "r"(inside ? 4 : 0)
               : "memory");
}
SJ_DEVICE void CopyAsync8(uint32_t dst, const void* src, bool inside) {
  asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], 8, %2;" ::"r"(dst), "l"(src),
               "r"(inside ? 8 : 0)
               : "memory");
}
// Arrives at a barrier when all copies of this thread have arrived. The barrier counts threads.
SJ_DEVICE void CopyAsyncArrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
SJ_DEVICE void CopyAsyncWait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace slidejax::hopper

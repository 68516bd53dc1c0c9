// The instructions of the decode kernel that CUDA C++ has no names for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/ptx.cuh"

namespace slidejax::decode {

// Asynchronous copies to shared memory of 16 and 8 bytes; with `valid` false, of zeros.
__device__ inline void Copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void Copy8(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 8 : 0)
               : "memory");
}

__device__ inline void Copy4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// Waits until at most kPending of the thread's groups of copies are under way.
template <int kPending>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Words of shared memory that warps pass to each other. A warp's accesses to shared memory happen
// in the order of the program, so no fence is needed beside these; a fence would also wait for its
// copies.
__device__ inline int AddShared(int* p, int value) {
  int before;
  asm volatile("atom.relaxed.cta.shared.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(SharedAddress(p)), "r"(value)
               : "memory");
  return before;
}

__device__ inline int LoadShared(const int* p) {
  int value;
  asm volatile("ld.relaxed.cta.shared.s32 %0, [%1];"
               : "=r"(value)
               : "r"(SharedAddress(p))
               : "memory");
  return value;
}

__device__ inline void StoreShared(int* p, int value) {
  asm volatile("st.relaxed.cta.shared.s32 [%0], %1;" ::"r"(SharedAddress(p)), "r"(value)
               : "memory");
}

// Two e4m3 numbers in float16, which holds them exactly. The host launches no code older than
// architecture 89.
__device__ inline __half2 HalvesOf(uint16_t numbers) {
  uint32_t halves = 0;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(numbers));
#endif
  return *reinterpret_cast<const __half2*>(&halves);
}

// Keeps a pointer in registers, which the compiler would otherwise compute again and again.
template <typename T>
__device__ inline void Keep(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Sums of a 16 x 8 tile: a lane holds rows lane / 4 and + 8 of columns 2 (lane % 4) and + 1.
struct SumsS32 {
  int32_t v[4] = {};
};
struct SumsF32 {
  float v[4] = {};
};

// sums += A B with A 16 x 64 of 2:4 sparse int8 (its kept values, 4 a register), B 64 x 8.
__device__ inline void MultiplySparse(SumsS32& c, const uint32_t (&a)[4], const uint4& b,
                                      uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+r"(c.v[0]), "+r"(c.v[1]), "+r"(c.v[2]), "+r"(c.v[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
        "r"(metadata));
}

// sums += A B with A 16 x 32 and B 32 x 8, dense.
__device__ inline void MultiplyDense(SumsS32& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c.v[0]), "+r"(c.v[1]), "+r"(c.v[2]), "+r"(c.v[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of e4m3, which exists from architecture 89 on. The host launches no older code.
__device__ inline void MultiplySparse(SumsF32& c, const uint32_t (&a)[4], const uint4& b,
                                      uint32_t metadata) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
        "r"(metadata));
#endif
}

__device__ inline void MultiplyDense(SumsF32& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 890
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four matrices of 8 rows of 16 bytes: matrix i has its rows where lanes 8 i to 8 i + 7 say. Lane
// (g, t) of the quads gets word t of row g of each of them.
__device__ inline void LoadMatrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// sums += A B with A 16 x 32 of 2:4 sparse values of 16 bits, B 32 x 8. Lanes 2 kSelector and + 1
// of each quad supply the metadata.
template <typename Value, int kSelector>
__device__ inline void MultiplySparse(SumsF32& c, const uint32_t (&a)[4], const uint4& b,
                                      uint32_t metadata) {
  if constexpr (std::is_same_v<Value, __nv_bfloat16>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
          "r"(metadata), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
          "r"(metadata), "n"(kSelector));
  }
}

// sums += A B with A 16 x 16 and B 16 x 8, dense values of 16 bits.
template <typename Value>
__device__ inline void MultiplyDense(SumsF32& c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Value, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace slidejax::decode

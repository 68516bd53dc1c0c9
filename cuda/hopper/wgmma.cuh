// wgmma.sp and wgmma for 8-bit operands in shared memory, specialised for each width of the
// accumulators.
//
// Sparse: D[64, n] (+)= A[64, 64] * B[n, 64]^T, where A is 2:4 sparse with 32 bytes a row. Dense:
// D[64, n] (+)= A[64, 32] * B[n, 32]^T. Operands are e4m3 with float32 accumulators, or s8 with
// int32 ones. PTX cannot take an array, so macros paste the operand lists together from groups of
// eight registers.
#pragma once

#include <cstdint>

#include "hopper/ptx.cuh"

namespace slidejax::hopper {

// Operand numbers of the accumulators, eight to a macro.
#define SJ_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SJ_R1 "%8,%9,%10,%11,%12,%13,%14,%15"
#define SJ_R2 "%16,%17,%18,%19,%20,%21,%22,%23"
#define SJ_R3 "%24,%25,%26,%27,%28,%29,%30,%31"
#define SJ_R4 "%32,%33,%34,%35,%36,%37,%38,%39"
#define SJ_R5 "%40,%41,%42,%43,%44,%45,%46,%47"
#define SJ_R6 "%48,%49,%50,%51,%52,%53,%54,%55"
#define SJ_R7 "%56,%57,%58,%59,%60,%61,%62,%63"
#define SJ_R8 "%64,%65,%66,%67,%68,%69,%70,%71"
#define SJ_R9 "%72,%73,%74,%75,%76,%77,%78,%79"
#define SJ_R10 "%80,%81,%82,%83,%84,%85,%86,%87"
#define SJ_R11 "%88,%89,%90,%91,%92,%93,%94,%95"
#define SJ_R12 "%96,%97,%98,%99,%100,%101,%102,%103"
#define SJ_R13 "%104,%105,%106,%107,%108,%109,%110,%111"
#define SJ_R14 "%112,%113,%114,%115,%116,%117,%118,%119"
#define SJ_R15 "%120,%121,%122,%123,%124,%125,%126,%127"

#define SJ_R_8 SJ_R0
#define SJ_R_16 SJ_R_8 "," SJ_R1
#define SJ_R_32 SJ_R_16 "," SJ_R2 "," SJ_R3
#define SJ_R_64 SJ_R_32 "," SJ_R4 "," SJ_R5 "," SJ_R6 "," SJ_R7
#define SJ_R_80 SJ_R_64 "," SJ_R8 "," SJ_R9
#define SJ_R_96 SJ_R_64 "," SJ_R8 "," SJ_R9 "," SJ_R10 "," SJ_R11
#define SJ_R_128 SJ_R_96 "," SJ_R12 "," SJ_R13 "," SJ_R14 "," SJ_R15

// The accumulators as read-write operands with the constraint c.
#define SJ_O8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define SJ_O_8(c) SJ_O8(c, 0)
#define SJ_O_16(c) SJ_O_8(c), SJ_O8(c, 8)
#define SJ_O_32(c) SJ_O_16(c), SJ_O8(c, 16), SJ_O8(c, 24)
#define SJ_O_64(c) SJ_O_32(c), SJ_O8(c, 32), SJ_O8(c, 40), SJ_O8(c, 48), SJ_O8(c, 56)
#define SJ_O_80(c) SJ_O_64(c), SJ_O8(c, 64), SJ_O8(c, 72)
#define SJ_O_96(c) SJ_O_64(c), SJ_O8(c, 64), SJ_O8(c, 72), SJ_O8(c, 80), SJ_O8(c, 88)
#define SJ_O_128(c) SJ_O_96(c), SJ_O8(c, 96), SJ_O8(c, 104), SJ_O8(c, 112), SJ_O8(c, 120)

// kFp8: e4m3 with float accumulators, or s8 with int32 ones. kN: tokens.
template <bool kFp8, int kN>
struct Wgmma;

// The parameters are n, its number of accumulators, and the numbers of the operands after them: the
// descriptors of A and B, metadata, and whether to add to D. On the first step of a tile that is 0,
// so that the accumulators need no clearing.
#define SJ_WGMMA_TYPE(FP8, C, CONSTRAINT, NAME, TAIL, n, acc, a, b, e, p)                          \
  template <>                                                                                      \
  struct Wgmma<FP8, n> {                                                                           \
    using Accumulator = C;                                                                         \
    static __device__ __forceinline__ void Mma(C (&d)[acc], uint64_t da, uint64_t db,              \
                                               uint32_t meta, int add) {                           \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #p                                            \
                   ", 0; wgmma.mma_async.sp.sync.aligned.m64n" #n "k64." NAME " {" SJ_R_##acc      \
                   "}, %" #a ", %" #b ", %" #e ", 0, p" TAIL ";}"                                  \
                   : SJ_O_##acc(CONSTRAINT)                                                        \
                   : "l"(da), "l"(db), "r"(meta), "r"(add));                                       \
    }                                                                                              \
    static __device__ __forceinline__ void Dense(C (&d)[acc], uint64_t da, uint64_t db, int add) { \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #e                                            \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k32." NAME " {" SJ_R_##acc         \
                   "}, %" #a ", %" #b ", p" TAIL ";}"                                              \
                   : SJ_O_##acc(CONSTRAINT)                                                        \
                   : "l"(da), "l"(db), "r"(add));                                                  \
    }                                                                                              \
  };
#define SJ_WGMMA(n, acc, a, b, e, p)                                              \
  SJ_WGMMA_TYPE(true, float, "+f", "f32.e4m3.e4m3", ", 1, 1", n, acc, a, b, e, p) \
  SJ_WGMMA_TYPE(false, int, "+r", "s32.s8.s8", "", n, acc, a, b, e, p)

SJ_WGMMA(16, 8, 8, 9, 10, 11)
SJ_WGMMA(32, 16, 16, 17, 18, 19)
SJ_WGMMA(64, 32, 32, 33, 34, 35)
SJ_WGMMA(128, 64, 64, 65, 66, 67)
SJ_WGMMA(160, 80, 80, 81, 82, 83)
SJ_WGMMA(192, 96, 96, 97, 98, 99)
SJ_WGMMA(256, 128, 128, 129, 130, 131)

#undef SJ_WGMMA
#undef SJ_WGMMA_TYPE

// The compiler does not know that wgmma still writes d after its asm statement. No read of d moves
// above this.
template <int kSize>
SJ_DEVICE void Pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
SJ_DEVICE void Pin(int (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

}  // namespace slidejax::hopper

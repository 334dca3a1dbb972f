// wgmma: warpgroup-wide integer matrix multiply from shared memory (sm_90a only).
#pragma once

#include <cstdint>

namespace hwkern::ptx {

// A K-major operand tile as TMA lays it out with the 128-byte swizzle: rows of 128 bytes, 8 rows an atom of 1024 bytes.
// `smem` is 1024-byte aligned, plus 32 bytes for each k32 step. Bits: address / 16, stride between atoms / 16, swizzle 1.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t smem) {
  return (uint64_t{smem & 0x3ffff} >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// Orders register accesses before the first wgmma of a group that reads them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most PENDING committed groups are still under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

#define HWKERN_D4(i) "+r"(D[i]), "+r"(D[i + 1]), "+r"(D[i + 2]), "+r"(D[i + 3])
#define HWKERN_D8(i) HWKERN_D4(i), HWKERN_D4(i + 4)
#define HWKERN_D16(i) HWKERN_D8(i), HWKERN_D8(i + 8)
#define HWKERN_D32(i) HWKERN_D16(i), HWKERN_D16(i + 16)
#define HWKERN_D64(i) HWKERN_D32(i), HWKERN_D32(i + 32)
#define HWKERN_REGS8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HWKERN_REGS16 HWKERN_REGS8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HWKERN_REGS24 HWKERN_REGS16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define HWKERN_REGS32 HWKERN_REGS24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define HWKERN_REGS40 HWKERN_REGS32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define HWKERN_REGS48 HWKERN_REGS40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define HWKERN_REGS64 HWKERN_REGS48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HWKERN_REGS72 HWKERN_REGS64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define HWKERN_REGS80 HWKERN_REGS64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define HWKERN_REGS88 HWKERN_REGS80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define HWKERN_REGS96 HWKERN_REGS80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define HWKERN_REGS112 \
  HWKERN_REGS96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define HWKERN_REGS128 \
  HWKERN_REGS112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// D[64×N] (+)= A[64×32] · B[N×32]ᵀ, int8 in, int32 out, both operands in shared memory; `accumulate` false starts anew.
// D's layout in each of the four warps is that of N / 8 mma.sync m16n8 fragments in a row. A_, B_ and P_ name the
// operands by their numbers, which follow the N / 2 registers of D.
#define HWKERN_WGMMA(N, REGISTERS, A_, B_, P_, ...)                                                               \
  __device__ __forceinline__ void wgmma_m64k32_s8(int32_t (&D)[N / 2], uint64_t A, uint64_t B, bool accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P_ ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N              \
                 "k32.s32.s8.s8 {" REGISTERS "}, " A_ ", " B_ ", p;\n}\n"                                         \
                 : __VA_ARGS__                                                                                    \
                 : "l"(A), "l"(B), "r"(int{accumulate}));                                                         \
  }
HWKERN_WGMMA(16, HWKERN_REGS8, "%8", "%9", "%10", HWKERN_D8(0))
HWKERN_WGMMA(32, HWKERN_REGS16, "%16", "%17", "%18", HWKERN_D16(0))
HWKERN_WGMMA(64, HWKERN_REGS32, "%32", "%33", "%34", HWKERN_D32(0))
HWKERN_WGMMA(80, HWKERN_REGS40, "%40", "%41", "%42", HWKERN_D32(0), HWKERN_D8(32))
HWKERN_WGMMA(96, HWKERN_REGS48, "%48", "%49", "%50", HWKERN_D32(0), HWKERN_D16(32))
HWKERN_WGMMA(128, HWKERN_REGS64, "%64", "%65", "%66", HWKERN_D64(0))
HWKERN_WGMMA(144, HWKERN_REGS72, "%72", "%73", "%74", HWKERN_D64(0), HWKERN_D8(64))
HWKERN_WGMMA(160, HWKERN_REGS80, "%80", "%81", "%82", HWKERN_D64(0), HWKERN_D16(64))
HWKERN_WGMMA(176, HWKERN_REGS88, "%88", "%89", "%90", HWKERN_D64(0), HWKERN_D16(64), HWKERN_D8(80))
HWKERN_WGMMA(192, HWKERN_REGS96, "%96", "%97", "%98", HWKERN_D64(0), HWKERN_D32(64))
HWKERN_WGMMA(224, HWKERN_REGS112, "%112", "%113", "%114", HWKERN_D64(0), HWKERN_D32(64), HWKERN_D16(96))
HWKERN_WGMMA(256, HWKERN_REGS128, "%128", "%129", "%130", HWKERN_D64(0), HWKERN_D64(64))

#undef HWKERN_D4
#undef HWKERN_D8
#undef HWKERN_D16
#undef HWKERN_D32
#undef HWKERN_D64
#undef HWKERN_REGS8
#undef HWKERN_REGS16
#undef HWKERN_REGS24
#undef HWKERN_REGS32
#undef HWKERN_REGS40
#undef HWKERN_REGS48
#undef HWKERN_REGS64
#undef HWKERN_REGS72
#undef HWKERN_REGS80
#undef HWKERN_REGS88
#undef HWKERN_REGS96
#undef HWKERN_REGS112
#undef HWKERN_REGS128
#undef HWKERN_WGMMA

// Moves registers between warpgroups. All warps of a warpgroup, once, with a register cap at kernel entry.
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(REGISTERS));
}

}  // namespace hwkern::ptx

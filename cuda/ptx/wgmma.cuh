// wgmma: a warpgroup (128 threads) computes d += a · b asynchronously (PTX ISA 9.7.15, sm_90a). a is 64 x 16 in
// registers, b is 16 x kN in shared memory, and d is 64 x kN in float32.
//
// In warp w of the four, lane (g = lane/4, t = lane%4) holds, for rows 16w + g and 16w + g + 8:
//   a0 = a[g][2t, 2t+1]   a1 = a[g+8][2t, 2t+1]   a2 = a[g][2t+8, 2t+9]   a3 = a[g+8][2t+8, 2t+9]
//   d[j][0], d[j][1] = d[g][8j+2t, 8j+2t+1]       d[j][2], d[j][3] = d[g+8][8j+2t, 8j+2t+1]
#pragma once

#include <cstdint>

#include "cpp/format/dtypes.h"
#include "cuda/ptx/hold.cuh"

namespace qlora::ptx {

// Call before the first wgmma of a group: completes other instructions' writes to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of all wgmma issued since the last commit.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups are in flight. Registers and shared memory that those groups use must not be
// touched. Those that completed groups read are free again.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_but() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Waits for all groups. `d` is their result: naming it here keeps the compiler from moving its uses ahead of the wait.
template <int kTiles>
__device__ __forceinline__ void wgmma_wait(float (&d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int j = 0; j < kTiles; ++j) hold(d[j]);
}

// Builds the descriptor of b at a shared address aligned to 1024. Each column n has 128 bytes, 64 values of k. Columns
// lie in groups of 8, with the 128-byte swizzle of TMA. The descriptor takes 18 bits of the address (PTX ISA,
// matrix-descriptor-encode): in a cluster, the bits from 24 on hold the CTA's rank.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = 1, kBlockStride = 1024 / 16;
  return kSwizzle128 << 62 | kBlockStride << 32 | (shared & 0x3FFFF) >> 4;
}
inline constexpr int kWgmmaStep = 32 / 16;  // added to a descriptor to reach the next 16 values of k

// clang-format off
#define QLORA_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define QLORA_D4(j) QLORA_D1(j), QLORA_D1(j + 1), QLORA_D1(j + 2), QLORA_D1(j + 3)
#define QLORA_D8 QLORA_D4(0), QLORA_D4(4)
#define QLORA_D16 QLORA_D8, QLORA_D4(8), QLORA_D4(12)
#define QLORA_D32 QLORA_D16, QLORA_D4(16), QLORA_D4(20), QLORA_D4(24), QLORA_D4(28)
#define QLORA_R8 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLORA_R16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QLORA_R32 \
  QLORA_R16 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Defines one specialization. A, B and SCALE are the operands after those of d.
#define QLORA_WGMMA(T, TYPE, N, TILES, A, B, SCALE)                                                                \
  template <bool kFirst>                                                                                           \
  __device__ __forceinline__ void wgmma_k16(T, float (&d)[TILES][4], const uint32_t (&a)[4], uint64_t b) {         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" QLORA_R##TILES "}, {" A "}, " \
                 B ", " SCALE ", 1, 1, 0;"                                                                         \
                 : QLORA_D##TILES                                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(!kFirst));                              \
  }
// clang-format on

// d += a · b, or d = a · b for the first product of a sum. The first argument only selects the type of a and b.
QLORA_WGMMA(bfloat16, "bf16", "64", 8, "%32, %33, %34, %35", "%36", "%37")
QLORA_WGMMA(bfloat16, "bf16", "128", 16, "%64, %65, %66, %67", "%68", "%69")
QLORA_WGMMA(bfloat16, "bf16", "256", 32, "%128, %129, %130, %131", "%132", "%133")
QLORA_WGMMA(float16, "f16", "64", 8, "%32, %33, %34, %35", "%36", "%37")
QLORA_WGMMA(float16, "f16", "128", 16, "%64, %65, %66, %67", "%68", "%69")
QLORA_WGMMA(float16, "f16", "256", 32, "%128, %129, %130, %131", "%132", "%133")

#undef QLORA_WGMMA
#undef QLORA_R32
#undef QLORA_R16
#undef QLORA_R8
#undef QLORA_D32
#undef QLORA_D16
#undef QLORA_D8
#undef QLORA_D4
#undef QLORA_D1

}  // namespace qlora::ptx

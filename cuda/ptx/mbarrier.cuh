// mbarrier: barriers in shared memory that count arrivals and, for bulk copies, bytes (PTX ISA 9.7.13.15, sm_90). A
// phase is complete when all arrivals and bytes that it expects have come; phases have parities 0, 1, 0, 1...
#pragma once

#include <cstdint>

namespace qlora::ptx {

// 8 bytes at `barrier`, whose phases each take `arrivals`.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's initialisations visible to bulk copies; other threads still need a barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A thread for which `arrives` does not hold does nothing.
template <int kOffset>
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, bool arrives) {
  asm volatile(
      "{\n\t.reg .pred arrives;\n\tsetp.ne.u32 arrives, %1, 0;\n\t"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0 + %2];\n\t}" ::"r"(barrier),
      "r"(static_cast<uint32_t>(arrives)), "n"(kOffset)
      : "memory");
}

// Arrives, and makes the phase wait for `bytes` of bulk copies besides.
template <int kOffset>
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0 + %2], %1;" ::"r"(barrier), "r"(bytes), "n"(kOffset)
               : "memory");
}

// Waits for the end of the phase of this parity. Before the first phase, the one of parity 1 counts as ended.
template <int kOffset>
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0 + %2], %1;\n\t@!done bra again;\n\t}" ::"r"(
          barrier),
      "r"(parity), "n"(kOffset)
      : "memory");
}

}  // namespace qlora::ptx

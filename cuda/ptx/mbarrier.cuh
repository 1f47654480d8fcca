// mbarrier: barriers in shared memory that count arrivals and, for bulk copies, bytes (PTX ISA 9.7.13.15, sm_90). A
// phase is complete when all arrivals and bytes that it expects have come. The parities of successive phases are 0, 1,
// 0, 1...
#pragma once

#include <cstdint>

namespace qlora::ptx {

// Initializes the 8-byte barrier at `barrier`. Each of its phases expects `arrivals` arrivals.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes this thread's initializations visible to bulk copies. Other threads still need a barrier.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives if `arrives`, and does nothing otherwise.
template <int kOffset>
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, bool arrives) {
  asm volatile(
      "{\n\t.reg .pred arrives;\n\tsetp.ne.u32 arrives, %1, 0;\n\t"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0 + %2];\n\t}" ::"r"(barrier),
      "r"(static_cast<uint32_t>(arrives)), "n"(kOffset)
      : "memory");
}

// Arrives, and makes the phase also wait for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at the same place in the cluster's CTA `rank`. It tells the other CTA that wgmma and bulk
// copies which this CTA has seen complete no longer use its shared memory. It does not make this thread's ordinary
// writes visible there: that takes .release.cluster, which ptxas implements as a fence for the whole device.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits until the phase of this parity is complete. Before the first phase, the phase of parity 1 counts as complete.
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

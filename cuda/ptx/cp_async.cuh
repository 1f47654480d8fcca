// cp.async: copies global memory to shared memory without passing through registers (PTX ISA 9.7.9.25, sm_80).
#pragma once

#include <cstdint>

namespace qlora::ptx {

// 16 bytes, both addresses 16-byte aligned; cached in L2 only, since each byte is staged once. Only the first `bytes`
// (0..16) are read; the rest of the 16 is filled with zeros. With bytes = 0 the address is not read at all.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes), "n"(kOffset)
               : "memory");
}

// 4 bytes, both addresses 4-byte aligned, for what has no better alignment; with bytes = 0 a zero, and the address is
// not read.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qlora::ptx

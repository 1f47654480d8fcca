// cp.async: copies global memory to shared memory without passing through registers (PTX ISA 9.7.9.25, sm_80).
// Before sm_80, a copy is a load and a store, complete when it returns, and `bytes` is 0 or the whole size.
#pragma once

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace qlora::ptx {

// Copies 16 bytes. Both addresses are aligned to 16 bytes. The data is cached in L2 only, since each byte is staged
// once. Only the first `bytes` (0..16) are read, and the others are filled with zeros. With bytes = 0, the global
// address is not accessed.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes), "n"(kOffset)
               : "memory");
#else
  const uint4 zero = make_uint4(0, 0, 0, 0);
  store_shared_v4<kOffset>(shared, bytes != 0 ? __ldcg(static_cast<const uint4*>(global)) : zero);
#endif
}

// Copies 4 bytes, for data that is aligned to 4 bytes only. With bytes = 0, it writes a zero and does not access the
// global address.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
#else
  store_shared_u32(shared, bytes != 0 ? *static_cast<const uint32_t*>(global) : 0);
#endif
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace qlora::ptx

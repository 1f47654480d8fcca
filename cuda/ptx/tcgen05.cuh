// tcgen05: the tensor cores of compute capability 10.x, and their memory (PTX ISA 9.7.16, sm_100f). One thread issues a
// product d += a · b, which runs asynchronously: d is 128 x n in float32 and a is 128 x 16, both in tensor memory, and
// b is 16 x n in shared memory.
//
// Tensor memory has 128 lanes and 512 columns of 32 bits. Row i of d and of a is lane i. Column j of d is a column, and
// values 2c, 2c + 1 of a are column c. An address has the lane in the upper half and the column in the lower half. A
// warp only accesses the 32 lanes from 32 · (its number % 4) on.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpp/format/dtypes.h"

namespace qlora::ptx {

// Allocates kColumns columns (a power of two, at least 32), and writes their address to shared memory. Waits until they
// are free. Call from a whole warp, which also frees them.
template <int kColumns>
__device__ __forceinline__ void allocate_tensor_memory(uint32_t shared) {
  asm volatile(
      "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;\n\t"
      "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::"r"(shared),
      "n"(kColumns)
      : "memory");
}
template <int kColumns>
__device__ __forceinline__ void free_tensor_memory(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(kColumns) : "memory");
}

// Order accesses to tensor memory by barriers between threads: call `release` before a thread arrives, after its own
// accesses are complete, and `acquire` after a thread has waited.
__device__ __forceinline__ void release_tensor_memory() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
__device__ __forceinline__ void acquire_tensor_memory() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// clang-format off
#define QLORA_4(m, j) m(j), m(j + 1), m(j + 2), m(j + 3)
#define QLORA_16(m) QLORA_4(m, 0), QLORA_4(m, 4), QLORA_4(m, 8), QLORA_4(m, 12)
#define QLORA_32(m) QLORA_16(m), QLORA_4(m, 16), QLORA_4(m, 20), QLORA_4(m, 24), QLORA_4(m, 28)
#define QLORA_IN(j) "r"(v[j])
#define QLORA_OUT(j) "=f"(v[j])
#define QLORA_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

// Stores 32 columns of the thread's lane. `address` has the warp's first lane.
__device__ __forceinline__ void store_tensor_memory(uint32_t address, const uint32_t (&v)[32]) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x32.b32 [%32], {" QLORA_REGISTERS "};"
               ::QLORA_32(QLORA_IN), "r"(address) : "memory");
}

// Stores 32 columns of the 16 lanes at `address`, the warp's first or second 16, as mma has them in operand a: of
// columns 8s and on, thread (g = thread/4, t = thread%4) has
//   v[4s] = [g][8s+t]   v[4s+1] = [g+8][8s+t]   v[4s+2] = [g][8s+4+t]   v[4s+3] = [g+8][8s+4+t]
__device__ __forceinline__ void store_tensor_memory(uint32_t address, const uint32_t (&v)[16]) {
  asm volatile("tcgen05.st.sync.aligned.16x128b.x8.b32 [%16], "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15};"
               ::QLORA_16(QLORA_IN), "r"(address) : "memory");
}

// Waits until what this thread has stored is stored.
__device__ __forceinline__ void wait_for_tensor_stores() {
  asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
}

// Loads 32 columns of the thread's lane, and waits for them.
__device__ __forceinline__ void load_tensor_memory(float (&v)[32], uint32_t address) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x32.b32 {" QLORA_REGISTERS "}, [%32];\n\t"
               "tcgen05.wait::ld.sync.aligned;"
               : QLORA_32(QLORA_OUT) : "r"(address) : "memory");
}

#undef QLORA_REGISTERS
#undef QLORA_OUT
#undef QLORA_IN
#undef QLORA_32
#undef QLORA_16
#undef QLORA_4
// clang-format on

// Builds the descriptor of b at a shared address aligned to 1024. Each column n has 128 bytes, 64 values of k. Columns
// lie in groups of 8, with the 128-byte swizzle of TMA.
__device__ __forceinline__ uint64_t tcgen05_descriptor(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = 2, kVersion = 1, kGroupStride = 1024 / 16;
  return kSwizzle128 << 61 | kVersion << 46 | kGroupStride << 32 | (shared & 0x3FFFF) >> 4;
}
inline constexpr int kTcgen05Step = 32 / 16;  // added to a descriptor to reach the next 16 values of k

// Starts d += a · b, or d = a · b unless `adds`, for kColumns columns. T is the type of a and b. Products of one thread
// run one after the other.
template <class T, int kColumns>
__device__ __forceinline__ void tcgen05_k16(uint32_t d, uint32_t a, uint64_t b, bool adds) {
  constexpr uint32_t kFloat32 = 1 << 4, kType = std::is_same_v<T, bfloat16> ? 1 << 7 | 1 << 10 : 0;
  constexpr uint32_t kShape = kColumns / 8 << 17 | 128 / 16 << 24;
  asm volatile(
      "{\n\t.reg .pred adds;\n\tsetp.ne.u32 adds, %4, 0;\n\t"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], [%1], %2, %3, adds;\n\t}" ::"r"(d),
      "r"(a), "l"(b), "n"(kFloat32 | kType | kShape), "r"(static_cast<uint32_t>(adds))
      : "memory");
}

// Arrives at an mbarrier of this CTA when all products that this thread has started are complete.
__device__ __forceinline__ void tcgen05_commit(uint32_t barrier) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace qlora::ptx

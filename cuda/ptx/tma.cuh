// TMA: copies a box of a tensor to shared memory, using a descriptor that the host prepared (PTX ISA 9.7.9.27, sm_90).
// Parts of the box beyond the tensor's edges are filled with zeros.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qlora::ptx {

__device__ __forceinline__ void tma_prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at (column, row) of a matrix. Its bytes count for the current phase of `barrier`, an mbarrier.
__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int32_t column,
                                            int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Loads the box to the same place in each CTA of the cluster whose bit in `ctas` is set. Its bytes count for the
// barrier at the same place in each of them.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                                      int32_t column, int32_t row, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(ctas)
      : "memory");
}

// Makes this thread's own writes to shared memory visible to the TMA copies and wgmma that follow the next barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace qlora::ptx

// The producers' and the consumers' side of the ring buffer of stages in Hopper's kernels, and its initialization.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace qlora::tile {

// Initializes the barriers. Call from the thread that issues copies, which may start some at once, and synchronize the
// CTA afterwards.
template <class Layout>
__device__ __forceinline__ void start_ring(uint32_t base, const CUtensorMap& tokens, const CUtensorMap& packed) {
  ptx::tma_prefetch(tokens);
  ptx::tma_prefetch(packed);
  for (int slot = 0; slot < Layout::kStages; ++slot) {
    ptx::mbarrier_init(base + Layout::full(slot), Layout::kFullArrivals);
    ptx::mbarrier_init(base + Layout::empty(slot), Layout::kEmptyArrivals);
    ptx::mbarrier_init(base + Layout::partner_empty(slot), 1);
  }
  ptx::mbarrier_init_fence();
}

// Slots are tile::Index.
template <class Layout>
struct Sm90Producer {
  uint32_t base, parity = 1;
  bool issues = threadIdx.x == 0, arrives = threadIdx.x % 32 == 0;

  template <class Slot>
  __device__ __forceinline__ void wait(Slot slot) const {
    ptx::mbarrier_wait<Layout::empty(slot)>(base, parity);
  }

  // The issuing thread arrives before `publish`: with this function if it starts no copies, and otherwise with the
  // number of bytes that they bring.
  template <class Slot>
  __device__ __forceinline__ void arrive_without_copies(Slot slot) const {
    ptx::mbarrier_arrive<Layout::full(slot)>(base, issues);
  }

  // Makes this thread's writes to the slot visible to the consumers.
  template <class Slot>
  __device__ __forceinline__ void publish(Slot slot) const {
    __syncwarp();
    ptx::mbarrier_arrive<Layout::full(slot)>(base, arrives);
  }

  template <class Slot>
  __device__ __forceinline__ void pass(Slot slot) const {
    wait(slot);
    arrive_without_copies(slot);
    publish(slot);
  }
};

template <class Layout>
struct Sm90Consumer {
  uint32_t base, parity = 0;
  bool arrives = threadIdx.x % 32 == 0;

  template <class Slot>
  __device__ __forceinline__ void wait(Slot slot) const {
    ptx::mbarrier_wait<Layout::full(slot)>(base, parity);
  }

  // `slot` is the slot after the one that `wait` was called for.
  template <class Slot>
  __device__ __forceinline__ void wait_next(Slot slot) const {
    ptx::mbarrier_wait<Layout::full(slot)>(base, slot == 0 ? parity ^ 1 : parity);
  }

  template <class Slot>
  __device__ __forceinline__ void release(Slot slot) const {
    __syncwarp();
    ptx::mbarrier_arrive<Layout::empty(slot)>(base, arrives);
  }

  // Releases the slot of the last of `stages` stages.
  __device__ __forceinline__ void release_last(int stages) const {
    __syncwarp();
    ptx::mbarrier_arrive<0>(base + Layout::empty((stages - 1) % Layout::kStages), arrives);
  }

  template <class Slot>
  __device__ __forceinline__ void pass(Slot slot) const {
    wait(slot);
    release(slot);
  }
};

}  // namespace qlora::tile

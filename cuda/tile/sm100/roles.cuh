// The roles of the kernels on tcgen05, without the decoders' own part: to initialize, copy, multiply and store sums.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tcgen05.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tile/sm100/layout.cuh"
#include "cuda/tile/sm90/copies.cuh"
#include "cuda/tile/sm90/roles.cuh"
#include "cuda/tile/sm90/sums.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::tile {

// Between the roles of a tile, and if its sums are split, of all CTAs that have a part of them. Call from all threads.
template <class Tile>
__device__ __forceinline__ void sync_tile(const Sm90Work<Tile>& work) {
  __syncwarp();  // threads that have waited for an mbarrier come one by one
  if (work.plan.splits > 1)
    ptx::cluster_sync();
  else
    ptx::barrier_sync<1, Tile::kThreads>();
}

// The roles other than the decoders wait while the sums of a tile are stored: before, and after.
template <class Tile>
__device__ __forceinline__ void attend_sums(const Sm90Work<Tile>& work) {
  sync_tile<Tile>(work);
  sync_tile<Tile>(work);
}

// Initializes the CTA, starts the copies of the first `early` stages, and fills the tables. Call from all threads.
// Returns the address of the tensor memory.
template <class Tile>
__device__ __forceinline__ uint32_t start_tiles(const Sm90Work<Tile>& work, const Sm90Copies<Tile>& copies, int early,
                                                const CUtensorMap& tokens, const CUtensorMap& packed,
                                                const CodeView& code, const ScaleView& scales, uint8_t* memory,
                                                uint32_t base) {
  if (threadIdx.x == Tile::kCopyWarp * 32) {
    for (int slot = 0; slot < Tile::kStages; ++slot) ptx::mbarrier_init(base + Tile::ready(slot), Tile::kReadyArrivals);
    ptx::mbarrier_init(base + Tile::kDone, 1);
    ptx::mbarrier_init(base + Tile::kMasked, Tile::kConsumers / 32);
    start_ring<Tile>(base, tokens, packed);
    copies.start_early(early);
  }
  if (threadIdx.x / 32 == Tile::kMultiplyWarp)
    ptx::allocate_tensor_memory<Tile::kTensorColumns>(base + Tile::kTensorAddress);
  fill_pairs_f32<Tile::kThreads>(reinterpret_cast<char*>(memory) + Tile::kTable, code);
  fill_lane_scale_values<Tile::kThreads>(scales, base + Tile::kScaleValues);
  ptx::release_tensor_memory();
  work.sync_begin();
  ptx::acquire_tensor_memory();
  return ptx::load_shared_u32<Tile::kTensorAddress>(base);
}

// `started`: the stages of the first tile whose copies have been started.
template <class Tile>
__device__ __forceinline__ void copy_stages(const Sm90Work<Tile>& work, Sm90Copies<Tile>& copies, int started,
                                            uint32_t base) {
  Sm100Ring<Tile> ring{base};
  work.for_tiles([&](int64_t token0, int64_t output0) {
    if (threadIdx.x % 32 == 0)
      ring.for_slots(
          work,
          [&](int stage) {
            if (stage < started) return;  // its slot may be empty again, which is one phase too late to wait for
            ring.wait_empty();
            copies.start(ring.slot, stage, token0, output0, 0);
          },
          [&](int, int) {
            ring.wait_empty();
            ptx::mbarrier_arrive<0>(base + Tile::full(ring.slot), true);
          },
          [] {});
    started = 0;
    attend_sums<Tile>(work);
  });
}

// `masks`: the decoders change the sums of LoRA's ranks, which come first, before those of the stages are added.
template <class Tile>
__device__ __forceinline__ void multiply_stages(const Sm90Work<Tile>& work, bool masks, uint32_t tensor,
                                                uint32_t base) {
  Sm100Ring<Tile> ring{base};
  uint32_t masked_parity = 0;
  work.for_tiles([&](int64_t, int64_t) {
    if (threadIdx.x % 32 == 0) {
      bool adds = false;
      const auto multiply = [&](int steps) {
        ring.wait_full();
        ring.wait_ready();
        ptx::acquire_tensor_memory();
        const uint64_t x = ptx::tcgen05_descriptor(base + Tile::kTokenLines + ring.slot * Tile::kStageTokenBytes);
        const uint32_t w = tensor + Tile::kTokens + ring.slot * Tile::kSlotColumns;
        for (int step = 0; step < steps; ++step, adds = true)
          ptx::tcgen05_k16<typename Tile::T, Tile::kTokens>(tensor, w + step * 8, x + step * ptx::kTcgen05Step, adds);
        ptx::tcgen05_commit(base + Tile::empty(ring.slot));
      };
      ring.for_slots(
          work, [&](int) { multiply(Tile::kStageTerms / 16); }, [&](int, int steps) { multiply(steps); },
          [&] {
            if (!masks) return;
            ptx::tcgen05_commit(base + Tile::kDone);
            ptx::mbarrier_wait<0>(base + Tile::kMasked, masked_parity);
            masked_parity ^= 1;
          });
      ptx::tcgen05_commit(base + Tile::kDone);
    }
    attend_sums<Tile>(work);
  });
}

// A decoder thread's next scale, which it loads before it needs it.
template <class Tile>
class Sm100Scale {
 public:
  __device__ __forceinline__ Sm100Scale(const ScaleView& view, uint32_t base)
      : view_(view), lane_values_(base + Tile::kScaleValues + threadIdx.x % 32 * 4), offset_(nested_offset(view)) {}

  __device__ __forceinline__ void load(int64_t block) { reload_scale(view_, block, raw_); }
  __device__ __forceinline__ float decode() const {
    const auto value_of = [&](uint32_t code) { return ptx::load_shared_f32(lane_values_ + code * kPairF32EntryBytes); };
    return decode_scale_by(view_, raw_.value, raw_.code, value_of, offset_);
  }

 private:
  const ScaleView& view_;
  uint32_t lane_values_;
  float offset_;
  RawScale raw_;
};

// What decoders wait for and publish. Each group has every second slot.
template <class Tile>
struct Sm100Decoder {
  Sm100Ring<Tile> ring;
  uint32_t lanes;  // the address of the sums, in the warp's first lane
  int group = threadIdx.x / Tile::kProducers;
  uint32_t done_parity = 0;

  __device__ __forceinline__ Sm100Decoder(uint32_t base, uint32_t tensor)
      : ring{base}, lanes(tensor + (threadIdx.x % Tile::kProducers / 32 * 32 << 16)) {}

  __device__ __forceinline__ bool has_slot() const { return ring.slot % Tile::kGroups == group; }
  __device__ __forceinline__ uint32_t w() const { return lanes + Tile::kTokens + ring.slot * Tile::kSlotColumns; }

  __device__ __forceinline__ void wait_full() const {
    ring.wait_full();
    ptx::acquire_tensor_memory();  // of the products before, for whose end the copying thread has waited
  }
  __device__ __forceinline__ void wait_done() {
    ptx::mbarrier_wait<0>(ring.base + Tile::kDone, done_parity);
    done_parity ^= 1;
    ptx::acquire_tensor_memory();
  }

  // Arrives at `barrier` when the warp's stores to tensor memory are visible to products behind it.
  __device__ __forceinline__ void publish(uint32_t barrier) const {
    ptx::wait_for_tensor_stores();
    ptx::release_tensor_memory();
    __syncwarp();
    ptx::mbarrier_arrive<0>(barrier, threadIdx.x % 32 == 0);
  }
  __device__ __forceinline__ void publish_slot() const { publish(ring.base + Tile::ready(ring.slot)); }

  // Calls use(address, first token) for every 32 tokens of the thread's lane: a group has half of the tokens.
  template <class Use>
  __device__ __forceinline__ void for_sums(const Use& use) const {
    constexpr int kPart = Tile::kTokens / Tile::kGroups;
    unroll<kPart / 32>([&](auto i) { use(lanes + group * kPart + 32 * i, group * kPart + 32 * i); });
  }

  // Adds up the sums of the CTAs that have a part of them, in the order of their ranks, adds bias, rounds once and
  // stores. `output` is that of the thread's lane in the tile.
  __device__ __forceinline__ void finish(const Sm90Work<Tile>& work, int output,
                                         const LinearOutput<typename Tile::T>& out, int64_t token0, int64_t m,
                                         int64_t output0, int64_t outputs) {
    wait_done();
    const uint32_t sums = ring.base + Tile::kSums + output * 4;
    for_sums([&](uint32_t address, int token) {
      float sum[32];
      ptx::load_tensor_memory(sum, address);
      const uint32_t to = sums + token * (Tile::kSumStride * 4);
      unroll<32>([&](auto j) { ptx::store_shared_f32<j * Tile::kSumStride * 4>(to, sum[j]); });
    });
    ptx::release_tensor_memory();
    const OutputQuad<typename Tile::T> quad(out, output0 + threadIdx.x % 32 * 4, outputs);
    sync_tile<Tile>(work);
    finish_part<Tile>(work, threadIdx.x, token0, m, quad, ring.base);
    ptx::fence_proxy_async();  // TMA overwrites the sums
    sync_tile<Tile>(work);
  }
};

// The tile's base: the first shared address that TMA's swizzle allows.
template <class Tile>
__device__ __forceinline__ uint32_t sm100_base(uint32_t shared) {
  return (shared + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;
}

}  // namespace qlora::tile

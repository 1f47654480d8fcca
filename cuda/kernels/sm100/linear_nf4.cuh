// y = x · wᵀ + h · lora_bᵀ + bias on the tensor cores of compute capability 10.x, straight from the packed weight: yᵀ =
// w · xᵀ by tcgen05, with w decoded into tensor memory. TMA loads x and packed bytes. cuda/tile/sm100/linear_tile.cuh
// describes the tile and its threads.
//
// A weight is decoded to float32, scale included, and rounded once, so that all terms have one sum in tensor memory.
// LoRA is the end of that sum: [x | h] · [w | lora_b]ᵀ.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/kernels/sm90/linear_nf4.cuh"
#include "cuda/ptx/tcgen05.cuh"
#include "cuda/tile/sm100/linear_tile.cuh"

namespace qlora::kernels {

// Between the roles of a tile, and if its sums are split, of all CTAs that have a part of them. Call from all threads.
template <class Tile>
__device__ __forceinline__ void sync_tile(const tile::Sm90Work<Tile>& work) {
  __syncwarp();  // threads that have waited for an mbarrier come one by one
  if (work.plan.splits > 1)
    ptx::cluster_sync();
  else
    ptx::barrier_sync<1, Tile::kThreads>();
}

// The roles other than the decoders wait while the sums of a tile are stored: before, and after.
template <class Tile>
__device__ __forceinline__ void attend_sums(const tile::Sm90Work<Tile>& work) {
  sync_tile<Tile>(work);
  sync_tile<Tile>(work);
}

template <class Tile>
__device__ __forceinline__ void copy_stages(const tile::Sm90Work<Tile>& work, tile::Sm90Copies<Tile>& copies,
                                            uint32_t base) {
  int started = work.first_stages();
  tile::Sm100Ring<Tile> ring{base};
  work.for_tiles([&](int64_t token0, int64_t n0) {
    if (threadIdx.x % 32 == 0)
      ring.for_slots(
          work,
          [&](int stage) {
            if (stage < started) return;  // its slot may be empty again, which is one phase too late to wait for
            ring.wait_empty();
            copies.start(ring.slot, stage, token0, n0, 0);
          },
          [&](int, int) {
            ring.wait_empty();
            ptx::mbarrier_arrive<0>(base + Tile::full(ring.slot), true);
          });
    started = 0;
    attend_sums<Tile>(work);
  });
}

template <class Tile>
__device__ __forceinline__ void multiply_stages(const tile::Sm90Work<Tile>& work, uint32_t tensor, uint32_t base) {
  tile::Sm100Ring<Tile> ring{base};
  work.for_tiles([&](int64_t, int64_t) {
    if (threadIdx.x % 32 == 0) {
      bool adds = false;
      const auto multiply = [&](int steps) {
        ring.wait_full();
        ring.wait_ready();
        ptx::acquire_tensor_memory();
        const uint64_t x = ptx::tcgen05_descriptor(base + Tile::kTokenLines + ring.slot * Tile::kStageTokenBytes);
        const uint32_t a = tensor + Tile::kTokens + ring.slot * Tile::kSlotColumns;
        for (int step = 0; step < steps; ++step, adds = true)
          ptx::tcgen05_k16<typename Tile::T, Tile::kTokens>(tensor, a + step * 8, x + step * ptx::kTcgen05Step, adds);
        ptx::tcgen05_commit(base + Tile::empty(ring.slot));
      };
      ring.for_slots(work, [&](int) { multiply(Tile::kStageK / 16); }, [&](int, int steps) { multiply(steps); });
      ptx::tcgen05_commit(base + Tile::kDone);
    }
    attend_sums<Tile>(work);
  });
}

// The scales of a thread's row, loaded a stage of its group ahead of their use.
template <class Tile>
class LinearSm100Scales {
 public:
  __device__ __forceinline__ LinearSm100Scales(const tile::ScaleView& view, int64_t row, int64_t k, int stage0,
                                               uint32_t base)
      : view_(view),
        segment0_(row * (k / Tile::kStageK) + stage0),
        lane_values_(base + Tile::kScaleValues + threadIdx.x % 32 * 4),
        offset_(tile::nested_offset(view)) {}

  __device__ __forceinline__ void load(int stage) {
    tile::reload_scale(view_, segment0_ + stage >> view_.block_shift - 6, raw_);
    static_assert(Tile::kStageK == 1 << 6);
  }
  __device__ __forceinline__ float decode() const {
    const auto value_of = [&](uint32_t code) {
      return ptx::load_shared_f32(lane_values_ + code * tile::kPairF32EntryBytes);
    };
    return tile::decode_scale_by(view_, raw_.value, raw_.code, value_of, offset_);
  }

 private:
  const tile::ScaleView& view_;
  int64_t segment0_;
  uint32_t lane_values_;
  float offset_;
  tile::RawScale raw_;
};

// Decodes 64 weights of a row.
template <class Tile>
__device__ __forceinline__ void decode_row(uint32_t packed, int row, uint32_t table, float scale, uint32_t (&a)[32]) {
  const uint32_t copy = threadIdx.x % 16 * 8;
  tile::unroll<2>([&](auto chunk) {
    const uint4 words = ptx::load_shared_v4(packed + Tile::packed_offset(row, chunk));
    tile::unroll<4>([&](auto i) {
      const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
      tile::unroll<4>([&](auto byte) {
        const float2 value = tile::lookup_pair_f32<byte>(table, copy, word);
        a[chunk * 16 + i * 4 + byte] = ptx::pack2<typename Tile::T>(value.x * scale, value.y * scale);
      });
    });
  });
}

// Loads 64 ranks of a row of lora_b from rank `first` on, in the order of store_low_rank.
template <class T, bool kVector>
__device__ __forceinline__ void load_lora_row(const tile::LoraOperands<T>& lora, int64_t row, int first,
                                              uint32_t (&a)[32]) {
  tile::unroll<16>([&](auto i) {
    constexpr int step = i / 4, t = i % 4;
    const uint2 ranks =
        tile::load_4_ranks<T, kVector, true>(lora.b + row * lora.rank, first + 4 * i, lora.rank, row < lora.n);
    a[step * 8 + t] = ranks.x, a[step * 8 + t + 4] = ranks.y;
  });
}

// Adds up the sums of the CTAs that have a part of them, in the order of their ranks, adds bias, rounds once and
// stores.
template <class Tile>
__device__ __forceinline__ void finish_sums(const tile::Sm90Work<Tile>& work, const LinearSm90Args<typename Tile::T>& p,
                                            int64_t token0, int64_t n0, uint32_t tensor, uint32_t base) {
  constexpr int kPart = Tile::kTokens / Tile::kGroups;
  const int first = threadIdx.x / Tile::kProducers * kPart, row = threadIdx.x % Tile::kProducers;
  const uint32_t sums = base + Tile::kSums + (first * Tile::kSumStride + row) * 4;
  tile::unroll<kPart / 32>([&](auto i) {
    float sum[32];
    ptx::load_tensor_memory(sum, tensor + first + 32 * i);
    tile::unroll<32>([&](auto j) { ptx::store_shared_f32<(32 * i + j) * Tile::kSumStride * 4>(sums, sum[j]); });
  });
  ptx::release_tensor_memory();
  const tile::OutputQuad<typename Tile::T> quad(p.out, n0 + threadIdx.x % 32 * 4, p.n);
  sync_tile<Tile>(work);
  tile::finish_part<Tile>(work, threadIdx.x, token0, p.m, quad, base);
  ptx::fence_proxy_async();  // TMA overwrites the sums
  sync_tile<Tile>(work);
}

template <class Tile>
__device__ __forceinline__ void decode_stages(const LinearSm90Args<typename Tile::T>& p,
                                              const tile::Sm90Work<Tile>& work, uint32_t tensor, uint32_t base) {
  const int group = threadIdx.x / Tile::kProducers, row = threadIdx.x % Tile::kProducers;
  const uint32_t lanes = tensor + (row / 32 * 32 << 16);
  tile::Sm100Ring<Tile> ring{base};
  uint32_t done_parity = 0;
  const auto is_mine = [&] { return ring.slot % Tile::kGroups == group; };
  const auto wait = [&] {
    ring.wait_full();
    ptx::acquire_tensor_memory();  // of the products before, for whose end the copier has waited
  };
  const auto publish = [&](const uint32_t (&a)[32]) {
    ptx::store_tensor_memory(lanes + Tile::kTokens + ring.slot * Tile::kSlotColumns, a);
    ptx::release_tensor_memory();
    __syncwarp();
    ptx::mbarrier_arrive<0>(base + Tile::ready(ring.slot), threadIdx.x % 32 == 0);
  };
  work.for_tiles([&](int64_t token0, int64_t n0) {
    // Rows that do not exist have the scales of the last one.
    LinearSm100Scales<Tile> scales(p.scales, n0 + row < p.n ? n0 + row : p.n - 1, p.k, work.stage0, base);
    const int first = is_mine() ? 0 : 1;
    if (first < work.stages) scales.load(first);
    ring.for_slots(
        work,
        [&](int stage) {
          if (!is_mine()) return;
          uint32_t a[32];
          wait();
          const float scale = scales.decode();
          if (stage + Tile::kGroups < work.stages) scales.load(stage + Tile::kGroups);
          const uint32_t packed = base + Tile::kPacked + ring.slot * Tile::kStagePackedBytes;
          decode_row<Tile>(packed, row, base + Tile::kTable, scale, a);
          publish(a);
        },
        [&](int rank, int steps) {
          if (!is_mine()) return;
          uint32_t a[32];
          const uint32_t lines = base + Tile::kTokenLines + ring.slot * Tile::kStageTokenBytes;
          wait();
          if (lora_is_vector(p.lora)) {
            load_lora_row<typename Tile::T, true>(p.lora, n0 + row, rank, a);
            tile::store_low_rank<Tile, true>(p.lora, row, token0, rank, steps, lines);
          } else {
            load_lora_row<typename Tile::T, false>(p.lora, n0 + row, rank, a);
            tile::store_low_rank<Tile, false>(p.lora, row, token0, rank, steps, lines);
          }
          publish(a);
        });
    ptx::mbarrier_wait<0>(base + Tile::kDone, done_parity);
    done_parity ^= 1;
    ptx::acquire_tensor_memory();
    finish_sums<Tile>(work, p, token0, n0, lanes, base);
  });
}

// Grid: clusters of splits · multicast CTAs, at most as many as fit on the device and as there are tiles or pairs. The
// maps have boxes of 64 x kTokens / multicast values of x (128-byte swizzle) and of 32 x 128 packed bytes (32-byte
// swizzle). Requires k % 64 == 0 and a block size of at least 64.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_sm100_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap packed_map,
                            const __grid_constant__ LinearSm90Args<typename Tile::T> p) {
  extern __shared__ uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  const uint32_t base = (shared + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment;
  const int warp = threadIdx.x / 32;
  const tile::Sm90Work<Tile> work(p.plan);
  tile::Sm90Copies<Tile> copies(work, base, x_map, packed_map);
  if (threadIdx.x == Tile::kCopyWarp * 32) {
    for (int slot = 0; slot < Tile::kStages; ++slot) ptx::mbarrier_init(base + Tile::ready(slot), Tile::kReadyArrivals);
    ptx::mbarrier_init(base + Tile::kDone, 1);
    tile::start_ring<Tile>(base, x_map, packed_map);
    copies.start_early(work.first_stages());
  }
  if (warp == Tile::kMultiplyWarp) ptx::allocate_tensor_memory<Tile::kTensorColumns>(base + Tile::kTensorAddress);
  tile::fill_pairs_f32<Tile::kThreads>(reinterpret_cast<char*>(shared_memory) + (base - shared) + Tile::kTable, p.code);
  tile::fill_lane_scale_values<Tile::kThreads>(p.scales, base + Tile::kScaleValues);
  ptx::release_tensor_memory();
  work.sync_begin();
  ptx::acquire_tensor_memory();
  const uint32_t tensor = ptx::load_shared_u32<Tile::kTensorAddress>(base);
  if (warp < Tile::kCopyWarp) {
    decode_stages<Tile>(p, work, tensor, base);
  } else if (warp == Tile::kCopyWarp) {
    copy_stages<Tile>(work, copies, base);
  } else {
    multiply_stages<Tile>(work, tensor, base);
    ptx::free_tensor_memory<Tile::kTensorColumns>(tensor);
  }
}

}  // namespace qlora::kernels

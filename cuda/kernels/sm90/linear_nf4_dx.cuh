// dx = dy · w + mask ∘ (g · a) · keep_scale on Hopper's tensor cores, straight from the packed weight: dxᵀ = wᵀ · dyᵀ
// by wgmma, with wᵀ decoded into the register operand. TMA loads dy and packed bytes. cuda/tile/sm90/dx_tile.cuh
// describes the tile and its layout. LoRA's product comes first, so dropout can mask it in the accumulators.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cpp/format/philox.h"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/setmaxnreg.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/generic/block_scale.cuh"
#include "cuda/tile/sm90/copies.cuh"
#include "cuda/tile/sm90/dx_tile.cuh"
#include "cuda/tile/sm90/operand.cuh"
#include "cuda/tile/sm90/roles.cuh"
#include "cuda/tile/sm90/sums.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::kernels {

template <class T>
struct DxSm90Args {
  tile::ScaleView scales;
  tile::CodeView code;
  int64_t m, n, k;
  tile::LoraOperands<T> g;  // b is unused
  const T* lora_a;          // [rank, k]
  Dropout dropout;
  tile::LinearOutput<T> out;
  tile::Sm90Plan plan;
};

// A producer thread's scale of each stage, for one row and one group of 64 columns, loaded one round of stages ahead of
// its use. For rows and columns that do not exist, the thread stores some finite scale, because it is multiplied by 0.
template <class Tile>
class DxSm90Scales {
 public:
  __device__ __forceinline__ DxSm90Scales(const tile::ScaleView& view, int64_t row, int64_t column, int64_t n,
                                          int64_t k)
      : view_(view),
        element_(row * k + column),
        k_(k),
        end_(column < k ? n * k : 0),
        last_(view.scales.table != nullptr && column < k ? (n - 1) * k + column : -1) {
#pragma unroll
    for (int slot = 0; slot < Tile::kStages; ++slot) load(slot);
  }

  // Stores the scale of the stage in `slot`, then loads the scale of the slot's next stage.
  __device__ __forceinline__ void store_and_load(int slot, uint32_t lane_table, float offset, uint32_t address) {
    const auto value_of = [&](uint32_t code) { return tile::lookup_scale_value<0>(lane_table, code); };
    const float scale = tile::decode_scale_by(view_, raw_[slot].value, raw_[slot].code, value_of, offset);
    ptx::store_shared_f32(address, scale);
    load(slot);
  }

 private:
  __device__ __forceinline__ void load(int slot) {
    const int64_t element = element_ < end_ ? element_ : last_;
    raw_[slot] = element >= 0 ? tile::load_scale(view_, element >> view_.block_shift) : tile::RawScale{};
    element_ += Tile::kStageRows * k_;
  }

  const tile::ScaleView& view_;
  int64_t element_, k_, end_;
  int64_t last_;  // what rows that do not exist read, or -1: the values of a table may be NaN
  tile::RawScale raw_[Tile::kStages];
};

// `started`: the stages of the first tile whose copies have been started.
template <class Tile, class Work>
__device__ __forceinline__ void produce_dx(const DxSm90Args<typename Tile::T>& all, Work& work,
                                           tile::Sm90Copies<Tile>& copies, int started, uint32_t base) {
  const uint32_t lane_table = base + Tile::kTable + threadIdx.x % 32 * 4;
  const int stage_row = threadIdx.x % Tile::kStageRows, group = threadIdx.x / Tile::kStageRows;
  tile::Sm90Producer<Tile> ring{base};
  const auto pass = [&](auto slot) { ring.pass(slot); };
  work.for_tiles([&](int64_t token0, int64_t column0) {
    const auto& view = work.scales_of(all.scales);
    const float offset = tile::nested_offset(view);
    DxSm90Scales<Tile> scales(view, int64_t{work.stage0} * Tile::kStageRows + stage_row,
                              column0 + group * Tile::kGroupColumns, all.n, all.k);
    work.for_chunks(ring.parity, pass, [&](auto slot, int rank, int steps) {
      ring.wait(slot);
      ring.arrive_without_copies(slot);
      const uint32_t lines = base + Tile::kTokenLines + slot * Tile::kStageTokenBytes;
      const auto& p = work.args_of(all);
      if (p.g.rank % 4 == 0)
        tile::store_low_rank<Tile, true>(p.g, threadIdx.x, token0, rank, steps, lines);
      else
        tile::store_low_rank<Tile, false>(p.g, threadIdx.x, token0, rank, steps, lines);
      ring.publish(slot);
    });
    work.for_stages(ring.parity, pass, [&](auto slot, int stage) {
      ring.wait(slot);
      if (ring.issues && stage >= started) copies.start(slot, stage, token0, column0, work.first_row(all.n));
      scales.store_and_load(slot, lane_table, offset,
                            base + Tile::kScales + slot * Tile::kStageScaleBytes + threadIdx.x * 4);
      ring.publish(slot);
    });
    started = 0;
    tile::attend_finish(work);
  });
}

// Loads the wgmma's operand for a chunk of lora_a from rank `first` on, straight from global memory: columns `column`
// and `column` + 1 of four ranks per step.
template <class T>
__device__ __forceinline__ void load_lora_a(const DxSm90Args<T>& p, int64_t column, int64_t first,
                                            uint32_t (&a)[4][4]) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t rank[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = first + step * 16 + threadIdx.x % 4 * 4 + i;
      rank[i] =
          r < p.g.rank && column < p.k ? __ldg(reinterpret_cast<const uint32_t*>(p.lora_a + r * p.k + column)) : 0;
    }
    a[step][0] = ptx::prmt<0x5410>(rank[0], rank[1]), a[step][1] = ptx::prmt<0x7632>(rank[0], rank[1]);
    a[step][2] = ptx::prmt<0x5410>(rank[2], rank[3]), a[step][3] = ptx::prmt<0x7632>(rank[2], rank[3]);
  }
}

// Applies dropout to acc's columns `column` and `column` + 1: dropped elements become zero, and the others are scaled.
// One call of Philox draws four columns. This lane has two of them, and the same lane of the other warpgroup has the
// other two. So each lane draws for every second token, and passes the other lane's bits through shared memory. The
// drawing loop is not unrolled, because Philox is long. The mask is applied even if nothing is dropped, because ptxas
// would serialize the wgmma that follow a branch.
template <class Tile>
__device__ __forceinline__ void apply_dropout(const Dropout& dropout, bool active, int64_t token, int64_t column,
                                              int64_t k, uint32_t base, tile::Sm90Sums<Tile>& acc) {
  const float keep_scale = active ? static_cast<float>(dropout.keep_scale) : 1.0f;
  constexpr int kAtOnce = Tile::kTokenTiles < 16 ? Tile::kTokenTiles : 16, kHalf = Tile::kConsumers / 2;
  // `half`: which two of the four columns this lane has, and for which tokens it draws.
  const int thread = threadIdx.x - Tile::kProducers, half = thread / kHalf;
#pragma unroll
  for (int j0 = 0; j0 < Tile::kTokenTiles; j0 += kAtOnce) {
    const uint64_t seed = dropout.key();
    uint64_t drop = 0, other = 0;  // bit 4j + 2e + c: column c of this lane, or the other's, and token 8 (j0 + j) + e
#pragma unroll 1
    for (int j = 0; active && j < kAtOnce; ++j) {
      const int64_t index = (token + 8 * (j0 + j) + half) * k + column;
      const Philox4 random = philox4x32_10(seed, static_cast<uint64_t>(index) / 4);
      const uint32_t low = !dropout.keeps(random.lane[0]) | !dropout.keeps(random.lane[1]) << 1;
      const uint32_t high = !dropout.keeps(random.lane[2]) | !dropout.keeps(random.lane[3]) << 1;
      drop |= uint64_t{half == 0 ? low : high} << (4 * j + 2 * half);
      other |= uint64_t{half == 0 ? high : low} << (4 * j + 2 * half);
    }
    const uint32_t masks = base + Tile::kMasks + j0 / kAtOnce * (Tile::kConsumers * 8);
    ptx::store_shared_v2(masks + thread * 8, {static_cast<uint32_t>(other), static_cast<uint32_t>(other >> 32)});
    ptx::barrier_sync<1, Tile::kConsumers>();
    const uint2 given = ptx::load_shared_v2(masks + (thread ^ kHalf) * 8);
    drop |= uint64_t{given.y} << 32 | given.x;
#pragma unroll
    for (int q = 0; q < 4 * kAtOnce; ++q) {
      float& v = acc[j0 + q / 4][q % 4];
      v = drop >> (q / 4 * 4 + q % 2 * 2 + q % 4 / 2) & 1 ? 0.0f : v * keep_scale;
    }
  }
}

template <class Tile, class Work>
__device__ __forceinline__ void consume_dx(const DxSm90Args<typename Tile::T>& all, Work& work, uint32_t base) {
  constexpr typename Tile::T kType{};
  const tile::DxSm90Lane<Tile> lane(base);
  const tile::Sm90Descriptors<Tile> dy(base + Tile::kTokenLines);
  tile::Sm90Consumer<Tile> ring{base};
  const auto pass = [&](auto slot) { ring.pass(slot); };
  tile::Sm90Sums<Tile> acc;
  uint32_t a[4][4];  // [step]

  work.for_tiles([&](auto token0, auto column0) {
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.0f;
    work.for_chunks(ring.parity, pass, [&](auto slot, int rank, int steps) {
      load_lora_a(work.args_of(all), column0 + lane.column, rank, a);
      ring.wait(slot);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (step >= steps) break;
        ptx::wgmma_fence();
        ptx::wgmma_k16<false>(kType, acc, a[step], dy.of[slot][0][step]);
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait(acc);
      ring.release(slot);
    });
    apply_dropout<Tile>(all.dropout, work.has_chunks() && all.dropout.active(), token0 + threadIdx.x % 4 * 2,
                        column0 + lane.column, all.k, base, acc);

    // Decodes a step while the products of the previous three steps run.
    work.for_stages(ring.parity, pass, [&](auto slot, int stage) {
      uint32_t w[8];
      ring.wait(slot);
      lane.template load<slot>(w);
      tile::unroll<4>([&](auto step) {
        ptx::wgmma_wait_but<3>();
        if (step == 3 && stage > 0) ring.release(tile::Index<(slot + Tile::kStages - 1) % Tile::kStages>{});
        lane.template decode<slot, step>(w[2 * step], w[2 * step + 1], a[step]);
        ptx::wgmma_fence();
        ptx::wgmma_k16<false>(kType, acc, a[step], dy.of[slot][0][step]);
        ptx::wgmma_commit();
      });
    });
    ptx::wgmma_wait(acc);
    ring.release_last(work.stages);
    const auto& p = work.args_of(all);
    tile::finish_tile<Tile, 1>(work, acc, lane.column, p.out, token0, p.m, column0, p.k, base);
  });
}

// Grid: clusters of splits · multicast CTAs, at most as many as fit on the device and as there are tiles or pairs. The
// maps have boxes of 64 x kTokens / multicast values of dy (128-byte swizzle) and of 64 x 64 packed bytes (64-byte
// swizzle). Requires k % 64 == 0, a block size of at least 64, and lora_a aligned to 4 bytes.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_nf4_dx_sm90_kernel(const __grid_constant__ CUtensorMap dy_map,
                              const __grid_constant__ CUtensorMap packed_map,
                              const __grid_constant__ DxSm90Args<typename Tile::T> p) {
  extern __shared__ uint8_t shared_memory[];
  ptx::start_next_grid();
  const uint32_t shared = ptx::shared_address(shared_memory), base = Tile::base_address(shared);
  const tile::Sm90Work<Tile> work(p.plan);
  tile::Sm90Copies<Tile> copies(work, base, dy_map, packed_map);
  // Chunks of ranks come first, and would take the slots of stages that were started early.
  const int early = work.has_chunks() ? 0 : work.first_stages();
  if (threadIdx.x == 0) {
    tile::start_ring<Tile>(base, dy_map, packed_map);
    copies.start_early(early);
  }
  tile::fill_pairs_f32<Tile::kThreads>(reinterpret_cast<char*>(shared_memory) + (base + Tile::kTable - shared), p.code);
  tile::fill_lane_scale_values<Tile::kThreads>(p.scales, base + Tile::kScaleValues);
  work.sync_begin();
  if (threadIdx.x >= Tile::kProducers) {
    ptx::take_registers<Tile::kConsumerRegisters>();
    consume_dx<Tile>(p, work, base);
  } else {
    ptx::give_registers<Tile::kProducerRegisters>();
    produce_dx<Tile>(p, work, copies, early, base);
  }
}

}  // namespace qlora::kernels

// The work of a CTA in Hopper's kernels over experts. It replaces Sm90Work: tiles belong to experts, whose rows only
// the device knows. The producers search for each tile, and pass it to the consumers through shared memory. A CTA's
// search for its next tile runs while the consumers still compute.
//
// Tiles are numbered expert by expert. Within an expert, the token tiles of one row tile follow each other. So CTAs
// that run at the same time share an expert's tokens and rows of its weight in L2. Rows that belong to no expert come
// last. The producers store zeros there, and the consumers do not see these tiles.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid_dependency.cuh"
#include "cuda/ptx/hold.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/generic/groups.cuh"
#include "cuda/tile/sm90/layout.cuh"
#include "cuda/tile/sm90/work.cuh"

namespace qlora::tile {

// A tile and its expert, whose rows end at `end`. After the last tile, `expert` is kNoExpert. Sizes fit 32 bits,
// because TMA's coordinates do.
struct Sm90ExpertTile {
  static constexpr int32_t kNoExpert = -1;
  int32_t expert, token0, end, output0;
};

// One warp searches for tile number `tile`, whose outputs are counted in steps of kOutputs · multicast: a pair of tiles
// is one tile here. If its rows belong to no expert, `expert` is groups.count.
template <class Layout>
__device__ __forceinline__ Sm90ExpertTile search_expert_tile(const Groups& groups, int64_t outputs, int multicast,
                                                             int64_t tile) {
  const int64_t step = Layout::kOutputs * multicast, row_tiles = ceil_div(outputs, step), token_tile = tile / row_tiles;
  const GroupTile found = search_group_tile<Layout::kTokens>(groups, token_tile);
  if (!found.exists) return {Sm90ExpertTile::kNoExpert, 0, 0, 0};
  const int64_t begin = found.group.begin, token_tiles = ceil_div(found.group.end - begin, Layout::kTokens);
  const int64_t first = token_tile - (found.row0 - begin) / Layout::kTokens;  // the expert's first token tile
  const int64_t index = tile - first * row_tiles;
  return {static_cast<int32_t>(found.group.expert), static_cast<int32_t>(begin + index % token_tiles * Layout::kTokens),
          static_cast<int32_t>(found.group.end), static_cast<int32_t>(index / token_tiles * step)};
}

// Two places in shared memory where the producers pass tiles to the consumers, which read a tile until they have stored
// it. Each has the barriers `full` (arrivals: the thread that passes the tile) and `empty` (the consumers' warps).
struct alignas(16) Sm90TileSlots {
  uint4 tile[2];
  uint64_t full[2], empty[2];
};

// Call from one thread, before start_ring, and synchronize the CTA afterwards.
template <class Layout>
__device__ __forceinline__ void start_tile_slots(Sm90TileSlots& slots) {
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(ptx::shared_address(&slots.full[i]), 1);
    ptx::mbarrier_init(ptx::shared_address(&slots.empty[i]), Layout::kEmptyArrivals);
  }
}

// A number of a tile's that is read at each use, because the consumers' stages need all registers.
struct Sm90TileNumber {
  uint32_t address;
  __device__ __forceinline__ operator int64_t() const { return ptx::load_shared_u32(address); }
};

// Args: GroupedSm90Args, for which expert_args(p, tile) gives an expert's arguments without its scales.
template <class Layout, class Args, bool kProduces>
class Sm90ExpertWork : public Sm90Work<Layout> {
 public:
  // `outputs`: per token.
  __device__ __forceinline__ Sm90ExpertWork(const Args& p, Sm90TileSlots& slots, int64_t outputs, uint32_t base)
      : Sm90Work<Layout>(p.stack.plan, static_cast<int>(blockIdx.x) % p.stack.plan.multicast, 0),
        p_(p),
        slots_(ptx::shared_address(&slots)),
        outputs_(outputs),
        base_(base) {}

  // The arguments and the scales of the current tile's expert. They are computed at each use, too.
  __device__ __forceinline__ auto args_of(const typename Args::Stack&) const { return expert_args(p_, tile()); }
  __device__ __forceinline__ ScaleView scales_of(ScaleView view) const {
    view.scales = expert_scales(view.scales, p_.stride, tile().expert);
    return view;
  }
  // The first row of the expert's weight, which has n rows, in the map of all packed bytes.
  __device__ __forceinline__ int32_t first_row(int64_t n) const { return static_cast<int32_t>(tile().expert * n); }

  // Calls use(first token, first output) for each tile.
  template <class Use>
  __device__ __forceinline__ void for_tiles(const Use& use) {
    if constexpr (kProduces)
      produce_tiles(use);
    else
      consume_tiles(use);
  }

 private:
  template <class Use>
  __device__ __forceinline__ void produce_tiles(const Use& use) {
    for (int number = this->tile0();; number += this->plan.clusters) {
      Groups groups = p_.groups;
      int64_t outputs = outputs_;
      ptx::hold(groups.count), ptx::hold(outputs);  // what follows from them is not worth registers
      tile_ = search_expert_tile<Layout>(groups, outputs, this->plan.multicast, number);
      tile_.output0 += this->pair_tile * Layout::kOutputs;
      if (tile_.expert == groups.count) {
        store_zeros(outputs);
        continue;
      }
      pass_tile();
      if (tile_.expert == Sm90ExpertTile::kNoExpert) return;
      if (p_.stack.scales.scales.table != nullptr) fill_scale_values();
      use(int64_t{tile_.token0}, int64_t{tile_.output0});
      ++index_;
    }
  }

  template <class Use>
  __device__ __forceinline__ void consume_tiles(const Use& use) {
    for (;; ++index_) {
      ptx::mbarrier_wait<kFull>(barriers(), phase());
      if (tile().expert == Sm90ExpertTile::kNoExpert) return;
      constexpr uint32_t kToken0 = offsetof(Sm90ExpertTile, token0), kOutput0 = offsetof(Sm90ExpertTile, output0);
      use(Sm90TileNumber{slot() + kToken0}, Sm90TileNumber{slot() + kOutput0});
      __syncwarp();
      ptx::mbarrier_arrive<kEmpty>(barriers(), threadIdx.x % 32 == 0);
    }
  }

  static constexpr int kFull = offsetof(Sm90TileSlots, full), kEmpty = offsetof(Sm90TileSlots, empty);
  __device__ __forceinline__ uint32_t slot() const { return slots_ + index_ % 2 * 16; }
  __device__ __forceinline__ uint32_t barriers() const { return slots_ + index_ % 2 * 8; }
  __device__ __forceinline__ uint32_t phase() const { return index_ / 2 & 1; }

  __device__ __forceinline__ Sm90ExpertTile tile() const {
    if constexpr (kProduces) {
      Sm90ExpertTile tile = tile_;
      ptx::hold(tile.expert);
      return tile;
    } else {
      const uint4 words = ptx::load_shared_v4(slot());
      return {static_cast<int32_t>(words.x), static_cast<int32_t>(words.y), static_cast<int32_t>(words.z),
              static_cast<int32_t>(words.w)};
    }
  }

  __device__ __forceinline__ void pass_tile() const {
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait<kEmpty>(barriers(), phase() ^ 1);
      ptx::store_shared_v4(slot(), make_uint4(tile_.expert, tile_.token0, tile_.end, tile_.output0));
      ptx::mbarrier_arrive<kFull>(barriers(), true);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void store_zeros(int64_t outputs) const {
    static_assert(Layout::kProducers == Layout::kOutputs);
    ptx::wait_for_previous_grid();  // so this grid ends after the previous one
    const int64_t output = tile_.output0 + static_cast<int>(threadIdx.x);
    if (output >= outputs) return;
    for (int64_t token = tile_.token0; token < min(tile_.token0 + Layout::kTokens, tile_.end); ++token)
      p_.stack.out.y[token * outputs + output] = typename Layout::T{};
  }

  // Fills in the values of the expert's own table. Only the producers read them.
  __device__ __forceinline__ void fill_scale_values() const {
    const float* const table = scales_of(p_.stack.scales).scales.table;
    uint32_t values = base_ + Layout::kScaleValues;
    ptx::hold(values);
    ptx::barrier_sync<2, Layout::kProducers>();
#pragma unroll 1
    for (int entry = threadIdx.x; entry < 256; entry += Layout::kProducers)
      store_lane_scale_value(values, entry, __ldg(table + entry));
    ptx::barrier_sync<2, Layout::kProducers>();
  }

  const Args& p_;
  const uint32_t slots_;
  const int64_t outputs_;
  const uint32_t base_;
  uint32_t index_ = 0;   // of the tile among those that this CTA's consumers see
  Sm90ExpertTile tile_;  // the producers' own copy
};

}  // namespace qlora::tile

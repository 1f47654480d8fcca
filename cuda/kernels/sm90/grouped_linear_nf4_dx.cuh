// dX of all experts on Hopper's tensor cores, in one launch of persistent CTAs. It uses the tiles of
// linear_nf4_dx_sm90_kernel, like grouped_linear_nf4_sm90_kernel.
//
// The last stage of an expert may reach into the rows of the next expert's weight. They are multiplied by columns of dy
// that do not exist and are zero, with a scale of the expert's own.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/kernels/sm90/grouped_linear_nf4.cuh"
#include "cuda/kernels/sm90/linear_nf4_dx.cuh"
#include "cuda/tile/sm90/expert_work.cuh"

namespace qlora::kernels {

template <class T>
__device__ __forceinline__ DxSm90Args<T> expert_args(const GroupedSm90Args<DxSm90Args<T>>& p,
                                                     const tile::Sm90ExpertTile& tile) {
  DxSm90Args<T> args = p.stack;
  args.m = args.g.m = tile.end;
  ptx::hold(args.g.rank), ptx::hold(args.g.h), ptx::hold(args.k), ptx::hold(args.out.y);
  args.lora_a += tile.expert * args.g.rank * args.k;
  return args;
}

// Grid: as for grouped_linear_nf4_sm90_kernel. Has the requirements of linear_nf4_dx_sm90_kernel, for every expert.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_linear_nf4_dx_sm90_kernel(const __grid_constant__ CUtensorMap dy_map,
                                      const __grid_constant__ CUtensorMap packed_map,
                                      const __grid_constant__ GroupedSm90Args<DxSm90Args<typename Tile::T>> p) {
  extern __shared__ uint8_t shared_memory[];
  __shared__ tile::Sm90TileSlots slots;
  ptx::start_next_grid();
  using Args = GroupedSm90Args<DxSm90Args<typename Tile::T>>;
  const uint32_t shared = ptx::shared_address(shared_memory), base = Tile::base_address(shared);
  if (threadIdx.x == 0) {
    tile::start_tile_slots<Tile>(slots);
    tile::start_ring<Tile>(base, dy_map, packed_map);
  }
  tile::fill_pairs_f32<Tile::kThreads>(reinterpret_cast<char*>(shared_memory) + (base + Tile::kTable - shared),
                                       p.stack.code);
  tile::fill_lane_scale_values<Tile::kThreads>(p.stack.scales, base + Tile::kScaleValues);
  tile::Sm90Work<Tile>(p.stack.plan).sync_begin();
  if (threadIdx.x >= Tile::kProducers) {
    ptx::take_registers<Tile::kConsumerRegisters>();
    tile::Sm90ExpertWork<Tile, Args, false> work(p, slots, p.stack.k, base);
    consume_dx<Tile>(p.stack, work, base);
  } else {
    ptx::give_registers<Tile::kProducerRegisters>();
    tile::Sm90ExpertWork<Tile, Args, true> work(p, slots, p.stack.k, base);
    tile::Sm90Copies<Tile> copies(work, base, dy_map, packed_map);
    produce_dx<Tile>(p.stack, work, copies, 0, base);
  }
}

}  // namespace qlora::kernels

// The forward of all experts on Hopper's tensor cores, in one launch of persistent CTAs. It uses the tiles of
// linear_nf4_sm90_kernel, and each tile has one expert's tokens and weight. Tokens keep their row numbers in x. The
// packed bytes of all experts are one matrix, whose map serves them all.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cpp/format/grouped.h"
#include "cuda/kernels/sm90/linear_nf4.cuh"
#include "cuda/tile/generic/groups.cuh"
#include "cuda/tile/sm90/expert_work.cuh"

namespace qlora::kernels {

// Stack: the arguments of the first expert, with all experts' tokens.
template <class Stack_>
struct GroupedSm90Args {
  using Stack = Stack_;
  Stack stack;
  tile::Groups groups;
  WeightStride stride;
};

// The arguments for a tile's expert, without its scales (Sm90ExpertWork::scales_of).
template <class T>
__device__ __forceinline__ LinearSm90Args<T> expert_args(const GroupedSm90Args<LinearSm90Args<T>>& p,
                                                         const tile::Sm90ExpertTile& tile) {
  LinearSm90Args<T> args = p.stack;
  args.m = args.lora.m = tile.end;
  ptx::hold(args.lora.rank), ptx::hold(args.lora.h), ptx::hold(args.n), ptx::hold(args.out.y);
  args.lora.b += tile.expert * args.n * args.lora.rank;
  if (args.out.bias != nullptr) args.out.bias += tile.expert * args.n;
  return args;
}

// Grid: at most as many CTAs as fit on the device and as there are tiles. The maps are those of linear_nf4_sm90_kernel,
// and so are the requirements, for every expert.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    grouped_linear_nf4_sm90_kernel(const __grid_constant__ CUtensorMap x_map,
                                   const __grid_constant__ CUtensorMap packed_map,
                                   const __grid_constant__ GroupedSm90Args<LinearSm90Args<typename Tile::T>> p) {
  extern __shared__ uint8_t shared_memory[];
  __shared__ tile::Sm90TileSlots slots;
  using Args = GroupedSm90Args<LinearSm90Args<typename Tile::T>>;
  const uint32_t base = Tile::base_address(ptx::shared_address(shared_memory));
  if (threadIdx.x == 0) {
    tile::start_tile_slots<Tile>(slots);
    tile::start_ring<Tile>(base, x_map, packed_map);
  }
  tile::fill_pair_table<typename Tile::T, Tile::kThreads>(base + Tile::kTable, p.stack.code);
  tile::fill_lane_scale_values<Tile::kThreads>(p.stack.scales, base + Tile::kScaleValues);
  tile::Sm90Work<Tile>(p.stack.plan).sync_begin();
  if (threadIdx.x >= Tile::kProducers) {
    ptx::take_registers<Tile::kConsumerRegisters>();
    tile::Sm90ExpertWork<Tile, Args, false> work(p, slots, p.stack.n, base);
    consume<Tile>(p.stack, work, base);
  } else {
    ptx::give_registers<Tile::kProducerRegisters>();
    tile::Sm90ExpertWork<Tile, Args, true> work(p, slots, p.stack.n, base);
    tile::Sm90Copies<Tile> copies(work, base, x_map, packed_map);
    tile::with_scale_bytes(p.stack.scales, [&](auto bytes) { produce<Tile, bytes>(p.stack, work, copies, 0, base); });
  }
}

}  // namespace qlora::kernels

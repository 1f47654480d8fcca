// The gradients of all experts' LoRA weights in one launch: what all data types share, and the kernel of exact
// products. Each tile sums over one expert's tokens. An expert without tokens gets zeros.
#pragma once

#include <cstdint>

#include "cuda/kernels/generic/linear_nf4_dlora_exact.cuh"
#include "cuda/tile/generic/groups.cuh"

namespace qlora::kernels {

struct GroupedDLoraArgs {
  DLoraArgs stack;  // of the first expert, with all experts' tokens
  tile::Groups groups;
  uint32_t column_tiles;  // per expert
};

// The output of a column tile's CTAs if the expert has no tokens. These zeros are contiguous in memory.
template <class T>
__device__ __forceinline__ void clear_dlora_tile(const DLoraArgs& args, int64_t column_tile) {
  if (blockIdx.y > 0) return;
  const bool is_a = column_tile < args.a_tiles;
  T* const out = static_cast<T*>(is_a ? args.a.out : args.b.out);
  const int64_t columns = is_a ? args.a.columns : args.b.columns;
  const int64_t column0 = (column_tile - (is_a ? 0 : args.a_tiles)) * kDLoraColumns;
  const int64_t count = min(int64_t{kDLoraColumns}, columns - column0) * args.rank;
  for (int64_t i = threadIdx.x; i < count; i += kDLoraThreads) out[column0 * args.rank + i] = T{};
}

// Calls body(args, column_tile, begin, end) for this CTA's tile. Grid: x over column tiles (fastest) and experts, y
// over ranks.
template <class T, class Body>
__device__ __forceinline__ void visit_dlora_tile(const GroupedDLoraArgs& p, Body body) {
  ptx::wait_for_previous_grid();  // dX, for example, behind the launch that computes g
  const uint32_t expert = blockIdx.x / p.column_tiles, column_tile = blockIdx.x % p.column_tiles;
  const tile::Group group = tile::find_group(p.groups, expert);
  DLoraArgs args = p.stack;
  args.a.out = static_cast<T*>(args.a.out) + expert * args.rank * args.a.columns;
  args.b.out = static_cast<T*>(args.b.out) + expert * args.rank * args.b.columns;
  args.m = group.end;
  args.splits = 1;
  if (group.begin == group.end)
    clear_dlora_tile<T>(args, column_tile);
  else
    body(args, int64_t{column_tile}, group.begin, group.end);
}

template <class T>
__global__ void __launch_bounds__(kDLoraThreads)
    grouped_linear_nf4_dlora_exact_kernel(const __grid_constant__ GroupedDLoraArgs p) {
  visit_dlora_tile<T>(p, [](const DLoraArgs& args, int64_t column_tile, int64_t begin, int64_t end) {
    linear_nf4_dlora_exact_tile<T>(args, column_tile, begin, end);
  });
}

}  // namespace qlora::kernels

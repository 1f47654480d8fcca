// Launches Hopper's kernels over experts.
#pragma once

#include <algorithm>

#include "cpp/format/grouped.h"
#include "cuda/kernels/sm90/grouped_linear_nf4.cuh"
#include "cuda/launch/generic/grouped_low_rank.h"
#include "cuda/launch/sm90/clusters.h"

namespace qlora::cuda::sm90 {

// The TMA map of all experts' weights, which follow each other.
template <class Problem>
cudaError_t make_packed_map(const Grouped<Problem>& problem, int box_rows, CUtensorMap* map) {
  Weight all = problem.stack.w;
  all.n *= problem.experts;
  return make_packed_map(all, box_rows, map);
}

// `args`: of the first expert's weight and all tokens. Only the device knows how many tiles there are.
template <auto kKernel, class Tile, class Args, class Problem>
cudaError_t launch_experts(const Grouped<Problem>& problem, const Config& c, int64_t outputs, const CUtensorMap& tokens,
                           const CUtensorMap& packed, const Args& args, const Context& context) {
  const int64_t token_tiles = tile::most_group_tiles(problem.stack.m, problem.experts, c.tokens);
  const int64_t most = token_tiles * ceil_div(outputs, kOutputs * c.multicast);
  kernels::GroupedSm90Args<Args> grouped{
      args, {problem.offsets, problem.experts, problem.stack.m}, weight_stride(problem.stack.w)};
  grouped.stack.plan.clusters = static_cast<int>(std::min(resident_clusters(c, context.device), most));
  return launch_clusters<kKernel, Tile>(grouped.stack.plan, c, tokens, packed, grouped, start_of(grouped.stack.plan),
                                        context);
}

}  // namespace qlora::cuda::sm90

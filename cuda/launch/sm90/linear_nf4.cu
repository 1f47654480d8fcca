// Launches the forward on wgmma and TMA.
#include "cuda/kernels/sm90/linear_nf4.cuh"

#include "cuda/launch/sm90/launchers.h"
#include "cuda/launch/sm90/single_weight.h"

namespace qlora::cuda::sm90 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearProblem& p, const Config& c, const void* h, const Context& context) {
  return launch_forward<kernels::linear_nf4_sm90_kernel<Tile>, Tile>(p, c, h, context);
}

}  // namespace

ResidentClusters query_clusters(const Device& device) {
  using Tile = tile::LinearSm90Tile<bfloat16, 64>;
  return query_resident_clusters<kernels::linear_nf4_sm90_kernel<Tile>, Tile>(device);
}

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  const LowRankProblem low_rank = h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, nullptr);
  return with_low_rank(low_rank, p.h, context, [&](auto element, const void* h) {
    using T = decltype(element);
    return config.tokens == 64 ? launch_tile<tile::LinearSm90Tile<T, 64>>(p, config, h, context)
                               : launch_tile<tile::LinearSm90Tile<T, 128>>(p, config, h, context);
  });
}

}  // namespace qlora::cuda::sm90

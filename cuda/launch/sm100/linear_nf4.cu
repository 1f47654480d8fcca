// Launches the forward on tcgen05 and TMA.
#include "cuda/kernels/sm100/linear_nf4.cuh"

#include "cuda/launch/sm100/launchers.h"
#include "cuda/launch/sm90/single_weight.h"
#include "cuda/tuning/sm100.h"

namespace qlora::cuda::sm100 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearProblem& p, const Config& c, const void* h, const Context& context) {
  static_assert(Tile::kStageK == kStageTerms);
  return sm90::launch_forward<kernels::linear_nf4_sm100_kernel<Tile>, Tile>(p, c, h, context);
}

}  // namespace

ResidentClusters query_clusters(const Device& device) {
  using Tile = tile::LinearSm100Tile<bfloat16, 64>;
  return sm90::query_resident_clusters<kernels::linear_nf4_sm100_kernel<Tile>, Tile>(device);
}

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  const LowRankProblem low_rank = h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, nullptr);
  return sm90::with_low_rank(low_rank, p.h, context, [&](auto element, const void* h) {
    using T = decltype(element);
    if (config.tokens == 64) return launch_tile<tile::LinearSm100Tile<T, 64>>(p, config, h, context);
    return config.tokens == 128 ? launch_tile<tile::LinearSm100Tile<T, 128>>(p, config, h, context)
                                : launch_tile<tile::LinearSm100Tile<T, 256>>(p, config, h, context);
  });
}

}  // namespace qlora::cuda::sm100

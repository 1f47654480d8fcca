// Launches dX on tcgen05 and TMA.
#include "cuda/kernels/sm100/linear_nf4_dx.cuh"

#include "cuda/launch/sm100/launchers.h"
#include "cuda/launch/sm90/single_weight.h"
#include "cuda/tuning/sm100.h"

namespace qlora::cuda::sm100 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearDxProblem& p, const Config& c, const void* g, const Context& context) {
  static_assert(Tile::kStageRows == kStageTerms);
  return sm90::launch_dx<kernels::linear_nf4_dx_sm100_kernel<Tile>, Tile>(p, c, g, context);
}

}  // namespace

cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  const LowRankProblem low_rank = g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, nullptr);
  return sm90::with_low_rank(low_rank, p.g, context, [&](auto element, const void* g) {
    using T = decltype(element);
    if (config.tokens == 64) return launch_tile<tile::DxSm100Tile<T, 64>>(p, config, g, context);
    return config.tokens == 128 ? launch_tile<tile::DxSm100Tile<T, 128>>(p, config, g, context)
                                : launch_tile<tile::DxSm100Tile<T, 256>>(p, config, g, context);
  });
}

}  // namespace qlora::cuda::sm100

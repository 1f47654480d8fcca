// Launches dX on wgmma and TMA.
#include "cuda/kernels/sm90/linear_nf4_dx.cuh"

#include "cuda/launch/sm90/launchers.h"
#include "cuda/launch/sm90/single_weight.h"

namespace qlora::cuda::sm90 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearDxProblem& p, const Config& c, const void* g, const Context& context) {
  return launch_dx<kernels::linear_nf4_dx_sm90_kernel<Tile>, Tile>(p, c, g, context);
}

}  // namespace

cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  const LowRankProblem low_rank = g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, nullptr);
  return with_low_rank(low_rank, p.g, context, [&](auto element, const void* g) {
    using T = decltype(element);
    if (config.tokens == 64) return launch_tile<tile::DxSm90Tile<T, 64>>(p, config, g, context);
    return config.tokens == 128 ? launch_tile<tile::DxSm90Tile<T, 128>>(p, config, g, context)
                                : launch_tile<tile::DxSm90Tile<T, 256>>(p, config, g, context);
  });
}

}  // namespace qlora::cuda::sm90

// Launches dX on tcgen05 and TMA.
#include "cuda/kernels/sm100/linear_nf4_dx.cuh"

#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/sm100/launchers.h"
#include "cuda/launch/sm90/args.h"
#include "cuda/launch/sm90/clusters.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/sm100_tcgen05.h"

namespace qlora::cuda::sm100 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearDxProblem& p, const Config& c, const void* g, const Context& context) {
  static_assert(Tile::kStageRows == kStageTerms);
  CUtensorMap dy, packed;
  cudaError_t error = sm90::make_token_map<Tile>(c, p.dy, p.m, p.w.n, &dy);
  if (error == cudaSuccess) error = sm90::make_packed_map(p.w, Tile::kStageRows, &packed);
  if (error != cudaSuccess) return error;
  const auto args = sm90::make_args<Tile>(p, c, g, context.device);
  return sm90::launch_clusters<kernels::linear_nf4_dx_sm100_kernel<Tile>, Tile>(args.plan, c, dy, packed, args,
                                                                                sm90::start_of(args.plan), context);
}

}  // namespace

cudaError_t launch(const LinearDxProblem& p, const Config& config, const Context& context) {
  void* g = p.g;
  if (!g && p.lora.rank > 0) g = context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error = launch_low_rank(g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g), context.stream);
  if (error != cudaSuccess) return error;
  return with_16_bit_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (config.tokens == 64) return launch_tile<tile::DxSm100Tile<T, 64>>(p, config, g, context);
    return config.tokens == 128 ? launch_tile<tile::DxSm100Tile<T, 128>>(p, config, g, context)
                                : launch_tile<tile::DxSm100Tile<T, 256>>(p, config, g, context);
  });
}

}  // namespace qlora::cuda::sm100

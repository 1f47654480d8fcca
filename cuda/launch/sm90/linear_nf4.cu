// Launches the forward on wgmma and TMA.
#include "cuda/kernels/sm90/linear_nf4.cuh"

#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/sm90/args.h"
#include "cuda/launch/sm90/clusters.h"
#include "cuda/launch/sm90/launchers.h"
#include "cuda/launch/types.h"

namespace qlora::cuda::sm90 {
namespace {

template <class Tile>
cudaError_t launch_tile(const LinearProblem& p, const Config& c, const void* h, const Context& context) {
  static_assert(Tile::kStageK == kForwardStageK);
  CUtensorMap x, packed;
  cudaError_t error = make_token_map<Tile>(c, p.x, p.m, p.w.k, &x);
  if (error == cudaSuccess) error = make_packed_map(p.w, Tile::kRows, &packed);
  if (error != cudaSuccess) return error;
  const auto args = make_args<Tile>(p, c, h, context.device);
  return launch_clusters<kernels::linear_nf4_sm90_kernel<Tile>, Tile>(args.plan, c, x, packed, args,
                                                                      start_of(args.plan), context);
}

}  // namespace

ResidentClusters query_clusters(const Device& device) {
  using Tile = tile::LinearSm90Tile<bfloat16, 64>;
  return query_resident_clusters<kernels::linear_nf4_sm90_kernel<Tile>, Tile>(device);
}

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  void* h = p.h;
  if (!h && p.lora.rank > 0) h = context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), context.stream);
  if (error != cudaSuccess) return error;
  return with_16_bit_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    return config.tokens == 64 ? launch_tile<tile::LinearSm90Tile<T, 64>>(p, config, h, context)
                               : launch_tile<tile::LinearSm90Tile<T, 128>>(p, config, h, context);
  });
}

}  // namespace qlora::cuda::sm90

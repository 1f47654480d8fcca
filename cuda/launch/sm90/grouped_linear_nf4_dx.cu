// Launches dX of experts on wgmma and TMA.
#include "cuda/kernels/sm90/grouped_linear_nf4_dx.cuh"

#include "cuda/launch/sm90/args.h"
#include "cuda/launch/sm90/experts.h"
#include "cuda/launch/sm90/launchers.h"
#include "cuda/launch/types.h"

namespace qlora::cuda::sm90 {
namespace {

template <class Tile>
cudaError_t launch_tile(const Grouped<LinearDxProblem>& problem, const Config& c, const void* g,
                        const Context& context) {
  const LinearDxProblem& p = problem.stack;
  CUtensorMap dy, packed;
  cudaError_t error = make_token_map<Tile>(c, p.dy, p.m, p.w.n, &dy);
  if (error == cudaSuccess) error = make_packed_map(problem, Tile::kStageRows, &packed);
  if (error != cudaSuccess) return error;
  return launch_experts<kernels::grouped_linear_nf4_dx_sm90_kernel<Tile>, Tile>(
      problem, c, p.w.k, dy, packed, make_args<Tile>(p, c, g, context.device), context);
}

}  // namespace

cudaError_t launch(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context) {
  const LinearDxProblem& p = problem.stack;
  void* const g = p.g ? p.g : context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error =
      launch_grouped_low_rank({g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g), problem.offsets, problem.experts},
                              context.device, context.stream);
  if (error != cudaSuccess) return error;
  return with_16_bit_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (config.tokens) {
      case 64:
        return launch_tile<tile::DxSm90Tile<T, 64>>(problem, config, g, context);
      case 128:
        return launch_tile<tile::DxSm90Tile<T, 128>>(problem, config, g, context);
      default:
        return launch_tile<tile::DxSm90Tile<T, 256>>(problem, config, g, context);
    }
  });
}

}  // namespace qlora::cuda::sm90

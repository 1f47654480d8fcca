// Launches the forward of experts on wgmma and TMA.
#include "cuda/kernels/sm90/grouped_linear_nf4.cuh"

#include "cuda/launch/sm90/args.h"
#include "cuda/launch/sm90/experts.h"
#include "cuda/launch/sm90/launchers.h"
#include "cuda/launch/types.h"

namespace qlora::cuda::sm90 {
namespace {

template <class Tile>
cudaError_t launch_tile(const Grouped<LinearProblem>& problem, const Config& c, const void* h, const Context& context) {
  static_assert(Tile::kStageK == kForwardStageK);
  const LinearProblem& p = problem.stack;
  CUtensorMap x, packed;
  cudaError_t error = make_token_map<Tile>(c, p.x, p.m, p.w.k, &x);
  if (error == cudaSuccess) error = make_packed_map(problem, Tile::kRows, &packed);
  if (error != cudaSuccess) return error;
  return launch_experts<kernels::grouped_linear_nf4_sm90_kernel<Tile>, Tile>(
      problem, c, p.w.n, x, packed, make_args<Tile>(p, c, h, context.device), context);
}

}  // namespace

cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context) {
  const LinearProblem& p = problem.stack;
  void* const h = p.h ? p.h : context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error =
      launch_grouped_low_rank({h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), problem.offsets, problem.experts},
                              context.device, context.stream);
  if (error != cudaSuccess) return error;
  return with_16_bit_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    return config.tokens == 64 ? launch_tile<tile::LinearSm90Tile<T, 64>>(problem, config, h, context)
                               : launch_tile<tile::LinearSm90Tile<T, 128>>(problem, config, h, context);
  });
}

}  // namespace qlora::cuda::sm90

// The forward of all experts: one launch for h if there is LoRA, and one for y.
#pragma once

#include "cpp/format/grouped.h"
#include "cuda/kernels/generic/grouped_linear_nf4_ragged.cuh"
#include "cuda/launch/cluster.h"
#include "cuda/launch/generic/grouped_low_rank.h"
#include "cuda/launch/launch.h"
#include "cuda/tuning/choice.h"

namespace qlora::cuda {

// make_args(h, token tiles) gives the arguments of kKernel for the first expert's weight and all tokens.
template <auto kKernel, class MakeArgs>
cudaError_t launch_experts(const Grouped<LinearProblem>& problem, const Config& config, int threads, int shared_bytes,
                           const Context& context, const MakeArgs& make_args) {
  const LinearProblem& p = problem.stack;
  int ctas = 0;  // unused, since the grid covers all rows; the query allows the kernel its shared memory
  cudaError_t error = ctas_per_sm<kKernel>(context.device, threads, shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  void* const h = p.h ? p.h : context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  error = launch_grouped_low_rank({h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), problem.offsets, problem.experts},
                                  context.device, context.stream);
  Start start = Start::kInOrder;
  if (error == cudaSuccess && p.lora.rank > 0) error = earliest_start<kKernel>(context.device, &start);
  if (error != cudaSuccess) return error;
  const int64_t token_tiles = tile::most_group_tiles(p.m, problem.experts, config.tokens);
  const kernels::GroupedLinearArgs args{
      make_args(h, token_tiles), {problem.offsets, problem.experts, p.m}, weight_stride(p.w)};
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.n, config.rows));
  return launch_cluster(kKernel, grid, dim3(1), threads, shared_bytes, context.stream, start, args);
}

}  // namespace qlora::cuda

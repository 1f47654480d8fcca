// What the launchers of Hopper's and Blackwell's kernels share for a single weight.
#pragma once

#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/sm90/args.h"
#include "cuda/launch/sm90/clusters.h"
#include "cuda/launch/types.h"

namespace qlora::cuda::sm90 {

template <auto kKernel, class Tile>
cudaError_t launch_forward(const LinearProblem& p, const Config& c, const void* h, const Context& context) {
  CUtensorMap x, packed;
  cudaError_t error = make_token_map<Tile>(c, p.x, p.m, p.w.k, &x);
  if (error == cudaSuccess) error = make_packed_map<Tile::kPackedLine>(p.w, Tile::kRows, &packed);
  if (error != cudaSuccess) return error;
  const auto args = make_args<Tile>(p, c, h, context.device);
  return launch_clusters<kKernel, Tile>(args.plan, c, x, packed, args, start_of(args.plan), context);
}

template <auto kKernel, class Tile>
cudaError_t launch_dx(const LinearDxProblem& p, const Config& c, const void* g, const Context& context) {
  CUtensorMap dy, packed;
  cudaError_t error = make_token_map<Tile>(c, p.dy, p.m, p.w.n, &dy);
  if (error == cudaSuccess) error = make_packed_map(p.w, Tile::kStageRows, &packed);
  if (error != cudaSuccess) return error;
  const auto args = make_args<Tile>(p, c, g, context.device);
  return launch_clusters<kKernel, Tile>(args.plan, c, dy, packed, args, start_of(args.plan), context);
}

// Computes h or g, unless it is `given`, and calls launch(a value of the problem's type, h or g).
template <class Launch>
cudaError_t with_low_rank(LowRankProblem problem, void* given, const Context& context, const Launch& launch) {
  problem.out = given;
  if (!given && problem.rank > 0) problem.out = context.allocate(problem.m * problem.rank * dtype_bytes(problem.dtype));
  const cudaError_t error = launch_low_rank(problem, context.stream);
  if (error != cudaSuccess) return error;
  return with_16_bit_type(problem.dtype, [&](auto element) { return launch(element, problem.out); });
}

}  // namespace qlora::cuda::sm90

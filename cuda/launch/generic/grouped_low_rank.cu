// Launches LoRA's low-rank products of all experts.
#include "cuda/launch/generic/grouped_low_rank.h"

#include <algorithm>

#include "cuda/kernels/generic/grouped_low_rank.cuh"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/generic.h"

namespace qlora::cuda {
namespace {

template <class T, bool kTransposed, int kRankTiles, int kTokenTiles>
cudaError_t launch_tiles(const kernels::GroupedLowRankArgs<T>& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tile::most_group_tiles(args.groups.rows, args.groups.count, 8 * kTokenTiles)),
                  static_cast<unsigned>(ceil_div(args.stack.rank, 16 * kRankTiles)));
  return launch_kernel(kernels::grouped_low_rank_kernel<T, kTransposed, kRankTiles, kTokenTiles>, grid,
                       kernels::kLowRankThreads, 0, stream, args);
}

// The larger tiles have as many tokens as those of low_rank.cu.
template <class T, bool kTransposed, int kRankTiles>
cudaError_t launch_mma(const kernels::GroupedLowRankArgs<T>& args, const Device& device, cudaStream_t stream) {
  constexpr int kMany = kRankTiles > 1 ? 2 : 4;
  const int64_t tokens =
      grouped_low_rank_tokens(args.groups.rows, args.groups.count, 16 * kRankTiles, 8 * kMany, device);
  return tokens == 8 ? launch_tiles<T, kTransposed, kRankTiles, 1>(args, stream)
                     : launch_tiles<T, kTransposed, kRankTiles, kMany>(args, stream);
}

template <class T, bool kTransposed>
cudaError_t launch_scalar(const kernels::GroupedLowRankArgs<T>& args, cudaStream_t stream) {
  constexpr int64_t kRanks = kernels::kLowRankScalarThreads / 32 * kernels::kLowRankScalarRanks;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.groups.rows, 1 << 20)),
                  static_cast<unsigned>(ceil_div(args.stack.rank, kRanks)));
  return launch_kernel(kernels::grouped_low_rank_scalar_kernel<T, kTransposed>, grid, kernels::kLowRankScalarThreads, 0,
                       stream, args);
}

template <class T, bool kTransposed>
cudaError_t launch(const Grouped<LowRankProblem>& problem, const Device& device, cudaStream_t stream) {
  const LowRankProblem& p = problem.stack;
  const kernels::GroupedLowRankArgs<T> args{
      {static_cast<const T*>(p.x), static_cast<const T*>(p.a), static_cast<T*>(p.out), p.m, p.k, p.rank,
       static_cast<float>(p.scaling * p.dropout.keep_scale), p.dropout, nullptr, 0},
      {problem.offsets, problem.experts, p.m}};
  if constexpr (sizeof(T) == 2) {
    if (p.k % 8 == 0 && (!kTransposed || p.rank % 2 == 0))
      return p.rank <= 16 ? launch_mma<T, kTransposed, 1>(args, device, stream)
                          : launch_mma<T, kTransposed, 4>(args, device, stream);
  }
  return launch_scalar<T, kTransposed>(args, stream);
}

}  // namespace

cudaError_t launch_grouped_low_rank(const Grouped<LowRankProblem>& problem, const Device& device, cudaStream_t stream) {
  if (problem.stack.m == 0 || problem.stack.rank == 0) return cudaSuccess;
  return with_type(problem.stack.dtype, [&](auto element) {
    using T = decltype(element);
    return problem.stack.transposed ? launch<T, true>(problem, device, stream)
                                    : launch<T, false>(problem, device, stream);
  });
}

}  // namespace qlora::cuda

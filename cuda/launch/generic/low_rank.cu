// Launches LoRA's low-rank products.
#include "cuda/launch/generic/low_rank.h"

#include <algorithm>
#include <span>

#include "cuda/kernels/generic/low_rank.cuh"
#include "cuda/launch/cluster.h"
#include "cuda/launch/generic/low_rank_splits.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/types.h"
#include "cuda/tile/generic/unroll.cuh"
#include "cuda/tuning/generic.h"

namespace qlora::cuda {
namespace {

// From this many tokens on, a CTA takes several tiles of 8: enough CTAs remain, and `a` is read less often.
constexpr int64_t kManyTokens = 512;

int64_t tiles(int64_t m, int64_t ranks, int rank_tiles, int token_tiles) {
  return ceil_div(m, int64_t{8} * token_tiles) * ceil_div(ranks, int64_t{16} * rank_tiles);
}

// `split_tiles` determines how k is split.
template <class T, bool kTransposed, int kRankTiles, int kTokenTiles, bool kExtends = false>
cudaError_t launch_tiles(const kernels::LowRankArgs<T>& args, int64_t split_tiles, cudaStream_t stream) {
  constexpr auto kKernel = kernels::low_rank_kernel<T, kTransposed, kRankTiles, kTokenTiles, kExtends>;
  int index = 0, cluster_ctas = 1;
  const Device* device = nullptr;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = device_at(index, &device);
  if (error == cudaSuccess) error = ctas_per_cluster<kKernel>(*device, kernels::kLowRankThreads, 0, &cluster_ctas);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.m, 8 * kTokenTiles)),
                  static_cast<unsigned>(ceil_div(std::max(args.rank, args.terms), 16 * kRankTiles)),
                  static_cast<unsigned>(low_rank_splits(split_tiles, args.k, cluster_ctas, *device)));
  return launch_cluster(kKernel, grid, dim3(1, 1, grid.z), kernels::kLowRankThreads, 0, stream, Start::kInOrder, args);
}

template <class T, bool kTransposed>
cudaError_t launch_mma(const kernels::LowRankArgs<T>& args, cudaStream_t stream) {
  const bool many = args.m >= kManyTokens, few_ranks = args.rank <= 16;
  const int64_t split_tiles = tiles(args.m, args.rank, few_ranks ? 1 : 4, !many ? 1 : few_ranks ? 4 : 2);
  if (args.extended != nullptr)  // in other tiles, but with the same splits, which give the same bits
    return args.terms <= 16 ? launch_tiles<T, kTransposed, 1, 4, true>(args, split_tiles, stream)
                            : launch_tiles<T, kTransposed, 4, 2, true>(args, split_tiles, stream);
  if (few_ranks)
    return many ? launch_tiles<T, kTransposed, 1, 4>(args, split_tiles, stream)
                : launch_tiles<T, kTransposed, 1, 1>(args, split_tiles, stream);
  return many ? launch_tiles<T, kTransposed, 4, 2>(args, split_tiles, stream)
              : launch_tiles<T, kTransposed, 4, 1>(args, split_tiles, stream);
}

// See query_low_rank_splits.
template <class T, bool kTransposed>
cudaError_t query_splits(int64_t m, int64_t k, const Device& device, uint8_t* of_16, std::span<uint8_t> of_more) {
  const bool many = m >= kManyTokens;
  int ctas = 1, more_ctas = 1;
  const auto query = [&](auto rank_tiles, auto token_tiles, int* most) {
    constexpr auto kKernel = kernels::low_rank_kernel<T, kTransposed, rank_tiles, token_tiles, false>;
    return ctas_per_cluster<kKernel>(device, kernels::kLowRankThreads, 0, most);
  };
  using tile::Index;
  cudaError_t error = many ? query(Index<1>{}, Index<4>{}, &ctas) : query(Index<1>{}, Index<1>{}, &ctas);
  if (error == cudaSuccess)
    error = many ? query(Index<4>{}, Index<2>{}, &more_ctas) : query(Index<4>{}, Index<1>{}, &more_ctas);
  if (error != cudaSuccess) return error;
  *of_16 = static_cast<uint8_t>(low_rank_splits(tiles(m, 16, 1, many ? 4 : 1), k, ctas, device));
  for (size_t i = 0; i < of_more.size(); ++i) {
    const int64_t all = tiles(m, 64 * static_cast<int64_t>(i + 1), 4, many ? 2 : 1);
    of_more[i] = static_cast<uint8_t>(low_rank_splits(all, k, more_ctas, device));
  }
  return cudaSuccess;
}

template <class T, bool kTransposed>
cudaError_t launch_scalar(const kernels::LowRankArgs<T>& args, cudaStream_t stream) {
  constexpr int64_t kRanks = kernels::kLowRankScalarThreads / 32 * kernels::kLowRankScalarRanks;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.m, 1 << 20)),
                  static_cast<unsigned>(ceil_div(args.rank, kRanks)));
  return launch_kernel(kernels::low_rank_scalar_kernel<T, kTransposed>, grid, kernels::kLowRankScalarThreads, 0, stream,
                       args);
}

template <class T>
cudaError_t launch(const LowRankProblem& problem, cudaStream_t stream) {
  const kernels::LowRankArgs<T> args{static_cast<const T*>(problem.x),
                                     static_cast<const T*>(problem.a),
                                     static_cast<T*>(problem.out),
                                     problem.m,
                                     problem.k,
                                     problem.rank,
                                     static_cast<float>(problem.scaling * problem.dropout.keep_scale),
                                     problem.dropout,
                                     problem.clear.words,
                                     problem.clear.count,
                                     static_cast<T*>(problem.extended.rows),
                                     problem.extended.terms,
                                     problem.extended.has_one};
  if constexpr (sizeof(T) == 2) {
    if (problem.k % 8 == 0 && (!problem.transposed || problem.rank % 2 == 0))
      return problem.transposed ? launch_mma<T, true>(args, stream) : launch_mma<T, false>(args, stream);
  }
  return problem.transposed ? launch_scalar<T, true>(args, stream) : launch_scalar<T, false>(args, stream);
}

}  // namespace

cudaError_t launch_low_rank(const LowRankProblem& problem, cudaStream_t stream) {
  if (problem.m == 0 || problem.rank == 0) return problem.clear.clear(stream);
  return with_type(problem.dtype, [&](auto element) { return launch<decltype(element)>(problem, stream); });
}

cudaError_t query_low_rank_splits(DType dtype, int64_t m, int64_t k, bool transposed, const Device& device,
                                  uint8_t* of_16, std::span<uint8_t> of_more) {
  return with_16_bit_type(dtype, [&](auto element) {
    using T = decltype(element);
    return transposed ? query_splits<T, true>(m, k, device, of_16, of_more)
                      : query_splits<T, false>(m, k, device, of_16, of_more);
  });
}

}  // namespace qlora::cuda

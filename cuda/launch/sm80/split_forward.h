// What the forward's kernels for regular shapes share: k is split over CTAs, in multiples of kUnit segments.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpp/format/problem.h"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/workspace.h"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tuning/sm80.h"

namespace qlora::cuda::sm80 {

// Splits k over as many CTAs as fill the device, or as the environment forces. They form a cluster if the device has
// clusters.
template <auto kKernel, class Tile, int kUnit>
cudaError_t plan_splits(const LinearProblem& p, const Device& device, Config* config) {
  static_assert(Tile::kRows == kForwardRows && tile::kSegment == kSegment);
  int ctas = 0, cluster_ctas = 1;
  cudaError_t error = ctas_per_sm<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);
  if (error == cudaSuccess)
    error = ctas_per_cluster<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
  if (error != cudaSuccess) return error;
  const int64_t segments = p.w.k / kSegment, tiles = ceil_div(p.m, Tile::kTokens) * ceil_div(p.w.n, Tile::kRows);
  const int64_t slots = int64_t{device.sm_count} * ctas, most = cluster_ctas > 1 ? cluster_ctas : slots;
  const int64_t splits = config->splits > 0 ? std::min(config->splits, most)
                                            : forward_splits(tiles, segments, kUnit, Tile::kTokens, slots, most);
  config->splits = ceil_div(segments, forward_split_segments(segments, splits, kUnit));
  return cudaSuccess;
}

template <auto kKernel, class Tile, int kUnit>
class SplitForward {
 public:
  using T = typename Tile::T;

  const LinearProblem& p;
  const int64_t token_tiles = ceil_div(p.m, Tile::kTokens), tiles = token_tiles * ceil_div(p.w.n, Tile::kRows);
  const int64_t segments_per_split;

  SplitForward(const LinearProblem& problem, const Config& config, const Context& context)
      : p(problem),
        segments_per_split(forward_split_segments(p.w.k / kSegment, config.splits, kUnit)),
        context_(context),
        splits_(config.splits) {}

  // Allocates the workspace, and does the work before the kernel: it computes h if h has its own launch, and clears the
  // tickets, which h's launch can do.
  cudaError_t prepare(bool makes_h) {
    int cluster_ctas = 1;
    cudaError_t error = ctas_per_cluster<kKernel>(context_.device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
    if (error != cudaSuccess) return error;
    cluster_ = splits_ > 1 && cluster_ctas > 1;
    Workspace workspace;
    const int64_t h = workspace.add(p.h ? 0 : p.m * p.lora.rank * dtype_bytes(p.dtype));
    const SplitSums sums(&workspace, tiles, cluster_ ? 1 : splits_, Tile::kTokens * Tile::kRows);
    uint8_t* const memory = context_.allocate(workspace.bytes());
    h_ = static_cast<T*>(p.h ? p.h : memory + h);
    tickets_ = sums.tickets(memory);
    partials_ = sums.partials(memory);
    LowRankProblem low_rank = h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h_);
    if (!makes_h) low_rank.rank = 0;
    low_rank.clear = tickets_;
    error = launch_low_rank(low_rank, context_.stream);
    if (error == cudaSuccess && low_rank.rank > 0) error = earliest_start<kKernel>(context_.device, &start_);
    return error;
  }

  const T* h() const { return h_; }

  tile::LinearOutput<T> output() const {
    return {static_cast<T*>(p.y), static_cast<const T*>(p.bias), partials_, cluster_ ? nullptr : tickets_.words};
  }

  template <class Args>
  cudaError_t launch(const Args& args) const {
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits_));
    return launch_cluster(kKernel, grid, dim3(1, cluster_ ? grid.y : 1), Tile::kThreads, Tile::kSharedBytes,
                          context_.stream, start_, args);
  }

 private:
  const Context& context_;
  const int64_t splits_;
  bool cluster_ = false;
  Start start_ = Start::kInOrder;
  T* h_ = nullptr;
  Tickets tickets_;
  float* partials_ = nullptr;
};

}  // namespace qlora::cuda::sm80

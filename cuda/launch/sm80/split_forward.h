// What the forward's kernels for regular shapes share: k is split over CTAs, in multiples of kUnit segments, or CTAs
// take equal runs of the stream of all tiles' segments (cuda/tile/sm80/k_slices.cuh). kStreamKernel is null for tiles
// that have no kernel for streams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpp/format/problem.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/workspace.h"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tuning/stream.h"

namespace qlora::cuda::sm80 {

// Divides the sums over as many CTAs as fill the device, or as the environment forces. CTAs that split k form a cluster
// if the device has clusters. `makes_h` says whether h has a launch of its own, which clears the tickets.
template <auto kKernel, auto kStreamKernel, class Tile, int kUnit>
cudaError_t plan_splits(const LinearProblem& p, bool makes_h, const Device& device, Config* config) {
  static_assert(Tile::kRows == kForwardRows && tile::kSegment == kSegment);
  int ctas = 0, cluster_ctas = 1;
  cudaError_t error = ctas_per_sm<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);
  if (error == cudaSuccess)
    error = ctas_per_cluster<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
  if (error != cudaSuccess) return error;
  const int64_t segments = p.w.k / kSegment, tiles = ceil_div(p.m, Tile::kTokens) * ceil_div(p.w.n, Tile::kRows);
  const int64_t slots = int64_t{device.sm_count} * ctas, most = cluster_ctas > 1 ? cluster_ctas : slots;
  const int64_t wished_ctas = std::exchange(config->ctas, 0), wished = config->splits;
  const int64_t splits =
      wished > 0 ? std::min(wished, most) : forward_splits(tiles, segments, kUnit, Tile::kTokens, slots, most);
  if constexpr (kStreamKernel != nullptr) {
    const int64_t all = tiles * segments;
    const bool clears = splits == 1 && !makes_h;
    if (wished == 0 && all <= tile::kMostStreamSegments &&
        (wished_ctas > 0 || forward_streams(tiles, segments, kUnit, Tile::kTokens, slots, splits, clears, device))) {
      config->ctas = ceil_div(all, stream_cta_segments(all, wished_ctas > 0 ? wished_ctas : slots));
      return ctas_per_sm<kStreamKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);  // admits its shared memory
    }
  }
  config->splits = ceil_div(segments, forward_split_segments(segments, splits, kUnit));
  return cudaSuccess;
}

template <auto kKernel, auto kStreamKernel, class Tile, int kUnit>
class SplitForward {
 public:
  using T = typename Tile::T;

  const LinearProblem& p;
  const int64_t token_tiles = ceil_div(p.m, Tile::kTokens), tiles = token_tiles * ceil_div(p.w.n, Tile::kRows);
  const int64_t segments_per_split;  // 0 for a stream

  SplitForward(const LinearProblem& problem, const Config& config, const Context& context)
      : p(problem),
        segments_per_split(config.ctas > 0 ? 0 : forward_split_segments(p.w.k / kSegment, config.splits, kUnit)),
        context_(context),
        splits_(config.splits),
        ctas_(config.ctas) {
    if (ctas_ == 0) return;
    const int64_t segments = p.w.k / kSegment, all = tiles * segments, each = stream_cta_segments(all, ctas_);
    stream_ = {static_cast<int>(segments), static_cast<int>(each), static_cast<int>(all),
               static_cast<int>(stream_parts(segments, each))};
  }

  // Allocates the workspace, and does the work before the kernel: it computes h if h has its own launch, and clears the
  // tickets, which h's launch can do.
  cudaError_t prepare(bool makes_h) {
    int cluster_ctas = 1;
    cudaError_t error = ctas_per_cluster<kKernel>(context_.device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
    if (error != cudaSuccess) return error;
    cluster_ = splits_ > 1 && cluster_ctas > 1;
    Workspace workspace;
    const int64_t h = workspace.add(p.h ? 0 : p.m * p.lora.rank * dtype_bytes(p.dtype));
    const int64_t parts = ctas_ > 0 ? stream_.most_parts : cluster_ ? 1 : splits_;
    const SplitSums sums(&workspace, tiles, parts, Tile::kTokens * Tile::kRows);
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
    if constexpr (kStreamKernel != nullptr) {
      if (ctas_ > 0)
        return launch_kernel(kStreamKernel, dim3(static_cast<unsigned>(ctas_)), Tile::kThreads, Tile::kSharedBytes,
                             context_.stream, args, stream_);
    }
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits_));
    return launch_cluster(kKernel, grid, dim3(1, cluster_ ? grid.y : 1), Tile::kThreads, Tile::kSharedBytes,
                          context_.stream, start_, args);
  }

 private:
  const Context& context_;
  const int64_t splits_, ctas_;  // one of them is 0
  tile::KStream stream_;
  bool cluster_ = false;
  Start start_ = Start::kInOrder;
  T* h_ = nullptr;
  Tickets tickets_;
  float* partials_ = nullptr;
};

}  // namespace qlora::cuda::sm80

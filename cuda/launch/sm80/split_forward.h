// What the forward's kernels for regular shapes share: k is split over CTAs, in multiples of kUnit segments, or CTAs
// divide the segments of all tiles evenly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpp/format/problem.h"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/workspace.h"
#include "cuda/tile/sm80/linear_sum.cuh"
#include "cuda/tuning/stream.h"

namespace qlora::cuda::sm80 {

// Divides the sums over as many CTAs as fill the device, or as the environment forces. CTAs that split k form a cluster
// if the device has clusters.
// `makes_h` says whether h has a launch of its own.
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
  const int64_t wished = config->splits, wished_ctas = std::exchange(config->ctas, 0);
  const int64_t splits =
      wished > 0 ? std::min(wished, most) : forward_splits(tiles, segments, kUnit, Tile::kTokens, slots, most);
  const bool clears = !makes_h && (splits == 1 || cluster_ctas > 1);
  const int64_t all = tiles * segments;
  if (wished == 0 && tile::kCanStream<Tile> && all <= tile::kMostStream &&
      (wished_ctas > 0 || forward_streams(tiles, segments, kUnit, Tile::kTokens, slots, splits, clears, device))) {
    config->ctas = ceil_div(all, stream_cta_segments(all, wished_ctas > 0 ? wished_ctas : slots));
    return ctas_per_sm<kStreamKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);  // admits its shared memory
  }
  config->splits = ceil_div(segments, forward_split_segments(segments, splits, kUnit));
  return cudaSuccess;
}

template <auto kKernel, class Tile, int kUnit>
class SplitForward {
 public:
  using T = typename Tile::T;

  const LinearProblem& p;
  const int64_t token_tiles = ceil_div(p.m, Tile::kTokens), tiles = token_tiles * ceil_div(p.w.n, Tile::kRows);
  const tile::KDivision division;

  SplitForward(const LinearProblem& problem, const Config& config, const Context& context)
      : p(problem), division(divide(config)), context_(context), grid_(grid(config)) {}

  // Allocates the workspace, and does the work before the kernel: it computes h if h has its own launch, and clears the
  // tickets, which h's launch can do.
  cudaError_t prepare(bool makes_h) {
    int cluster_ctas = 1;
    cudaError_t error = ctas_per_cluster<kKernel>(context_.device, Tile::kThreads, Tile::kSharedBytes, &cluster_ctas);
    if (error != cudaSuccess) return error;
    cluster_ = grid_.y > 1 && cluster_ctas > 1;
    Workspace workspace;
    const int64_t h = workspace.add(p.h ? 0 : p.m * p.lora.rank * dtype_bytes(p.dtype));
    const SplitSums sums(&workspace, tiles, cluster_ ? 1 : division.most_parts, Tile::kTokens * Tile::kRows);
    uint8_t* const memory = context_.allocate(workspace.bytes());
    h_ = static_cast<T*>(p.h ? p.h : memory + h);
    tickets_ = sums.tickets(memory);
    partials_ = sums.partials(memory);
    LowRankProblem low_rank = h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h_);
    if (!makes_h) low_rank.rank = 0;
    low_rank.clear = tickets_;
    return launch_low_rank(low_rank, context_.stream);
  }

  const T* h() const { return h_; }

  tile::LinearOutput<T> output() const {
    return {static_cast<T*>(p.y), static_cast<const T*>(p.bias), partials_, cluster_ ? nullptr : tickets_.words};
  }

  template <class Args>
  cudaError_t launch(const Args& args) const {
    return launch_cluster(kKernel, grid_, dim3(1, cluster_ ? grid_.y : 1), Tile::kThreads, Tile::kSharedBytes,
                          context_.stream, args);
  }

 private:
  tile::KDivision divide(const Config& config) const {
    const int64_t segments = p.w.k / kSegment;
    if (config.ctas == 0) return {segments, forward_split_segments(segments, config.splits, kUnit), 0, config.splits};
    const int64_t all = tiles * segments, each = stream_cta_segments(all, config.ctas);
    return {segments, each, all, stream_parts(segments, each)};
  }
  dim3 grid(const Config& config) const {
    if (config.ctas > 0) return dim3(static_cast<unsigned>(config.ctas));
    return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(config.splits));
  }

  const Context& context_;
  const dim3 grid_;
  bool cluster_ = false;
  T* h_ = nullptr;
  Tickets tickets_;
  float* partials_ = nullptr;
};

// Calls use(streams) with a constant that says whether the configuration needs the kernel that streams.
template <class Tile, class Use>
cudaError_t with_streaming(const Config& config, const Use& use) {
  if (config.ctas > 0) return use(std::bool_constant<tile::kCanStream<Tile>>());
  return use(std::false_type());
}

}  // namespace qlora::cuda::sm80

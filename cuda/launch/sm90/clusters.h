// Helpers that the launchers of Hopper's kernels share.
#pragma once

#include <cuda_runtime.h>

#include "cpp/format/problem.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm90/tensor_map.h"
#include "cuda/tile/sm90/work.cuh"
#include "cuda/tuning/choice.h"
#include "cuda/tuning/sm90.h"

namespace qlora::cuda::sm90 {

inline constexpr int kSharedPerSm = 228 * 1024;

// The TMA map of x or dy [rows, columns], with boxes of a line of 64 values for the tokens that a CTA copies.
template <class Tile>
cudaError_t make_token_map(const Config& c, const void* data, int64_t rows, int64_t columns, CUtensorMap* map) {
  constexpr bool kBf16 = std::is_same_v<typename Tile::T, bfloat16>;
  return make_tensor_map({.type = kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                          .data = data,
                          .rows = rows,
                          .columns = columns,
                          .row_bytes = columns * 2,
                          .box_rows = Tile::kTokens / static_cast<int>(c.multicast),
                          .box_columns = 64,
                          .swizzle = CU_TENSOR_MAP_SWIZZLE_128B},
                         map);
}

// The TMA map of w, with boxes of kBytes (32 or 64) packed bytes for `box_rows` rows.
template <int kBytes = 64>
cudaError_t make_packed_map(const Weight& w, int box_rows, CUtensorMap* map) {
  static_assert(kBytes == 32 || kBytes == 64);
  return make_tensor_map({.type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                          .data = w.packed,
                          .rows = w.n,
                          .columns = w.k / 2,
                          .row_bytes = w.k / 2,
                          .box_rows = box_rows,
                          .box_columns = kBytes,
                          .swizzle = kBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B},
                         map);
}

// Splits the sum in whole stages.
inline tile::Sm90Plan make_plan(const Config& c, int64_t m, int64_t outputs, int64_t stages, const Lora& lora,
                                const Device& device) {
  return {.token_tiles = static_cast<int>(ceil_div(m, c.tokens)),
          .tiles = static_cast<int>(cluster_tiles(m, outputs, c)),
          .clusters = static_cast<int>(clusters(m, outputs, c, device)),
          .splits = static_cast<int>(c.splits),
          .multicast = static_cast<int>(c.multicast),
          .stages = static_cast<int>(stages),
          .stages_per_split = static_cast<int>(ceil_div(stages, c.splits)),
          .rank = static_cast<int>(lora.rank),
          .adapter_ranks = static_cast<int>(adapter_ranks(lora))};
}

// Asks the driver about clusters of a kernel that needs an SM per CTA. If it cannot tell, the answer has no clusters of
// several CTAs.
template <auto kKernel, class Tile>
ResidentClusters query_resident_clusters(const Device& device) {
  ResidentClusters found{device.sm_count};
  int ctas = 0;
  bool answers = ctas_per_sm<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas) == cudaSuccess;
  for (int size = 2; size <= kMostClusterCtas && answers; ++size) {
    int& clusters = found[static_cast<size_t>(size - 1)];
    answers = count_clusters(kKernel, size, Tile::kThreads, Tile::kSharedBytes, &clusters) == cudaSuccess;
  }
  if (!answers) {
    cudaGetLastError();
    found = {device.sm_count};
  }
  return found;
}

// With LoRA, the previous launch computes its low-rank product, which is all that the kernel waits for.
inline Start start_of(const tile::Sm90Plan& plan) { return plan.rank > 0 ? Start::kEarly : Start::kInOrder; }

// Launches a kernel in the clusters of `plan`.
template <auto kKernel, class Tile, class Args>
cudaError_t launch_clusters(const tile::Sm90Plan& plan, const Config& c, const CUtensorMap& tokens,
                            const CUtensorMap& packed, const Args& args, Start start, const Context& context) {
  static_assert(Tile::kOutputs == kOutputs);
  static_assert(2 * Tile::kSharedBytes > kSharedPerSm);  // ResidentClusters counts one CTA per SM
  int ctas = 0;                                          // the query also allows the kernel its shared memory
  const cudaError_t error = ctas_per_sm<kKernel>(context.device, Tile::kThreads, Tile::kSharedBytes, &ctas);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.clusters * cluster_ctas(c))),
      cluster(static_cast<unsigned>(cluster_ctas(c)));
  return launch_cluster(kKernel, grid, cluster, Tile::kThreads, Tile::kSharedBytes, context.stream, start, tokens,
                        packed, args);
}

}  // namespace qlora::cuda::sm90

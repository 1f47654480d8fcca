// What the launchers of Hopper's kernels share.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "cpp/format/problem.h"
#include "cuda/launch/cluster.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm90/tensor_map.h"
#include "cuda/tile/sm90/work.cuh"
#include "cuda/tuning_sm90.h"

namespace qlora::cuda {

// What both operators require of a problem with m tokens: k in groups of 64 with one scale each, and sizes within TMA's
// coordinates.
inline bool sm90_takes(DType dtype, int64_t m, const Weight& w, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return device.arch == 90 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16) && m >= Sm90Config::kMinTokens &&
         w.n > 0 && w.k > 0 && has_one_scale_per(64, w) && m <= kMost && w.n <= kMost && w.k <= kMost;
}

// Lines of 64 values of x or dy [rows, columns], of kTokens tokens at a time.
template <class Tile>
cudaError_t make_token_map(const void* data, int64_t rows, int64_t columns, CUtensorMap* map) {
  constexpr bool kBf16 = std::is_same_v<typename Tile::T, bfloat16>;
  return make_tensor_map({.type = kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                          .data = data,
                          .rows = rows,
                          .columns = columns,
                          .row_bytes = columns * 2,
                          .box_rows = Tile::kTokens,
                          .box_columns = 64,
                          .swizzle = CU_TENSOR_MAP_SWIZZLE_128B},
                         map);
}

// 64 packed bytes of `box_rows` rows of w at a time.
inline cudaError_t make_packed_map(const Weight& w, int box_rows, CUtensorMap* map) {
  return make_tensor_map({.type = CU_TENSOR_MAP_DATA_TYPE_UINT8,
                          .data = w.packed,
                          .rows = w.n,
                          .columns = w.k / 2,
                          .row_bytes = w.k / 2,
                          .box_rows = box_rows,
                          .box_columns = 64,
                          .swizzle = CU_TENSOR_MAP_SWIZZLE_64B},
                         map);
}

inline tile::Sm90Plan make_sm90_plan(const Sm90Config& c, int64_t m, int64_t outputs, int64_t stages, int64_t rank) {
  const int64_t token_tiles = ceil_div(m, c.tokens);
  return {.token_tiles = token_tiles,
          .tiles = token_tiles * ceil_div(outputs, Sm90Config::kOutputs),
          .splits = c.splits,
          .stages = static_cast<int>(stages),
          .stages_per_split = static_cast<int>(c.stages_per_split),
          .rank = rank};
}

// One of Hopper's kernels, in clusters with one CTA per split.
template <auto kKernel, class Tile, class Args>
cudaError_t launch_sm90(const Device& device, const Sm90Config& c, const CUtensorMap& tokens, const CUtensorMap& packed,
                        const Args& args, cudaStream_t stream) {
  int ctas = 0;  // one per SM, by design; the query also allows the kernel its shared memory
  const cudaError_t error = ctas_per_sm<kKernel>(device, Tile::kThreads, Tile::kSharedBytes, &ctas);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(c.clusters * c.splits)), cluster(static_cast<unsigned>(c.splits));
  return launch_cluster(kKernel, grid, cluster, Tile::kThreads, Tile::kSharedBytes, stream, tokens, packed, args);
}

}  // namespace qlora::cuda

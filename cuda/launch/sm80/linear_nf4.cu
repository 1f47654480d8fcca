// Launches the forward on mma.sync.
#include "cuda/kernels/sm80/linear_nf4.cuh"

#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/sm80/linear_tiles.h"
#include "cuda/launch/sm80/split_forward.h"
#include "cuda/launch/types.h"

namespace qlora::cuda::sm80 {
namespace {

template <class Use>
cudaError_t with_tile(const LinearProblem& p, int64_t tokens, const Use& use) {
  return with_16_bit_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (scales_weights(p)) return with_scaled_tile<T>(p.w, tokens, use);
    return with_zero_points(p.w, [&](auto zero_points) {
      switch (tokens) {
        case 16:
          return use(Tile16<T, kSegment, zero_points>());
        case 32:
          return use(Tile32<T, kSegment, zero_points>());
        default:
          return use(Tile64<T, kSegment, zero_points>());
      }
    });
  });
}

template <class Tile>
constexpr auto stream_kernel() {
  if constexpr (Tile::kTokens == 32 && !Tile::kZeroPoints && !Tile::kScalesWeights)
    return kernels::linear_nf4_stream_kernel<Tile>;
  else
    return nullptr;
}

}  // namespace

cudaError_t plan(const LinearProblem& p, const Device& device, Config* config) {
  return with_tile(p, config->tokens, [&](auto tile) {
    using Tile = decltype(tile);
    return plan_splits<kernels::linear_nf4_kernel<Tile>, stream_kernel<Tile>(), Tile, Tile::kStageSegments>(
        p, p.lora.rank > 0, device, config);
  });
}

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  return with_tile(p, config.tokens, [&](auto tile) {
    using Tile = decltype(tile);
    SplitForward<kernels::linear_nf4_kernel<Tile>, stream_kernel<Tile>(), Tile, Tile::kStageSegments> split(p, config,
                                                                                                            context);
    const cudaError_t error = split.prepare(true);
    if (error != cudaSuccess) return error;
    return split.launch(
        make_linear_args<Tile>(p, split.h(), split.output(), split.token_tiles, split.segments_per_split));
  });
}

}  // namespace qlora::cuda::sm80

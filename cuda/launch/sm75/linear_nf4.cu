// Launches the forward on a T4's tensor cores: the kernel of 8.0, whose copies and products cuda/ptx replaces here.
#include "cuda/kernels/sm80/linear_nf4.cuh"

#include "cuda/launch/sm75/launchers.h"
#include "cuda/launch/sm80/linear_tiles.h"
#include "cuda/launch/sm80/split_forward.h"
#include "cuda/tuning/sm75.h"

namespace qlora::cuda::sm75 {
namespace {

template <bool kZeroPoints>
using Tile = tile::LinearTile<float16, 2, kTokens / 8, 4, 2, 2, 2, tile::kSegment, kZeroPoints, 16>;
static_assert(Tile<false>::kSharedBytes <= 64 << 10);

}  // namespace

cudaError_t plan(const LinearProblem& p, const Device& device, Config* config) {
  return sm80::with_zero_points(p.w, [&](auto zero_points) {
    using T = Tile<zero_points>;
    return sm80::plan_splits<kernels::linear_nf4_kernel<T>, nullptr, T, T::kStageSegments>(p, p.lora.rank > 0, device,
                                                                                           config);
  });
}

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  return sm80::with_zero_points(p.w, [&](auto zero_points) {
    using T = Tile<zero_points>;
    sm80::SplitForward<kernels::linear_nf4_kernel<T>, nullptr, T, T::kStageSegments> split(p, config, context);
    const cudaError_t error = split.prepare(true);
    if (error != cudaSuccess) return error;
    return split.launch(
        sm80::make_linear_args<T>(p, split.h(), split.output(), split.token_tiles, split.segments_per_split));
  });
}

}  // namespace qlora::cuda::sm75

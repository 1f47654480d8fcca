// Launches the forward of experts on mma.sync.
#include "cuda/kernels/sm80/grouped_linear_nf4.cuh"

#include "cuda/launch/generic/grouped_linear.h"
#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/sm80/linear_tiles.h"
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
        case 8:
          return use(Tile8<T, zero_points>());
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

}  // namespace

cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context) {
  const LinearProblem& p = problem.stack;
  return with_tile(p, config.tokens, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::T;
    return launch_experts<kernels::grouped_linear_nf4_kernel<Tile>>(
        problem, config, Tile::kThreads, Tile::kSharedBytes, context, [&](void* h, int64_t token_tiles) {
          const tile::LinearOutput<T> out{static_cast<T*>(p.y), static_cast<const T*>(p.bias), nullptr, nullptr};
          return make_linear_args<Tile>(p, static_cast<const T*>(h), out, token_tiles, p.w.k / kSegment);
        });
  });
}

}  // namespace qlora::cuda::sm80

// Launches the forward for few tokens on mma.sync.
#include "cuda/kernels/sm80/linear_nf4_few_tokens.cuh"

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
    return with_zero_points(p.w, [&](auto zero_points) {
      switch (tokens) {
        case 4:
          return use(tile::FewTokensTile<T, 1, zero_points>());
        case 8:
          return use(tile::FewTokensTile<T, 2, zero_points>());
        default:
          return use(tile::FewTokensTile<T, 4, zero_points>());
      }
    });
  });
}

template <class Tile>
constexpr auto stream_kernel() {
  if constexpr (Tile::kZeroPoints)
    return nullptr;
  else
    return kernels::linear_nf4_few_tokens_stream_kernel<Tile>;
}

// Whether the kernel computes h. If h is retained, it needs its own launch: the parts of all CTAs would have to be
// summed first.
template <class Tile>
bool folds_h(const LinearProblem& p) {
  return !p.h && p.lora.rank > 0 && p.lora.rank <= Tile::kFoldedRanks && p.w.k < tile::kMostFoldedK;
}

}  // namespace

cudaError_t plan_few_tokens(const LinearProblem& p, const Device& device, Config* config) {
  return with_tile(p, config->tokens, [&](auto tile) {
    using Tile = decltype(tile);
    return plan_splits<kernels::linear_nf4_few_tokens_kernel<Tile>, stream_kernel<Tile>(), Tile, Tile::kRoundSegments>(
        p, p.lora.rank > 0 && !folds_h<Tile>(p), device, config);
  });
}

// One launch, unless h needs its own launch, or CTAs share sums and the device has no clusters for them.
cudaError_t launch_few_tokens(const LinearProblem& p, const Config& config, const Context& context) {
  return with_tile(p, config.tokens, [&](auto tile) {
    using Tile = decltype(tile);
    using T = typename Tile::T;
    const Lora& lora = p.lora;
    const bool folds = folds_h<Tile>(p);
    SplitForward<kernels::linear_nf4_few_tokens_kernel<Tile>, stream_kernel<Tile>(), Tile, Tile::kRoundSegments> split(
        p, config, context);
    const cudaError_t error = split.prepare(!folds);
    if (error != cudaSuccess) return error;
    const kernels::FewTokensLinearArgs<T> args{
        .x = static_cast<const T*>(p.x),
        .packed = p.w.packed,
        .scales = tile::make_scale_view(p.w),
        .code = Tile::kZeroPoints ? tile::make_code_view(p.w.code) : tile::make_pair_view<T>(p.w.code),
        .m = p.m,
        .n = p.w.n,
        .k = p.w.k,
        .lora = {folds ? static_cast<const T*>(lora.a) : nullptr, split.h(), static_cast<const T*>(lora.b), lora.rank,
                 adapter_ranks(lora), static_cast<float>(lora.scaling * lora.dropout.keep_scale), lora.dropout},
        .out = split.output(),
        .segments_per_split = split.segments_per_split};
    return split.launch(args);
  });
}

}  // namespace qlora::cuda::sm80

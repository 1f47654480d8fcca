// Launches the forward of ragged shapes and of float32.
#include "cuda/kernels/generic/linear_nf4_ragged.cuh"

#include <type_traits>

#include "cuda/launch/cluster.h"
#include "cuda/launch/generic/grouped_linear.h"
#include "cuda/launch/generic/launchers.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/types.h"
#include "cuda/tuning/generic.h"

namespace qlora::cuda::generic {
namespace {

static_assert(kernels::kRaggedRows == kForwardRows);

// Calls use(T{}, is_wide) with both as constants.
template <class Use>
cudaError_t with_kernel_of(const LinearProblem& p, const Use& use) {
  return with_type(p.dtype, [&](auto element) {
    return is_wide(p.w.code) ? use(element, std::true_type{}) : use(element, std::false_type{});
  });
}

template <class T>
kernels::RaggedLinearArgs<T> make_args(const LinearProblem& p, const void* h, int64_t token_tiles) {
  return {.x = static_cast<const T*>(p.x),
          .packed = p.w.packed,
          .scales = tile::make_scale_view(p.w),
          .code = tile::make_code_view(p.w.code),
          .m = p.m,
          .n = p.w.n,
          .k = p.w.k,
          .h = static_cast<const T*>(h),
          .lora_b = static_cast<const T*>(p.lora.b),
          .rank = p.lora.rank,
          .bias = static_cast<const T*>(p.bias),
          .y = static_cast<T*>(p.y),
          .token_tiles = token_tiles};
}

template <class T, int kTokens, bool kWide>
cudaError_t launch_tokens(const LinearProblem& p, const Context& context) {
  constexpr auto kKernel = kernels::linear_nf4_ragged_kernel<T, kTokens, kWide>;
  void* const h = p.h ? p.h : context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), context.stream);
  Start start = Start::kInOrder;
  if (error == cudaSuccess && p.lora.rank > 0) error = earliest_start<kKernel>(context.device, &start);
  if (error != cudaSuccess) return error;
  const int64_t token_tiles = ceil_div(p.m, kTokens);
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.n, kForwardRows));
  return launch_cluster(kKernel, grid, dim3(1), kernels::kRaggedThreads, 0, context.stream, start,
                        make_args<T>(p, h, token_tiles));
}

template <class T, int kTokens, bool kWide>
cudaError_t launch_experts_tokens(const Grouped<LinearProblem>& problem, const Config& config, const Context& context) {
  return launch_experts<kernels::grouped_linear_nf4_ragged_kernel<T, kTokens, kWide>>(
      problem, config, kernels::kRaggedThreads, 0, context,
      [&](void* h, int64_t token_tiles) { return make_args<T>(problem.stack, h, token_tiles); });
}

}  // namespace

cudaError_t launch(const LinearProblem& p, const Config& config, const Context& context) {
  return with_kernel_of(p, [&](auto element, auto wide) {
    using T = decltype(element);
    return config.tokens == 4    ? launch_tokens<T, 4, wide>(p, context)
           : config.tokens == 16 ? launch_tokens<T, 16, wide>(p, context)
                                 : launch_tokens<T, 64, wide>(p, context);
  });
}

cudaError_t launch(const Grouped<LinearProblem>& problem, const Config& config, const Context& context) {
  return with_kernel_of(problem.stack, [&](auto element, auto wide) {
    using T = decltype(element);
    return config.tokens == 16 ? launch_experts_tokens<T, 16, wide>(problem, config, context)
                               : launch_experts_tokens<T, 64, wide>(problem, config, context);
  });
}

}  // namespace qlora::cuda::generic

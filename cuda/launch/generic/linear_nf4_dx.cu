// Launches dX: what the kernels of all architectures share, and the kernels of exact products.
#include "cuda/kernels/generic/linear_nf4_dx_exact.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/launch/generic/dx.h"
#include "cuda/launch/generic/grouped_low_rank.h"
#include "cuda/launch/generic/launchers.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/generic.h"

namespace qlora::cuda {
namespace {

// The arguments that follow from the problem alone.
kernels::DxArgs make_args(const LinearDxProblem& p, const void* g, int64_t token_tiles) {
  kernels::DxArgs args{};
  args.dy = p.dy;
  args.packed = p.w.packed;
  args.scales = tile::make_scale_view(p.w);
  args.code = tile::make_code_view(p.w.code);
  args.lora_a = p.lora.a;
  args.g = g;
  args.dx = p.dx;
  args.m = p.m;
  args.n = p.w.n;
  args.k = p.w.k;
  args.rank = p.lora.rank;
  args.rows_per_split = p.w.n;
  args.splits = 1;
  args.token_tiles = static_cast<int32_t>(token_tiles);
  args.dropout = p.lora.dropout;
  return args;
}

int64_t tiles_of(const LinearDxProblem& p, const Config& config) {
  return ceil_div(p.m, config.tokens) * ceil_div(p.w.k, config.columns);
}

}  // namespace

cudaError_t plan_dx(const DxKernel<kernels::DxArgs>& kernel, const LinearDxProblem& p, const Device& device,
                    Config* config) {
  int ctas = 0;
  const cudaError_t error = kernel.ctas_per_sm(device, kernel.threads, kernel.shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t n = std::max<int64_t>(p.w.n, 1);
  const int64_t splits =
      config->splits > 0 ? config->splits : dx_splits(tiles_of(p, *config), n, config->tokens, ctas, device);
  config->splits = ceil_div(n, dx_split_rows(n, splits));
  return cudaSuccess;
}

cudaError_t launch_dx(const DxKernel<kernels::DxArgs>& kernel, const LinearDxProblem& p, const Config& config,
                      const Context& context) {
  const int64_t tiles = tiles_of(p, config);
  Workspace workspace;
  const int64_t own_g = workspace.add(p.g ? 0 : p.m * p.lora.rank * dtype_bytes(p.dtype));
  const SplitSums sums(&workspace, tiles, config.splits, config.tokens * config.columns);
  uint8_t* const memory = context.allocate(workspace.bytes());
  void* const g = p.g ? p.g : memory + own_g;
  LowRankProblem low_rank = g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g);
  low_rank.clear = sums.tickets(memory);
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  Start start = Start::kInOrder;
  if (error == cudaSuccess && p.lora.rank > 0) error = kernel.earliest_start(context.device, &start);
  if (error != cudaSuccess) return error;
  kernels::DxArgs args = make_args(p, g, ceil_div(p.m, config.tokens));
  args.partials = sums.partials(memory);
  args.tickets = low_rank.clear.words;
  args.rows_per_split = dx_split_rows(p.w.n, config.splits);
  args.splits = static_cast<int32_t>(config.splits);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(config.splits));
  return launch_cluster(kernel.kernel, grid, dim3(1), kernel.threads, kernel.shared_bytes, context.stream, start, args);
}

cudaError_t launch_dx(const DxKernel<kernels::GroupedDxArgs>& kernel, const Grouped<LinearDxProblem>& problem,
                      const Config& config, const Context& context) {
  const LinearDxProblem& p = problem.stack;
  int ctas = 0;  // unused, since the grid covers all rows; the query allows the kernel its shared memory
  cudaError_t error = kernel.ctas_per_sm(context.device, kernel.threads, kernel.shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  void* const g = p.g ? p.g : context.allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  error = launch_grouped_low_rank({g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g), problem.offsets, problem.experts},
                                  context.device, context.stream);
  Start start = Start::kInOrder;
  if (error == cudaSuccess && p.lora.rank > 0) error = kernel.earliest_start(context.device, &start);
  if (error != cudaSuccess) return error;
  const int64_t token_tiles = tile::most_group_tiles(p.m, problem.experts, config.tokens);
  const kernels::GroupedDxArgs args{
      make_args(p, g, token_tiles), {problem.offsets, problem.experts, p.m}, weight_stride(p.w)};
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.k, config.columns));
  return launch_cluster(kernel.kernel, grid, dim3(1), kernel.threads, kernel.shared_bytes, context.stream, start, args);
}

namespace generic {
namespace {

static_assert(kernels::kDxExactTokens == kExactDx.tokens && kernels::kDxExactColumns == kExactDx.columns);

template <class Args, auto kKernel>
constexpr DxKernel<Args> kExactKernel = {kKernel, ctas_per_sm<kKernel>, earliest_start<kKernel>,
                                         kernels::kDxExactThreads, 0};
template <class T, bool kWide>
constexpr auto kSingle = kExactKernel<kernels::DxArgs, kernels::linear_nf4_dx_exact_kernel<T, kWide>>;
template <class T, bool kWide>
constexpr auto kOfExperts = kExactKernel<kernels::GroupedDxArgs, kernels::grouped_linear_nf4_dx_exact_kernel<T, kWide>>;

// Calls use(T{}, is_wide) with both as constants.
template <class Use>
cudaError_t with_kernel_of(const LinearDxProblem& p, const Use& use) {
  if (is_wide(p.w.code)) return with_type(p.dtype, [&](auto element) { return use(element, std::true_type{}); });
  return with_exact_type(p.dtype, [&](auto element) { return use(element, std::false_type{}); });
}

}  // namespace

cudaError_t plan_exact(const LinearDxProblem& p, const Device& device, Config* config) {
  return with_kernel_of(
      p, [&](auto element, auto wide) { return plan_dx(kSingle<decltype(element), wide>, p, device, config); });
}
cudaError_t launch_exact(const LinearDxProblem& p, const Config& config, const Context& context) {
  return with_kernel_of(
      p, [&](auto element, auto wide) { return launch_dx(kSingle<decltype(element), wide>, p, config, context); });
}
cudaError_t launch_exact(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context) {
  return with_kernel_of(problem.stack, [&](auto element, auto wide) {
    return launch_dx(kOfExperts<decltype(element), wide>, problem, config, context);
  });
}

}  // namespace generic
}  // namespace qlora::cuda

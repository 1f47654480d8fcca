// Launches the gradients of LoRA's weights: what the kernels of all architectures share, and the kernels of exact
// products.
#include <utility>

#include "cuda/kernels/generic/linear_nf4_dlora_exact.cuh"
#include "cuda/launch/generic/dlora.h"
#include "cuda/launch/generic/grouped_low_rank.h"
#include "cuda/launch/generic/launchers.h"
#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/generic.h"

namespace qlora::cuda {
namespace {

// The arguments that follow from the problem alone.
kernels::DLoraArgs make_args(const LoraGradProblem& p, const void* h, const void* g) {
  const Dropout& dropout = p.lora.dropout;
  kernels::DLoraArgs args{};
  args.a = {.wide = p.x,
            .low_rank = g,
            .out = p.da,
            .columns = p.k,
            .factor = static_cast<float>(dropout.keep_scale),
            .columns_first = false,
            .masked = dropout.active()};
  args.b = {
      .wide = p.dy, .low_rank = h, .out = p.db, .columns = p.n, .factor = 1.0f, .columns_first = true, .masked = false};
  args.a_tiles = ceil_div(p.k, kernels::kDLoraColumns);
  args.m = p.m;
  args.rank = p.lora.rank;
  args.splits = 1;
  args.dropout = dropout;
  return args;
}

int64_t column_tiles(const LoraGradProblem& p) {
  return ceil_div(p.k, kernels::kDLoraColumns) + ceil_div(p.n, kernels::kDLoraColumns);
}
int64_t tiles_of(const LoraGradProblem& p, const Config& config) {
  return column_tiles(p) * ceil_div(p.lora.rank, config.ranks);
}

// The size of h or g.
int64_t low_rank_bytes(const LoraGradProblem& p) { return p.m * p.lora.rank * dtype_bytes(p.dtype); }

}  // namespace

cudaError_t plan_dlora(const DLoraKernel<kernels::DLoraArgs>& kernel, const LoraGradProblem& p, const Device& device,
                       Config* config) {
  int ctas = 0;
  const cudaError_t error = kernel.ctas_per_sm(device, kernels::kDLoraThreads, 0, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t splits = config->splits > 0 ? config->splits : dlora_splits(tiles_of(p, *config), p.m, ctas, device);
  config->splits = ceil_div(p.m, dlora_split_tokens(p.m, splits));
  return cudaSuccess;
}

cudaError_t launch_dlora(const DLoraKernel<kernels::DLoraArgs>& kernel, const LoraGradProblem& p, const Config& config,
                         const Context& context) {
  Workspace workspace;
  const int64_t own_h = workspace.add(p.h ? 0 : low_rank_bytes(p)), own_g = workspace.add(p.g ? 0 : low_rank_bytes(p));
  const SplitSums sums(&workspace, tiles_of(p, config), config.splits, config.ranks * config.columns);
  uint8_t* const memory = context.allocate(workspace.bytes());
  const void* const h = p.h ? p.h : memory + own_h;
  const void* const g = p.g ? p.g : memory + own_g;

  // The first launch also clears the tickets.
  const Tickets tickets = sums.tickets(memory);
  Tickets to_clear = tickets;
  const auto launch = [&](LowRankProblem low_rank) {
    low_rank.clear = std::exchange(to_clear, {});
    return launch_low_rank(low_rank, context.stream);
  };
  cudaError_t error = cudaSuccess;
  if (!p.h) error = launch(h_problem(p.dtype, p.m, p.k, p.x, p.lora, memory + own_h));
  if (!p.g && error == cudaSuccess) error = launch(g_problem(p.dtype, p.m, p.n, p.dy, p.lora, memory + own_g));
  if (error == cudaSuccess) error = to_clear.clear(context.stream);
  Start start = Start::kInOrder;
  if (error == cudaSuccess) error = kernel.earliest_start(context.device, &start);
  if (error != cudaSuccess) return error;

  kernels::DLoraArgs args = make_args(p, h, g);
  args.tokens_per_split = dlora_split_tokens(p.m, config.splits);
  args.splits = static_cast<int32_t>(config.splits);
  args.tickets = tickets.words;
  args.partials = sums.partials(memory);
  const dim3 grid(static_cast<unsigned>(column_tiles(p)), static_cast<unsigned>(ceil_div(p.lora.rank, config.ranks)),
                  static_cast<unsigned>(config.splits));
  return launch_cluster(kernel.kernel, grid, dim3(1), kernels::kDLoraThreads, 0, context.stream, start, args);
}

cudaError_t launch_dlora(const DLoraKernel<kernels::GroupedDLoraArgs>& kernel, const Grouped<LoraGradProblem>& problem,
                         const Config& config, const Context& context) {
  const LoraGradProblem& p = problem.stack;
  Workspace workspace;
  const int64_t own_h = workspace.add(p.h ? 0 : low_rank_bytes(p)), own_g = workspace.add(p.g ? 0 : low_rank_bytes(p));
  uint8_t* const memory = context.allocate(workspace.bytes());
  const auto launch = [&](const LowRankProblem& low_rank) {
    return launch_grouped_low_rank({low_rank, problem.offsets, problem.experts}, context.device, context.stream);
  };
  cudaError_t error = cudaSuccess;
  if (!p.h) error = launch(h_problem(p.dtype, p.m, p.k, p.x, p.lora, memory + own_h));
  if (!p.g && error == cudaSuccess) error = launch(g_problem(p.dtype, p.m, p.n, p.dy, p.lora, memory + own_g));
  Start start = Start::kInOrder;
  if (error == cudaSuccess) error = kernel.earliest_start(context.device, &start);
  if (error != cudaSuccess) return error;

  const int64_t tiles = column_tiles(p);
  const kernels::GroupedDLoraArgs args{make_args(p, p.h ? p.h : memory + own_h, p.g ? p.g : memory + own_g),
                                       {problem.offsets, problem.experts, p.m},
                                       static_cast<uint32_t>(tiles)};
  const dim3 grid(static_cast<unsigned>(tiles * problem.experts),
                  static_cast<unsigned>(ceil_div(p.lora.rank, config.ranks)));
  return launch_cluster(kernel.kernel, grid, dim3(1), kernels::kDLoraThreads, 0, context.stream, start, args);
}

namespace generic {
namespace {

static_assert(kernels::kDLoraColumns == kLoraColumns);

template <class Args, auto kKernel>
constexpr DLoraKernel<Args> kExactKernel = {kKernel, ctas_per_sm<kKernel>, earliest_start<kKernel>};
template <class T>
constexpr auto kSingle = kExactKernel<kernels::DLoraArgs, kernels::linear_nf4_dlora_exact_kernel<T>>;
template <class T>
constexpr auto kOfExperts = kExactKernel<kernels::GroupedDLoraArgs, kernels::grouped_linear_nf4_dlora_exact_kernel<T>>;

}  // namespace

cudaError_t plan_exact(const LoraGradProblem& p, const Device& device, Config* config) {
  return with_exact_type(p.dtype,
                         [&](auto element) { return plan_dlora(kSingle<decltype(element)>, p, device, config); });
}
cudaError_t launch_exact(const LoraGradProblem& p, const Config& config, const Context& context) {
  return with_exact_type(p.dtype,
                         [&](auto element) { return launch_dlora(kSingle<decltype(element)>, p, config, context); });
}
cudaError_t launch_exact(const Grouped<LoraGradProblem>& problem, const Config& config, const Context& context) {
  return with_exact_type(problem.stack.dtype, [&](auto element) {
    return launch_dlora(kOfExperts<decltype(element)>, problem, config, context);
  });
}

cudaError_t clear_gradients(const LoraGradProblem& p, int64_t rank, cudaStream_t stream) {
  const auto column = static_cast<size_t>(rank * dtype_bytes(p.dtype));  // bytes per column of x or dy
  const cudaError_t error = p.k > 0 ? cudaMemsetAsync(p.da, 0, column * p.k, stream) : cudaSuccess;
  return error == cudaSuccess && p.n > 0 ? cudaMemsetAsync(p.db, 0, column * p.n, stream) : error;
}

}  // namespace generic
}  // namespace qlora::cuda

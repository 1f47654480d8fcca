#include "cuda/launch/sm80/linear_nf4_dlora.h"

#include <utility>

#include "cuda/kernels/any/linear_nf4_dlora_exact.cuh"
#include "cuda/kernels/sm80/linear_nf4_dlora.cuh"
#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm80/ragged.h"

namespace qlora::cuda {
namespace {

// One of the kernels, and its occupancy on the device.
struct DLoraKernel {
  void (*kernel)(const kernels::DLoraArgs);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
};

template <auto kKernel>
constexpr DLoraKernel a_kernel() {
  return {kKernel, ctas_per_sm<kKernel>};
}

template <class T, bool kRagged>
DLoraKernel on_tensor_cores(int64_t ranks) {
  switch (ranks) {
    case 16:
      return a_kernel<kernels::linear_nf4_dlora_kernel<T, 1, kRagged>>();
    case 32:
      return a_kernel<kernels::linear_nf4_dlora_kernel<T, 2, kRagged>>();
    default:
      return a_kernel<kernels::linear_nf4_dlora_kernel<T, 4, kRagged>>();
  }
}

template <class T>
DLoraKernel on_tensor_cores(Kernel kernel, int64_t ranks) {
  return kernel == Kernel::kRagged ? on_tensor_cores<T, true>(ranks) : on_tensor_cores<T, false>(ranks);
}

DLoraKernel dlora_kernel(DType dtype, Kernel kernel, int64_t ranks) {
  if (dtype == DType::kBFloat16) return on_tensor_cores<bfloat16>(kernel, ranks);
  if (dtype == DType::kFloat16) return on_tensor_cores<float16>(kernel, ranks);
  return a_kernel<kernels::linear_nf4_dlora_exact_kernel>();
}

// The launch's shape, and the offsets of the workspace's parts in bytes.
struct Plan {
  DLoraKernel kernel;
  DLoraConfig config;
  int64_t a_tiles, column_tiles, rank_tiles;
  int64_t g, counters, partials, end;  // h is at 0; h and g need no room if they are given
  cudaError_t error;

  Plan(const LoraGradProblem& p, const Device& device) {
    const Kernel kind = fused_kernel(p.dtype, is_ragged(p));
    kernel = dlora_kernel(p.dtype, kind, dlora_ranks(p.lora.rank, kind));
    int ctas = 0;
    error = kernel.ctas_per_sm(device, kernels::kDLoraThreads, 0, &ctas);
    config = dlora_config(p.m, p.n, p.k, p.lora.rank, kind, ctas, device);
    a_tiles = ceil_div(p.k, kernels::kDLoraColumns);
    column_tiles = a_tiles + ceil_div(p.n, kernels::kDLoraColumns);
    rank_tiles = ceil_div(p.lora.rank, config.ranks);
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    const bool split = config.splits > 1;
    const int64_t low_rank = round_up(p.m * p.lora.rank * dtype_bytes(p.dtype));
    g = p.h ? 0 : low_rank;
    counters = g + (p.g ? 0 : low_rank);
    partials = counters + (split ? round_up(4 * tiles()) : 0);
    end = partials + (split ? tiles() * config.splits * config.ranks * kernels::kDLoraColumns * 4 : 0);
  }

  int64_t tiles() const { return column_tiles * rank_tiles; }
};

// Computes h and g, if they are not given, and clears the counters of the splits, which the first launch can do.
cudaError_t launch_before(const LoraGradProblem& p, const Plan& plan, char* workspace, cudaStream_t stream) {
  uint32_t* const counters = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  int64_t to_clear = plan.config.splits > 1 ? plan.tiles() : 0;
  const auto launch = [&](LowRankProblem problem) {
    problem.clear = counters;
    problem.clear_count = std::exchange(to_clear, 0);
    return launch_low_rank(problem, stream);
  };
  cudaError_t error = cudaSuccess;
  if (!p.h) error = launch(h_problem(p.dtype, p.m, p.k, p.x, p.lora, workspace));
  if (!p.g && error == cudaSuccess) error = launch(g_problem(p.dtype, p.m, p.n, p.dy, p.lora, workspace + plan.g));
  return to_clear > 0 && error == cudaSuccess ? cudaMemsetAsync(counters, 0, to_clear * sizeof(uint32_t), stream)
                                              : error;
}

kernels::DLoraArgs make_args(const LoraGradProblem& p, const Plan& plan, char* workspace) {
  kernels::DLoraArgs args;
  const bool dropout = p.lora.dropout.active();
  const void* const h = p.h ? p.h : workspace;
  const void* const g = p.g ? p.g : workspace + plan.g;
  args.a = {p.x, g, p.da, p.k, dropout ? static_cast<float>(p.lora.dropout.keep_scale) : 1.0f, false, dropout};
  args.b = {p.dy, h, p.db, p.n, 1.0f, true, false};
  args.a_tiles = plan.a_tiles;
  args.m = p.m;
  args.rank = p.lora.rank;
  args.tokens_per_split = plan.config.tokens_per_split;
  args.splits = static_cast<int32_t>(plan.config.splits);
  args.dropout = p.lora.dropout;
  args.counters = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  args.partials = reinterpret_cast<float*>(workspace + plan.partials);
  return args;
}

// The gradients without tokens: zeros.
cudaError_t clear(const LoraGradProblem& p, cudaStream_t stream) {
  const int64_t column = p.lora.rank * dtype_bytes(p.dtype);  // bytes of da per column of x, and of db per column of dy
  const cudaError_t error = p.k > 0 ? cudaMemsetAsync(p.da, 0, column * p.k, stream) : cudaSuccess;
  return error == cudaSuccess && p.n > 0 ? cudaMemsetAsync(p.db, 0, column * p.n, stream) : error;
}

}  // namespace

cudaError_t linear_nf4_dlora_choice(const LoraGradProblem& p, const Device& device, std::string* choice) {
  const Plan plan(p, device);
  const DLoraConfig& c = plan.config;
  *choice = describe(c.kernel, {{"ranks", c.ranks}, {"columns", kernels::kDLoraColumns}, {"splits", c.splits}});
  return plan.error;
}

cudaError_t launch_linear_nf4_dlora(const LoraGradProblem& p, const Device& device, const Allocator& allocate,
                                    cudaStream_t stream) {
  if (p.lora.rank == 0 || p.n + p.k == 0) return cudaSuccess;
  if (p.m == 0) return clear(p, stream);
  const Plan plan(p, device);
  if (plan.error != cudaSuccess) return plan.error;
  char* const workspace = static_cast<char*>(allocate(plan.end));
  if (const cudaError_t error = launch_before(p, plan, workspace, stream); error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.column_tiles), static_cast<unsigned>(plan.rank_tiles),
                  static_cast<unsigned>(plan.config.splits));
  return launch_kernel(plan.kernel.kernel, grid, kernels::kDLoraThreads, 0, stream, make_args(p, plan, workspace));
}

}  // namespace qlora::cuda

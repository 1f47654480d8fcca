#include "cuda/launch/sm80/linear_nf4_dx.h"

#include "cuda/launch/any/low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/sm80/dx_kernels.h"
#include "cuda/launch/sm80/ragged.h"
#include "cuda/launch/sm90/linear_nf4_dx.h"

namespace qlora::cuda {
namespace {

struct OneWeight {
  using Args = kernels::DxArgs;
  template <class T, int kTokenTiles, bool kRagged>
  static constexpr auto kKernel = kernels::linear_nf4_dx_kernel<T, kTokenTiles, kRagged>;
  static constexpr auto kExact = kernels::linear_nf4_dx_exact_kernel;
};

// The launch's shape, and the offsets of the workspace's parts in bytes. g, if it is not kept, is at 0.
struct Plan {
  DxKernel<kernels::DxArgs> kernel;
  DxConfig config;
  int64_t token_tiles, tiles;
  int64_t counters, partials, end;
  cudaError_t error;

  Plan(const LinearDxProblem& p, const Device& device) {
    config = dx_tile(p.m, fused_kernel(p.dtype, is_ragged(p)), p.w.scales.block_size);
    kernel = DxKernels<OneWeight>::of(p.dtype, config);
    int ctas = 0;
    error = kernel.ctas_per_sm(device, kernel.threads, kernel.shared_bytes, &ctas);
    config = dx_config(config, p.m, p.w.n, p.w.k, ctas, device);
    token_tiles = ceil_div(p.m, config.tokens);
    tiles = token_tiles * ceil_div(p.w.k, config.columns);
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    counters = p.g ? 0 : round_up(p.m * p.lora.rank * dtype_bytes(p.dtype));
    partials = counters + (config.splits > 1 ? round_up(4 * tiles) : 0);
    end = partials + (config.splits > 1 ? tiles * config.splits * config.tokens * config.columns * 4 : 0);
  }
};

kernels::DxArgs make_args(const LinearDxProblem& p, const Plan& plan, const void* g, char* workspace) {
  kernels::DxArgs args;
  args.dy = p.dy;
  args.packed = p.w.packed;
  args.scales = tile::make_scale_view(p.w);
  args.code = tile::make_code_view(p.w.code);
  args.lora_a = p.lora.a;
  args.g = g;
  args.dx = p.dx;
  args.partials = reinterpret_cast<float*>(workspace + plan.partials);
  args.counters = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  args.m = p.m;
  args.n = p.w.n;
  args.k = p.w.k;
  args.rank = p.lora.rank;
  args.rows_per_split = plan.config.rows_per_split;
  args.splits = static_cast<int32_t>(plan.config.splits);
  args.token_tiles = static_cast<int32_t>(plan.token_tiles);
  args.dropout = p.lora.dropout;
  return args;
}

// Computes g, and clears the counters of the splits.
cudaError_t launch_g(const LinearDxProblem& p, const Plan& plan, void* g, char* workspace, cudaStream_t stream) {
  const int64_t counters = plan.config.splits > 1 ? plan.tiles : 0;
  if (p.lora.rank == 0) {
    return counters ? cudaMemsetAsync(workspace + plan.counters, 0, 4 * counters, stream) : cudaSuccess;
  }
  LowRankProblem problem = g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g);
  problem.clear = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  problem.clear_count = counters;
  return launch_low_rank(problem, stream);
}

}  // namespace

cudaError_t linear_nf4_dx_choice(const LinearDxProblem& p, const Device& device, std::string* choice) {
  if (sm90_takes(p, device)) return *choice = linear_nf4_dx_sm90_choice(p, device), cudaSuccess;
  const Plan plan(p, device);
  const DxConfig& c = plan.config;
  *choice = describe(c.kernel, {{"tokens", c.tokens}, {"columns", c.columns}, {"splits", c.splits}});
  return plan.error;
}

cudaError_t launch_linear_nf4_dx(const LinearDxProblem& p, const Device& device, const Allocator& allocate,
                                 cudaStream_t stream) {
  if (p.m == 0 || p.w.k == 0) return cudaSuccess;
  if (sm90_takes(p, device)) return launch_linear_nf4_dx_sm90(p, device, allocate, stream);
  const Plan plan(p, device);
  if (plan.error != cudaSuccess) return plan.error;
  char* const workspace = static_cast<char*>(allocate(plan.end));
  void* const g = p.g ? p.g : workspace;
  if (const cudaError_t error = launch_g(p, plan, g, workspace, stream); error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.config.splits));
  return launch_kernel(plan.kernel.kernel, grid, plan.kernel.threads, plan.kernel.shared_bytes, stream,
                       make_args(p, plan, g, workspace));
}

}  // namespace qlora::cuda

#include "cuda/launch/linear_nf4_dx.h"

#include "cuda/kernels/linear_nf4_dx.cuh"
#include "cuda/kernels/linear_nf4_dx_exact.cuh"
#include "cuda/launch/choice.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/linear_nf4_dx_sm90.h"
#include "cuda/launch/low_rank.h"

namespace qlora::cuda {
namespace {

bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool is_ragged(const LinearDxProblem& p) {
  return p.w.k % 32 != 0 || p.w.n % 8 != 0 || !aligned_16(p.dy) || !aligned_16(p.w.packed) || !aligned_16(p.dx) ||
         !aligned_16(p.lora.a);
}

// One of the kernels, and how it is launched.
struct DxKernel {
  void (*kernel)(const kernels::DxArgs);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
  int threads, shared_bytes;
};

template <class T, int kTokenTiles, bool kRagged>
constexpr DxKernel on_tensor_cores() {
  constexpr auto kKernel = kernels::linear_nf4_dx_kernel<T, kTokenTiles, kRagged>;
  return {kKernel, ctas_per_sm<kKernel>, tile::kDxThreads, tile::DxLayout<kTokenTiles>::kBytes};
}

template <class T>
DxKernel on_tensor_cores(const DxConfig& config) {
  if (config.kernel == Kernel::kRagged) return on_tensor_cores<T, DxConfig::kRaggedTokens / 8, true>();
  switch (config.tokens) {
    case 8:
      return on_tensor_cores<T, 1, false>();
    case 16:
      return on_tensor_cores<T, 2, false>();
    case 32:
      return on_tensor_cores<T, 4, false>();
    default:
      return on_tensor_cores<T, 8, false>();
  }
}

DxKernel dx_kernel(DType dtype, const DxConfig& config) {
  if (dtype == DType::kBFloat16) return on_tensor_cores<bfloat16>(config);
  if (dtype == DType::kFloat16) return on_tensor_cores<float16>(config);
  constexpr auto kExact = kernels::linear_nf4_dx_exact_kernel;
  return {kExact, ctas_per_sm<kExact>, kernels::kDxExactThreads, 0};
}

// The launch's shape, and where the parts of the workspace begin, in bytes.
struct Plan {
  DxKernel kernel;
  DxConfig config;
  int64_t token_tiles, tiles;
  int64_t counters, partials, end;
  cudaError_t error;

  Plan(const LinearDxProblem& p, const Device& device) {
    config = dx_tile(p.m, fused_kernel(p.dtype, is_ragged(p)));
    kernel = dx_kernel(p.dtype, config);
    int ctas = 0;
    error = kernel.ctas_per_sm(device, kernel.threads, kernel.shared_bytes, &ctas);
    config = dx_config(config, p.m, p.w.n, p.w.k, ctas, device);
    token_tiles = ceil_div(p.m, config.tokens);
    tiles = token_tiles * ceil_div(p.w.k, config.columns);
    const auto round_up = [](int64_t bytes) { return ceil_div(bytes, 16) * 16; };
    counters = round_up(p.m * p.lora.rank * dtype_bytes(p.dtype));
    partials = counters + (config.splits > 1 ? round_up(4 * tiles) : 0);
    end = partials + (config.splits > 1 ? tiles * config.splits * config.tokens * config.columns * 4 : 0);
  }
};

kernels::DxArgs make_args(const LinearDxProblem& p, const Plan& plan, char* workspace) {
  kernels::DxArgs args;
  args.dy = p.dy;
  args.packed = p.w.packed;
  args.scales = tile::make_scale_view(p.w.scales, ceil_div(p.w.n * p.w.k, p.w.scales.block_size));
  args.lora_a = p.lora.a;
  args.g = workspace;
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

// g, and zeroes for the counters of the splits.
cudaError_t launch_g(const LinearDxProblem& p, const Plan& plan, char* workspace, cudaStream_t stream) {
  const int64_t counters = plan.config.splits > 1 ? plan.tiles : 0;
  if (p.lora.rank == 0) {
    return counters ? cudaMemsetAsync(workspace + plan.counters, 0, 4 * counters, stream) : cudaSuccess;
  }
  LowRankProblem g;
  g.dtype = p.dtype;
  g.m = p.m;
  g.k = p.w.n;
  g.rank = p.lora.rank;
  g.x = p.dy;
  g.a = p.lora.b;
  g.transposed = true;
  g.scaling = p.lora.scaling;
  g.out = workspace;
  g.clear = reinterpret_cast<uint32_t*>(workspace + plan.counters);
  g.clear_count = counters;
  return launch_low_rank(g, stream);
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
  if (const cudaError_t error = launch_g(p, plan, workspace, stream); error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.config.splits));
  return launch_kernel(plan.kernel.kernel, grid, plan.kernel.threads, plan.kernel.shared_bytes, stream,
                       make_args(p, plan, workspace));
}

}  // namespace qlora::cuda

#include "cuda/launch/linear_nf4_dx.h"

#include "cuda/kernels/linear_nf4_dx.cuh"
#include "cuda/kernels/linear_nf4_dx_exact.cuh"
#include "cuda/launch/choice.h"
#include "cuda/launch/device.h"
#include "cuda/launch/low_rank.h"

namespace qlora::cuda {
namespace {

bool aligned_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool is_ragged(const LinearDxProblem& p) {
  return p.w.k % 32 != 0 || p.w.n % 8 != 0 || !aligned_16(p.dy) || !aligned_16(p.w.packed) || !aligned_16(p.dx) ||
         !aligned_16(p.lora.a);
}

// The launch's shape, and where the parts of the workspace begin, in bytes.
struct Plan {
  DxConfig config;
  int64_t token_tiles, tiles;
  int64_t counters, partials, end;

  Plan(const LinearDxProblem& p, const Device& device)
      : config(dx_config(p.m, p.w.n, p.w.k, fused_kernel(p.dtype, is_ragged(p)), device)) {
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

template <class T, int kTokenTiles, bool kRagged>
cudaError_t launch_tiles(const kernels::DxArgs& args, dim3 grid, cudaStream_t stream) {
  const auto kernel = kernels::linear_nf4_dx_kernel<T, kTokenTiles, kRagged>;
  constexpr int kBytes = tile::DxLayout<kTokenTiles>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, tile::kDxThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const kernels::DxArgs& args, const DxConfig& config, dim3 grid, cudaStream_t stream) {
  if (config.kernel == Kernel::kRagged) return launch_tiles<T, DxConfig::kRaggedTokens / 8, true>(args, grid, stream);
  switch (config.tokens) {
    case 8:
      return launch_tiles<T, 1, false>(args, grid, stream);
    case 16:
      return launch_tiles<T, 2, false>(args, grid, stream);
    case 32:
      return launch_tiles<T, 4, false>(args, grid, stream);
    default:
      return launch_tiles<T, 8, false>(args, grid, stream);
  }
}

}  // namespace

cudaError_t linear_nf4_dx_workspace_bytes(const LinearDxProblem& p, int64_t* bytes) {
  *bytes = 0;
  if (p.m == 0 || p.w.k == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  *bytes = Plan(p, device).end;
  return cudaSuccess;
}

cudaError_t linear_nf4_dx_choice(const LinearDxProblem& p, std::string* choice) {
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const DxConfig c = Plan(p, device).config;
  *choice = describe(c.kernel, {{"tokens", c.tokens}, {"columns", c.columns}, {"splits", c.splits}});
  return cudaSuccess;
}

cudaError_t launch_linear_nf4_dx(const LinearDxProblem& p, void* workspace, cudaStream_t stream) {
  if (p.m == 0 || p.w.k == 0) return cudaSuccess;
  Device device;
  if (const cudaError_t error = current_device(&device); error != cudaSuccess) return error;
  const Plan plan(p, device);
  char* const bytes = static_cast<char*>(workspace);
  if (const cudaError_t error = launch_g(p, plan, bytes, stream); error != cudaSuccess) return error;

  const kernels::DxArgs args = make_args(p, plan, bytes);
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.config.splits));
  switch (p.dtype) {
    case DType::kFloat32:
      kernels::linear_nf4_dx_exact_kernel<<<grid, kernels::kDxExactThreads, 0, stream>>>(args);
      return cudaGetLastError();
    case DType::kBFloat16:
      return launch<bfloat16>(args, plan.config, grid, stream);
    case DType::kFloat16:
      return launch<float16>(args, plan.config, grid, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace qlora::cuda

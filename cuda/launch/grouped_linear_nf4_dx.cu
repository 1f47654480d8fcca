#include "cuda/launch/grouped_linear_nf4_dx.h"

#include "cuda/kernels/grouped_linear_nf4_dx.cuh"
#include "cuda/launch/choice.h"
#include "cuda/launch/grouped_low_rank.h"
#include "cuda/launch/launch.h"

namespace qlora::cuda {
namespace {

// What holds of the first expert's pointers holds of all, since n and k do.
bool is_ragged(const LinearDxProblem& p) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  return p.w.k % 32 != 0 || p.w.n % 8 != 0 || !aligned(p.dy) || !aligned(p.w.packed) || !aligned(p.dx) ||
         !aligned(p.lora.a);
}

// One of the kernels, and how it is launched.
struct GroupedDxKernel {
  void (*kernel)(const kernels::GroupedDxArgs);
  cudaError_t (*ctas_per_sm)(const Device& device, int threads, int shared_bytes, int* ctas);
  int threads, shared_bytes;
};

template <class T, int kTokenTiles, bool kRagged>
constexpr GroupedDxKernel on_tensor_cores() {
  constexpr auto kKernel = kernels::grouped_linear_nf4_dx_kernel<T, kTokenTiles, kRagged>;
  return {kKernel, ctas_per_sm<kKernel>, tile::kDxThreads, tile::DxLayout<kTokenTiles>::kBytes};
}

template <class T>
GroupedDxKernel on_tensor_cores(const DxConfig& config) {
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

GroupedDxKernel dx_kernel(DType dtype, const DxConfig& config) {
  if (dtype == DType::kBFloat16) return on_tensor_cores<bfloat16>(config);
  if (dtype == DType::kFloat16) return on_tensor_cores<float16>(config);
  constexpr auto kExact = kernels::grouped_linear_nf4_dx_exact_kernel;
  return {kExact, ctas_per_sm<kExact>, kernels::kDxExactThreads, 0};
}

// The tile of a CTA, with rows n in one piece: experts fill the device.
DxConfig tile_of(const Grouped<LinearDxProblem>& problem) {
  const LinearDxProblem& p = problem.stack;
  return dx_tile(grouped_tile_tokens(p.m, problem.experts), fused_kernel(p.dtype, is_ragged(p)));
}

kernels::GroupedDxArgs make_args(const Grouped<LinearDxProblem>& problem, const void* g, int64_t token_tiles) {
  const LinearDxProblem& p = problem.stack;
  kernels::GroupedDxArgs args{};
  args.stack.dy = p.dy;
  args.stack.packed = p.w.packed;
  args.stack.scales = tile::make_scale_view(p.w.scales, ceil_div(p.w.n * p.w.k, p.w.scales.block_size));
  args.stack.lora_a = p.lora.a;
  args.stack.g = g;
  args.stack.dx = p.dx;
  args.stack.m = p.m;
  args.stack.n = p.w.n;
  args.stack.k = p.w.k;
  args.stack.rank = p.lora.rank;
  args.stack.rows_per_split = p.w.n;
  args.stack.splits = 1;
  args.stack.token_tiles = static_cast<int32_t>(token_tiles);
  args.stack.dropout = p.lora.dropout;
  args.groups = {problem.offsets, problem.experts, p.m};
  args.stride = weight_stride(p.w);
  return args;
}

}  // namespace

cudaError_t grouped_linear_nf4_dx_choice(const Grouped<LinearDxProblem>& problem, const Device&, std::string* choice) {
  const DxConfig c = tile_of(problem);
  *choice = describe(c.kernel, {{"tokens", c.tokens}, {"columns", c.columns}});
  return cudaSuccess;
}

cudaError_t launch_grouped_linear_nf4_dx(const Grouped<LinearDxProblem>& problem, const Device& device,
                                         const Allocator& allocate, cudaStream_t stream) {
  const LinearDxProblem& p = problem.stack;
  if (p.m == 0 || p.w.k == 0) return cudaSuccess;
  void* const workspace = allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const Grouped<LowRankProblem> g{{.dtype = p.dtype,
                                   .m = p.m,
                                   .k = p.w.n,
                                   .rank = p.lora.rank,
                                   .x = p.dy,
                                   .a = p.lora.b,
                                   .transposed = true,
                                   .scaling = p.lora.scaling,
                                   .out = workspace},
                                  problem.offsets,
                                  problem.experts};
  if (const cudaError_t error = launch_grouped_low_rank(g, stream); error != cudaSuccess) return error;

  const DxConfig config = tile_of(problem);
  const GroupedDxKernel kernel = dx_kernel(p.dtype, config);
  int ctas = 0;  // of no interest: the grid is what the rows may need
  const cudaError_t error = kernel.ctas_per_sm(device, kernel.threads, kernel.shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t token_tiles = tile::most_group_tiles(p.m, problem.experts, config.tokens);
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.k, config.columns));
  return launch_kernel(kernel.kernel, grid, kernel.threads, kernel.shared_bytes, stream,
                       make_args(problem, workspace, token_tiles));
}

}  // namespace qlora::cuda

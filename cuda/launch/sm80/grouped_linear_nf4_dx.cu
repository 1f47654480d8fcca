#include "cuda/launch/sm80/grouped_linear_nf4_dx.h"

#include "cuda/kernels/sm80/grouped_linear_nf4_dx.cuh"
#include "cuda/launch/any/grouped_low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/sm80/dx_kernels.h"
#include "cuda/launch/sm80/ragged.h"

namespace qlora::cuda {
namespace {

struct Experts {
  using Args = kernels::GroupedDxArgs;
  template <class T, int kTokenTiles, bool kRagged>
  static constexpr auto kKernel = kernels::grouped_linear_nf4_dx_kernel<T, kTokenTiles, kRagged>;
  static constexpr auto kExact = kernels::grouped_linear_nf4_dx_exact_kernel;
};

// The tile of a CTA. The sum over rows n is not split, because experts fill the device.
DxConfig tile_of(const Grouped<LinearDxProblem>& problem) {
  const LinearDxProblem& p = problem.stack;
  return dx_tile(grouped_tile_tokens(p.m, problem.experts), fused_kernel(p.dtype, is_ragged(p)), p.w.scales.block_size);
}

kernels::GroupedDxArgs make_args(const Grouped<LinearDxProblem>& problem, const void* g, int64_t token_tiles) {
  const LinearDxProblem& p = problem.stack;
  kernels::GroupedDxArgs args{};
  args.stack.dy = p.dy;
  args.stack.packed = p.w.packed;
  args.stack.scales = tile::make_scale_view(p.w);
  args.stack.code = tile::make_code_view(p.w.code);
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
  void* const g = p.g ? p.g : allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  cudaError_t error = launch_grouped_low_rank(
      {g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, g), problem.offsets, problem.experts}, stream);
  if (error != cudaSuccess) return error;

  const DxConfig config = tile_of(problem);
  const DxKernel kernel = DxKernels<Experts>::of(p.dtype, config);
  int ctas = 0;  // unused: the grid covers all rows
  error = kernel.ctas_per_sm(device, kernel.threads, kernel.shared_bytes, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t token_tiles = tile::most_group_tiles(p.m, problem.experts, config.tokens);
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.k, config.columns));
  return launch_kernel(kernel.kernel, grid, kernel.threads, kernel.shared_bytes, stream,
                       make_args(problem, g, token_tiles));
}

}  // namespace qlora::cuda

// Launches the forward and dX of experts on decoded weights and our own GEMM: h or g if there is LoRA, and then for
// each panel a launch that decodes it for all experts with tokens, and one that multiplies all tokens.
#include "cuda/kernels/sm80/grouped_linear_gemm.cuh"

#include <algorithm>

#include "cuda/launch/generic/grouped_low_rank.h"
#include "cuda/launch/sm80/gemm_panels.h"
#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"

namespace qlora::cuda::sm80 {
namespace {

// `low_rank_of(out)` is the problem of h or g, and `retained` is where it is kept, or null.
template <bool kRightHasRows, class Problem, class LowRankOf>
cudaError_t launch_panels(const Grouped<Problem>& problem, const Config& config, void* retained,
                          const LowRankOf& low_rank_of, const Context& context) {
  const Problem& p = problem.stack;
  const PanelProduct whole = library::product(p);
  const int64_t bytes = dtype_bytes(p.dtype);
  Workspace parts;
  const int64_t panels = parts.add(problem.experts * config.panel * whole.inner * bytes);
  const int64_t own = parts.add(retained ? 0 : p.m * p.lora.rank * bytes);
  uint8_t* const memory = context.allocate(parts.bytes());
  void* const low_rank = retained ? retained : memory + own;
  cudaError_t error = launch_grouped_low_rank({low_rank_of(low_rank), problem.offsets, problem.experts}, context.device,
                                              context.stream);
  for (int64_t first = 0; first < whole.columns && error == cudaSuccess; first += config.panel) {
    const PanelRange panel{
        .first = first, .columns = std::min(config.panel, whole.columns - first), .inner = whole.inner};
    error = decode_panel(problem, panel, memory + panels, context);
    if (error != cudaSuccess) break;
    error = with_16_bit_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      constexpr auto kKernel = kernels::grouped_linear_gemm_kernel<T, kRightHasRows>;
      int ctas = 0;  // unused, since the grid covers all rows; the query allows the kernel its shared memory
      const cudaError_t queried =
          ctas_per_sm<kKernel>(context.device, tile::kGemmThreads, tile::kGemmSharedBytes, &ctas);
      if (queried != cudaSuccess) return queried;
      const kernels::GemmUnits whole_tile{.count = 1, .token_tiles = 1, .whole = 1, .parts = 1};
      const kernels::GroupedGemmArgs<T> args{gemm_args<T>(p, panel, low_rank, memory + panels, whole_tile),
                                             {problem.offsets, problem.experts, p.m}};
      const int64_t tiles =
          tile::most_group_tiles(p.m, problem.experts, gemm::kTokens) * ceil_div(panel.columns, gemm::kColumns);
      return launch_kernel(kKernel, static_cast<unsigned>(tiles), tile::kGemmThreads, tile::kGemmSharedBytes,
                           context.stream, args);
    });
  }
  return error;
}

}  // namespace

cudaError_t launch_gemm(const Grouped<LinearProblem>& problem, const Config& config, const Context& context) {
  const LinearProblem& p = problem.stack;
  const auto h = [&](void* out) { return h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, out); };
  return launch_panels<false>(problem, config, p.h, h, context);
}

cudaError_t launch_gemm(const Grouped<LinearDxProblem>& problem, const Config& config, const Context& context) {
  const LinearDxProblem& p = problem.stack;
  const auto g = [&](void* out) { return g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, out); };
  return launch_panels<true>(problem, config, p.g, g, context);
}

}  // namespace qlora::cuda::sm80

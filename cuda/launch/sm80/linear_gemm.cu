// Launches the forward and dX on a decoded weight and our own GEMM: h or g if there is LoRA, and then two launches per
// panel of the weight, which decode it and multiply by it.
#include "cuda/kernels/sm80/linear_gemm.cuh"

#include <algorithm>

#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/sm80/gemm_panels.h"
#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"

namespace qlora::cuda::sm80 {
namespace {

// The card gives the next unit to the next CTA that is free, unless `ctas` of the configuration limits them.
template <class T, bool kRightHasRows>
cudaError_t launch_panel(const kernels::GemmArgs<T>& args, const Config& config, const Context& context) {
  constexpr auto kKernel = kernels::linear_gemm_kernel<T, kRightHasRows>;
  int ctas = 0;
  const cudaError_t error = ctas_per_sm<kKernel>(context.device, tile::kGemmThreads, tile::kGemmSharedBytes, &ctas);
  if (error != cudaSuccess) return error;
  const int64_t units = args.units.count, grid = config.ctas > 0 ? std::min(config.ctas, units) : units;
  return launch_kernel(kKernel, static_cast<unsigned>(grid), tile::kGemmThreads, tile::kGemmSharedBytes, context.stream,
                       args);
}

// The workspace: a decoded panel, h or g if it is not retained, and the parts of sums that are cut.
class Memory {
 public:
  void* weight;
  void* low_rank;
  Tickets tickets;

  Memory(const PanelProduct& p, const Config& config, void* retained, int64_t rank, const Context& context)
      : token_tiles_(ceil_div(p.m, gemm::kTokens)),
        stages_(gemm::part_stages(p.inner, config.splits)),
        cuts_(gemm::cuts(p, context.device)) {
    const int64_t bytes = dtype_bytes(p.dtype), cut = p.columns - cuts_.whole;
    Workspace parts;
    const int64_t panel = parts.add(config.panel * p.inner * bytes);
    const int64_t own = parts.add(retained ? 0 : p.m * rank * bytes);
    const SplitSums sums(&parts, token_tiles_ * ceil_div(cut, gemm::kColumns), cuts_.parts,
                         gemm::kTokens * gemm::kColumns);
    uint8_t* const memory = context.allocate(parts.bytes());
    weight = memory + panel;
    low_rank = retained ? retained : memory + own;
    tickets = sums.tickets(memory);
    partials_ = sums.partials(memory);
  }

  // The units of the panel of `columns` columns from `first` on.
  kernels::GemmUnits units(int64_t first, int64_t columns) const {
    const int64_t whole_columns = std::clamp<int64_t>(cuts_.whole - first, 0, columns);
    const int64_t whole = ceil_div(whole_columns, gemm::kColumns);
    const int64_t cut = ceil_div(columns - whole_columns, gemm::kColumns);
    const int64_t tile = token_tiles_ * std::max<int64_t>(first - cuts_.whole, 0) / gemm::kColumns;
    return {.count = static_cast<unsigned>(token_tiles_ * (whole + cut * cuts_.parts)),
            .token_tiles = static_cast<unsigned>(token_tiles_),
            .whole = static_cast<unsigned>(whole),
            .cut = static_cast<unsigned>(cut),
            .parts = static_cast<unsigned>(cuts_.parts),
            .part_stages = static_cast<int>(stages_),
            .partials = reinterpret_cast<float4*>(partials_ + tile * cuts_.parts * gemm::kTokens * gemm::kColumns),
            .tickets = tickets.words + tile};
  }

 private:
  int64_t token_tiles_, stages_;
  gemm::Cuts cuts_;
  float* partials_;
};

// `low_rank` is the problem of h or g.
template <bool kRightHasRows, class Problem>
cudaError_t launch_panels(const Problem& p, const Config& config, LowRankProblem low_rank, const Memory& memory,
                          const Context& context) {
  const PanelProduct whole = library::product(p);
  low_rank.clear = memory.tickets;
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < whole.columns && error == cudaSuccess; first += config.panel) {
    const PanelRange panel{
        .first = first, .columns = std::min(config.panel, whole.columns - first), .inner = whole.inner};
    error = decode_panel(p, panel, memory.weight, context);
    if (error != cudaSuccess) break;
    error = with_16_bit_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      const kernels::GemmUnits units = memory.units(first, panel.columns);
      return launch_panel<T, kRightHasRows>(gemm_args<T>(p, panel, memory.low_rank, memory.weight, units), config,
                                            context);
    });
  }
  return error;
}

}  // namespace

cudaError_t launch_gemm(const LinearProblem& p, const Config& config, const Context& context) {
  const Memory memory(library::product(p), config, p.h, p.lora.rank, context);
  return launch_panels<false>(p, config, h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, memory.low_rank), memory, context);
}

cudaError_t launch_gemm(const LinearDxProblem& p, const Config& config, const Context& context) {
  const Memory memory(library::product(p), config, p.g, p.lora.rank, context);
  return launch_panels<true>(p, config, g_problem(p.dtype, p.m, p.w.n, p.dy, p.lora, memory.low_rank), memory, context);
}

}  // namespace qlora::cuda::sm80

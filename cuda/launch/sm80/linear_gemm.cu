// Launches the forward and dX on a decoded weight and our own GEMM: h or g if there is LoRA, and then two launches per
// panel of the weight, which decode it and multiply by it.
#include "cuda/kernels/sm80/linear_gemm.cuh"

#include <algorithm>

#include "cuda/launch/generic/low_rank.h"
#include "cuda/launch/generic/weight_panels.h"
#include "cuda/launch/sm80/launchers.h"
#include "cuda/launch/types.h"
#include "cuda/launch/workspace.h"
#include "cuda/tuning/gemm.h"

namespace qlora::cuda::sm80 {
namespace {

static_assert(tile::kGemmTokens == gemm::kTokens && tile::kGemmColumns == gemm::kColumns &&
              tile::kGemmTerms == gemm::kTerms && tile::kGemmSharedBytes == gemm::kSharedBytes);

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

template <class T>
const T* at(const void* base, int64_t index) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + index;
}

}  // namespace

cudaError_t launch_gemm(const LinearProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank;
  const Memory memory(library::product(p), config, p.h, rank, context);
  LowRankProblem low_rank = h_problem(p.dtype, p.m, k, p.x, p.lora, memory.low_rank);
  low_rank.clear = memory.tickets;
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, n - first);
    error = decode_panel(p, {.first = first, .columns = columns, .inner = k}, memory.weight, context);
    if (error != cudaSuccess) break;
    error = with_16_bit_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      const kernels::GemmArgs<T> args{.lora = {at<T>(memory.low_rank, 0), at<T>(p.lora.b, first * rank), rank, rank},
                                      .main = {at<T>(p.x, 0), at<T>(memory.weight, 0), k, k},
                                      .bias = at<T>(p.bias, first),
                                      .out = static_cast<T*>(p.y) + first,
                                      .out_stride = n,
                                      .m = p.m,
                                      .columns = columns,
                                      .dropout = {},
                                      .first_column = first,
                                      .units = memory.units(first, columns)};
      return launch_panel<T, false>(args, config, context);
    });
  }
  return error;
}

cudaError_t launch_gemm(const LinearDxProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank;
  const Memory memory(library::product(p), config, p.g, rank, context);
  LowRankProblem low_rank = g_problem(p.dtype, p.m, n, p.dy, p.lora, memory.low_rank);
  low_rank.clear = memory.tickets;
  cudaError_t error = launch_low_rank(low_rank, context.stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, k - first);
    error = decode_panel(p, {.first = first, .columns = columns, .inner = n}, memory.weight, context);
    if (error != cudaSuccess) break;
    error = with_16_bit_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      const kernels::GemmArgs<T> args{.lora = {at<T>(memory.low_rank, 0), at<T>(p.lora.a, first), k, rank},
                                      .main = {at<T>(p.dy, 0), at<T>(memory.weight, 0), columns, n},
                                      .bias = nullptr,
                                      .out = static_cast<T*>(p.dx) + first,
                                      .out_stride = k,
                                      .m = p.m,
                                      .columns = columns,
                                      .dropout = p.lora.dropout,
                                      .first_column = first,
                                      .units = memory.units(first, columns)};
      return launch_panel<T, true>(args, config, context);
    });
  }
  return error;
}

}  // namespace qlora::cuda::sm80

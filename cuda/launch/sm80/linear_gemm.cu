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
              tile::kGemmSharedBytes == gemm::kSharedBytes);

template <class T, bool kRightHasRows>
cudaError_t launch_panel(const kernels::GemmArgs<T>& args, const Context& context) {
  constexpr auto kKernel = kernels::linear_gemm_kernel<T, kRightHasRows>;
  int ctas = 0;
  const cudaError_t error = ctas_per_sm<kKernel>(context.device, tile::kGemmThreads, tile::kGemmSharedBytes, &ctas);
  if (error != cudaSuccess) return error;
  return launch_kernel(kKernel, static_cast<unsigned>(gemm::tiles(args.m, args.columns)), tile::kGemmThreads,
                       tile::kGemmSharedBytes, context.stream, args);
}

// The workspace: a decoded panel, and h or g if it is not retained.
struct Memory {
  void* weight;
  void* low_rank;

  Memory(int64_t weight_bytes, void* retained, int64_t low_rank_bytes, const Context& context) {
    Workspace parts;
    const int64_t panel = parts.add(weight_bytes), own = parts.add(retained ? 0 : low_rank_bytes);
    uint8_t* const memory = context.allocate(parts.bytes());
    weight = memory + panel;
    low_rank = retained ? retained : memory + own;
  }
};

template <class T>
const T* at(const void* base, int64_t index) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + index;
}

}  // namespace

cudaError_t launch_gemm(const LinearProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank, bytes = dtype_bytes(p.dtype);
  const Memory memory(config.panel * k * bytes, p.h, p.m * rank * bytes, context);
  cudaError_t error = launch_low_rank(h_problem(p.dtype, p.m, k, p.x, p.lora, memory.low_rank), context.stream);
  for (int64_t first = 0; first < n && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, n - first);
    error = decode_panel(p, first, columns, memory.weight, context);
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
                                      .first_column = first};
      return launch_panel<T, false>(args, context);
    });
  }
  return error;
}

cudaError_t launch_gemm(const LinearDxProblem& p, const Config& config, const Context& context) {
  const int64_t n = p.w.n, k = p.w.k, rank = p.lora.rank, bytes = dtype_bytes(p.dtype);
  const Memory memory(config.panel * n * bytes, p.g, p.m * rank * bytes, context);
  cudaError_t error = launch_low_rank(g_problem(p.dtype, p.m, n, p.dy, p.lora, memory.low_rank), context.stream);
  for (int64_t first = 0; first < k && error == cudaSuccess; first += config.panel) {
    const int64_t columns = std::min(config.panel, k - first);
    error = decode_panel(p, first, columns, memory.weight, context);
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
                                      .first_column = first};
      return launch_panel<T, true>(args, context);
    });
  }
  return error;
}

}  // namespace qlora::cuda::sm80

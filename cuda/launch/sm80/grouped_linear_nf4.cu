#include "cuda/launch/sm80/grouped_linear_nf4.h"

#include "cuda/kernels/sm80/grouped_linear_nf4.cuh"
#include "cuda/launch/any/grouped_low_rank.h"
#include "cuda/launch/choice.h"
#include "cuda/launch/launch.h"
#include "cuda/launch/sm80/linear_tiles.h"
#include "cuda/launch/sm80/ragged.h"

namespace qlora::cuda {
namespace {

// A kernel for a problem: its grid and its name.
template <class T, class Tile_>
struct TensorCores {
  using Tile = Tile_;
  static constexpr int kTokens = Tile::kTokens, kRows = Tile::kRows, kThreads = Tile::kThreads;
  static constexpr int kSharedBytes = Tile::kSharedBytes;
  static constexpr auto kKernel = kernels::grouped_linear_nf4_kernel<Tile>;

  static kernels::LinearArgs<T> args(const LinearProblem& p, T* h, tile::ScaleView scales, int64_t token_tiles) {
    return {.x = static_cast<const T*>(p.x),
            .packed = p.w.packed,
            .scales = scales,
            .code = tile::make_pair_view<T>(p.w.code),
            .m = p.m,
            .n = p.w.n,
            .k = p.w.k,
            .lora = {h, static_cast<const T*>(p.lora.b), p.lora.rank, p.m, p.w.n},
            .out = {static_cast<T*>(p.y), static_cast<const T*>(p.bias), nullptr, nullptr},
            .token_tiles = token_tiles,
            .segments_per_split = p.w.k / tile::kSegment};
  }
};

template <class T, int kTokens_>
struct Ragged {
  static constexpr int kTokens = kTokens_, kRows = kernels::kRaggedRows, kThreads = kernels::kRaggedThreads;
  static constexpr int kSharedBytes = 0;
  static constexpr auto kKernel = kernels::grouped_linear_nf4_ragged_kernel<T, kTokens>;

  static kernels::RaggedLinearArgs<T> args(const LinearProblem& p, T* h, tile::ScaleView scales, int64_t token_tiles) {
    return {.x = static_cast<const T*>(p.x),
            .packed = p.w.packed,
            .scales = scales,
            .code = tile::make_code_view(p.w.code),
            .m = p.m,
            .n = p.w.n,
            .k = p.w.k,
            .h = h,
            .lora_b = static_cast<const T*>(p.lora.b),
            .rank = p.lora.rank,
            .bias = static_cast<const T*>(p.bias),
            .y = static_cast<T*>(p.y),
            .token_tiles = token_tiles};
  }
};

// Calls use(kernel) with the kernel for this problem and device. k is not split: this would gain nothing with many
// experts, and little with few.
template <class T, class Use>
cudaError_t with_kernel(const Grouped<LinearProblem>& problem, const Device& device, const Use& use) {
  const int64_t tokens = grouped_tile_tokens(problem.stack.m, problem.experts);
  if constexpr (sizeof(T) == 2) {
    if (!is_ragged(problem.stack)) {
      switch (linear_tile_size(tokens, device)) {
        case LinearTileSize::k4:
        case LinearTileSize::k8:
          return use(TensorCores<T, Tile8<T>>());
        case LinearTileSize::k16:
          return use(TensorCores<T, Tile16<T>>());
        case LinearTileSize::k32:
          return use(TensorCores<T, Tile32<T>>());
        case LinearTileSize::k64:
          return use(TensorCores<T, Tile64<T>>());
      }
    }
  }
  return linear_ragged_tokens(tokens) == 64 ? use(Ragged<T, 64>()) : use(Ragged<T, 16>());
}

template <class Use>
cudaError_t with_typed_kernel(const Grouped<LinearProblem>& problem, const Device& device, const Use& use) {
  switch (problem.stack.dtype) {
    case DType::kFloat32:
      return with_kernel<float>(problem, device, [&](auto kernel) { return use(float{}, kernel); });
    case DType::kBFloat16:
      return with_kernel<bfloat16>(problem, device, [&](auto kernel) { return use(bfloat16{}, kernel); });
    case DType::kFloat16:
      return with_kernel<float16>(problem, device, [&](auto kernel) { return use(float16{}, kernel); });
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

template <class T, class Kernel>
cudaError_t launch(const Grouped<LinearProblem>& problem, const Device& device, T* h, cudaStream_t stream) {
  const LinearProblem& p = problem.stack;
  const int64_t token_tiles = tile::most_group_tiles(p.m, problem.experts, Kernel::kTokens);
  const tile::ScaleView scales = tile::make_scale_view(p.w);
  const kernels::GroupedLinearArgs args{
      Kernel::args(p, h, scales, token_tiles), {problem.offsets, problem.experts, p.m}, weight_stride(p.w)};
  int ctas = 0;  // unused: the grid covers all rows
  const cudaError_t error = ctas_per_sm<Kernel::kKernel>(device, Kernel::kThreads, Kernel::kSharedBytes, &ctas);
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(token_tiles * ceil_div(p.w.n, Kernel::kRows));
  return launch_kernel(Kernel::kKernel, grid, Kernel::kThreads, Kernel::kSharedBytes, stream, args);
}

}  // namespace

cudaError_t grouped_linear_nf4_choice(const Grouped<LinearProblem>& problem, const Device& device,
                                      std::string* choice) {
  return with_typed_kernel(problem, device, [&](auto, auto kernel) {
    *choice = describe(fused_kernel(problem.stack.dtype, is_ragged(problem.stack)),
                       {{"tokens", kernel.kTokens}, {"rows", kernel.kRows}});
    return cudaSuccess;
  });
}

cudaError_t launch_grouped_linear_nf4(const Grouped<LinearProblem>& problem, const Device& device,
                                      const Allocator& allocate, cudaStream_t stream) {
  const LinearProblem& p = problem.stack;
  if (p.m == 0 || p.w.n == 0) return cudaSuccess;
  void* const h = p.h ? p.h : allocate(p.m * p.lora.rank * dtype_bytes(p.dtype));
  const cudaError_t error = launch_grouped_low_rank(
      {h_problem(p.dtype, p.m, p.w.k, p.x, p.lora, h), problem.offsets, problem.experts}, stream);
  if (error != cudaSuccess) return error;
  return with_typed_kernel(problem, device, [&](auto element, auto kernel) {
    using T = decltype(element);
    return launch<T, decltype(kernel)>(problem, device, static_cast<T*>(h), stream);
  });
}

}  // namespace qlora::cuda
